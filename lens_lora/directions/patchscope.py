"""Patchscopes (arXiv 2401.06102) have the model itself say what a vector means.

1. A prompt makes the model repeat what stands at its placeholder, as
   "cat -> cat; 135 -> 135; hello -> hello; ? ->" does.
2. The vector takes the place of the residual stream h at the placeholder's token, at several sizes:
   multiples of the mean ‖h‖ of the prompt's other tokens.
3. What the model goes on with is its name for the vector. It is compared with the likeliest tokens
   after the prompt alone, and with the vector read through the final norm and the unembedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any, final

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.arguments import number, numbers_of, whole
from lens_lora.core import Described, Function, LoraLens, Prompts, Tokens, alone, tables
from lens_lora.directions.alignment import direction_index
from lens_lora.errors import ArgumentError, SiteError, require_finite
from lens_lora.formats.directions import directions_of, is_stream
from lens_lora.stream.ranked_tokens import ranked_tokens
from lens_lora.stream.site_activations import sinks_among
from lens_lora.stream.stream_reading import over_scale, read_through

# The paper's prompt of identities.
IDENTITY = "cat -> cat; 135 -> 135; hello -> hello; ? ->"
_DEFAULT_SCALES = (0.5, 1.0, 2.0, 4.0)


@final
class Patchscope(Described):
    """The model's continuations of a prompt in which a vector stands in the place of a token.

    Attributes:
        ids: [direction, scale, rank], the likeliest next tokens.
        probabilities: [direction, scale, rank], the probabilities of these tokens.
        plain: [vocab], the probabilities of the next token with nothing put in place.
        continuations: the likeliest tokens one after another, by direction and scale.
        readings: [direction, vocab], what each vector says by itself, in logits (`logit_lens`).
        strings: every token of the vocabulary.
        directions: their names.
        scales: the sizes of the vector, in mean sizes of h at the other tokens.
        size: that mean ‖h‖, without sinks: the first token, and tokens whose ‖h‖ is an outlier.
        name: the hook point.
        prompt: the tokens of the prompt.
        position: the token whose place is taken.
        at: the gates of the model.
        meta: model, adapter, dtype and versions.
    """

    ids: Int[Tensor, "direction scale rank"]
    probabilities: Float[Tensor, "direction scale rank"]
    plain: Float[Tensor, " vocab"]
    continuations: Annotated[tuple[tuple[str, ...], ...], "direction"]
    readings: Float[Tensor, "direction vocab"]
    strings: Annotated[tuple[str, ...], "vocab"]
    directions: Annotated[tuple[str, ...], "direction"]
    scales: Annotated[tuple[float, ...], "scale"]
    size: float
    name: str
    prompt: tuple[str, ...]
    position: int
    at: float

    def top(self, k: int = 5) -> pd.DataFrame:
        """One row per direction and scale: the k likeliest tokens, and the continuation.

        Args:
            k: how many tokens.

        Raises:
            ArgumentError: a k that is no whole number, or below 0.
        """
        count = whole("k", k, 0)
        rows: list[tuple[str, float, list[str], str]] = []
        for d, direction in enumerate(self.directions):
            for s, scale in enumerate(self.scales):
                tokens = [self.strings[i] for i in self.ids[d, s, :count].tolist()]
                rows.append((direction, scale, tokens, self.continuations[d][s]))
        return pd.DataFrame(rows, columns=["direction", "scale", "tokens", "continuation"])

    def logit_lens(
        self, k: int = 10, direction: str | None = None, *, largest: bool = True
    ) -> pd.DataFrame:
        """The k tokens that a vector reads as, with the layers after the point left out.

        The vector goes through the final norm, divided by its own size, and the unembedding. Biases
        do not count.

        Args:
            k: how many.
            direction: its name; without it, the first.
            largest: False for the tokens that it lowers most, or that a singular vector, whose sign
                is free, reads as the other way round.

        Returns:
            A data frame: rank, token, id, logit.

        Raises:
            ArgumentError: no such direction; a k that is no whole number, or below 0.
        """
        row = self.readings[direction_index(self.directions, direction)]
        return ranked_tokens(row, self.strings, k, "logit", largest=largest)

    def to_frame(self) -> pd.DataFrame:
        """One row per direction, scale and token."""
        table = tables.long_table(
            {"probability": self.probabilities, "unpatched": self.plain[self.ids]},
            {"direction": self.directions},
            {"scale": self.scales},
            {"place": range(1, self.ids.shape[2] + 1)},
        )
        ids = self.ids.flatten().tolist()
        return table.assign(token=[self.strings[i] for i in ids], id=ids)


@alone
def patchscope(
    lens: LoraLens,
    vector: Any,
    name: str,
    scales: Sequence[float] = _DEFAULT_SCALES,
    *,
    prompt: str = IDENTITY,
    placeholder: str = "?",
    at: float = 0.0,
    k: int = 10,
    max_new_tokens: int = 5,
) -> Patchscope:
    """Put a vector in the place of one token's h, at several sizes, and see what the model says.

    Cost: one forward pass of the prompt for each vector, scale and new token, batched.

    Args:
        lens: the adapter over the model.
        vector: [d], [direction, d], {label: either}, a Contrast or ActivationShift with this hook
            point, (autoencoder, indices), or what a site writes: `lens.delta_w(site).U.T`, the
            left singular vectors of its ΔW, the first of the largest.
        name: a point of the residual stream.
        scales: sizes of the vector there, in mean ‖h‖ of the prompt's other tokens; negative ones
            turn it round.
        prompt: a text that makes the model say what stands at the placeholder.
        placeholder: its last token that contains this is the one whose place is taken.
        at: the gates of the model, 0 for the base, 1 for the adapted.
        k: how many of the likeliest tokens are kept.
        max_new_tokens: the length of the continuations, the likeliest token each time.

    Returns:
        Patchscope; `plain` says which tokens the prompt alone makes likely.

    Raises:
        SiteError: a hook point that the model lacks, or one outside the residual stream.
        ArgumentError: vectors of another width or space, zeros or NaN, no scales, a prompt without
            the placeholder or with it as its first token, k or max_new_tokens below 1.
        ModelStateError: a point that never fires.
        PromptError: a prompt that does not fit the model.
        NumericsError: non-finite logits.
    """
    count = whole("k", k, 1)
    length = whole("max_new_tokens", max_new_tokens, 1)
    _require_stream(lens, name)
    sizes = numbers_of("scales", scales)
    strength = number("at", at)
    gates = lens.gates(strength)
    if not sizes:
        raise ArgumentError("scales=[]", remedy="give at least one size.")
    source = directions_of(vector, name).at(name, int(lens.model.cfg.d_model))
    unit = source.unit(centred=lens.host.centres_stream)
    row = _prompt_of(lens, prompt)
    str_tokens = lens.str_tokens(row)[0]
    place = _place(str_tokens, placeholder)
    Tokens(lens.model).require_context(
        len(str_tokens) + length - 1, "the prompt with its continuation"
    )
    f = lens.function(row)
    size = _mean_size(f, gates, name, place)
    by_size = unit[:, None] * torch.tensor(sizes, dtype=unit.dtype)[:, None] * size
    vectors = by_size.flatten(0, 1)

    def put_in_place(h: Tensor, hook: Any) -> Tensor:
        del hook
        return h.select_scatter(vectors.to(h), 1, place)

    @contextlib.contextmanager
    def with_vectors() -> Generator[None]:
        with lens.adapted(gates), lens.hooked([(name, put_in_place)]):
            yield

    plain = f.passes.logits(under=lens.adapted(gates))[0].softmax(-1)
    logits, tokens = _continued(f, with_vectors, len(vectors), length)
    require_finite(logits, "a logit")
    p = logits.softmax(-1)
    likeliest = p.topk(min(count, p.shape[-1]))
    shape = len(unit), len(sizes), -1
    return Patchscope(
        ids=likeliest.indices.view(shape),
        probabilities=likeliest.values.view(shape),
        plain=plain,
        readings=read_through(lens, over_scale(lens, unit * size, unit * size)),
        continuations=_texts_of(lens, tokens.view(shape)),
        strings=lens.vocabulary,
        directions=source.names,
        scales=tuple(sizes),
        size=size,
        name=name,
        prompt=tuple(str_tokens),
        position=place,
        at=strength,
        meta=lens.describe(row),
    )


def _require_stream(lens: LoraLens, name: str) -> None:
    """Refuse a hook point at which there is no residual stream."""
    if not is_stream(lens.known_point(name)):
        raise SiteError(
            f"{name} does not hold the residual stream, in which a token's whole h can be replaced",
            remedy="name a point such as 'blocks.3.hook_resid_post'.",
        )


def _prompt_of(lens: LoraLens, prompt: object) -> Prompts:
    """The prompt as tokens."""
    if not isinstance(prompt, str):
        raise ArgumentError(f"prompt={prompt!r}: expected one text that holds the placeholder.")
    return lens.prompts(prompt)


def _place(tokens: Sequence[str], placeholder: str) -> int:
    """The position of the last token that contains the placeholder."""
    if not isinstance(placeholder, str) or not placeholder:
        raise ArgumentError(f"placeholder={placeholder!r}: expected text that a token contains.")
    places = [i for i, token in enumerate(tokens) if placeholder in token]
    if not places or places[-1] == 0:
        raise ArgumentError(
            f"placeholder={placeholder!r}: none of the tokens {list(tokens)} after the first "
            "contains it; the vector takes the place of that token."
        )
    return places[-1]


def _mean_size(f: Function, gates: Float[Tensor, " site"], name: str, place: int) -> float:
    """The mean ‖h‖ of the prompt's tokens, without sinks and the placeholder. One forward pass.

    Where no other token is left, it is ‖h‖ of the placeholder.
    """
    firings = f.passes.record([name], gates).firings
    f.lens.points(name).fired(firings, updated=True)
    norms = firings[name][-1].cpu().double().norm(dim=-1)
    is_counted = ~sinks_among([norms], f.rows.real.cpu())[0]
    is_counted[0] = False
    is_counted[place] = False
    if not bool(is_counted.any()):
        is_counted[place] = True
    return float(norms[0, is_counted].mean())


def _continued(
    f: Function, under: Callable[[], AbstractContextManager[None]], count: int, length: int
) -> tuple[Float[Tensor, "row vocab"], Int[Tensor, "row new"]]:
    """The logits of the next token in so many copies of the row, and the likeliest continuations.

    Every pass is run under the hooks of a context that `under` makes.
    """
    tokens = f.rows.tokens.repeat(count, 1)
    lengths = f.rows.lengths.repeat(count)
    first_logits: Tensor | None = None
    for step in range(length):
        rows = Prompts(tokens, lengths + step)
        logits = f.of_rows(rows).passes.logits(under=under())
        if first_logits is None:
            first_logits = logits
        likeliest = logits.argmax(-1)[:, None].to(tokens)
        tokens = torch.cat([tokens, likeliest], 1)
    assert first_logits is not None, "max_new_tokens is at least 1"
    return first_logits, tokens[:, -length:]


def _texts_of(
    lens: LoraLens, tokens: Int[Tensor, "direction scale new"]
) -> tuple[tuple[str, ...], ...]:
    """The continuations as text, by direction and scale."""
    by_direction: list[tuple[str, ...]] = []
    for by_scale in tokens.tolist():
        by_direction.append(tuple(Tokens(lens.model).text(ids) for ids in by_scale))
    return tuple(by_direction)
