"""Patchscopes (arXiv 2401.06102) let the model itself put a vector into words.

1. A prompt such as "cat -> cat; 135 -> 135; hello -> hello; ? ->" makes the model repeat the token
   at its placeholder.
2. The vector replaces the residual stream h at the placeholder's token, at several sizes: multiples
   of the mean ‖h‖ of the prompt's other tokens.
3. The model's continuation is its name for the vector. It is compared with the likeliest tokens
   after the unchanged prompt, and with the vector read through the final norm and the unembedding.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Sequence
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
    """The model's continuations of a prompt in which a vector replaces one token's h.

    Attributes:
        ids: [direction, scale, rank], the likeliest next tokens.
        probabilities: [direction, scale, rank], the probabilities of these tokens.
        plain: [vocab], the probabilities of the next token after the unchanged prompt.
        continuations: the likeliest tokens one after another, by direction and scale.
        readings: [direction, vocab], each vector read by itself, in logits (`logit_lens`).
        strings: every token of the vocabulary.
        directions: the names of the directions.
        scales: the sizes of the vector, as multiples of `size`.
        size: the mean ‖h‖ of the other tokens, without sinks: the first token, and tokens whose
            ‖h‖ is an outlier.
        name: the hook point.
        prompt: the tokens of the prompt.
        position: the position of the token whose h is replaced.
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
            k: the number of tokens.

        Raises:
            ArgumentError: k is not a whole number, or is below 0.
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
        """The k tokens whose logits a vector raises most, with the later layers left out.

        The vector goes through the final norm, divided by its own size, and the unembedding, both
        without biases.

        Args:
            k: the number of tokens.
            direction: its name; None for the first one.
            largest: False for the tokens that it lowers most. A singular vector's sign is free, so
                both ends may be read.

        Returns:
            A data frame: rank, token, id, logit.

        Raises:
            ArgumentError: no direction has this name; k is not a whole number, or is below 0.
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
    """Replace one token's h by a vector, at several sizes, and let the model go on.

    Cost: one forward pass of the prompt for each vector, scale and new token, batched.

    Args:
        lens: the adapter over the model.
        vector: [d], [direction, d], {label: either}, a Contrast or ActivationShift with this hook
            point, (autoencoder, indices), or what a site writes: `lens.delta_w(site).U.T`, the
            left singular vectors of its ΔW, the one with the largest singular value first.
        name: a point of the residual stream.
        scales: sizes of the vector, as multiples of the mean ‖h‖ of the prompt's other tokens;
            negative ones reverse its sign.
        prompt: a text that makes the model repeat the token at the placeholder.
        placeholder: the vector replaces h at the last token that contains this text.
        at: the gates of the model, 0 for the base, 1 for the adapted.
        k: the number of likeliest tokens that are kept.
        max_new_tokens: the number of tokens in each continuation, each the likeliest one.

    Returns:
        Patchscope; `plain` holds the probabilities after the unchanged prompt.

    Raises:
        SiteError: the model lacks the hook point, or it is outside the residual stream.
        ArgumentError: a vector has another width or space, is zero, or holds NaN; there are no
            scales; the prompt lacks the placeholder or begins with it; k or max_new_tokens is
            below 1.
        ModelStateError: the point never fires.
        PromptError: the prompt does not fit the model.
        NumericsError: a logit is not finite.
    """
    count = whole("k", k, 1)
    length = whole("max_new_tokens", max_new_tokens, 1)
    _require_stream(lens, name)
    multiples = numbers_of("scales", scales)
    strength = number("at", at)
    gates = lens.gates(strength)
    if not multiples:
        raise ArgumentError("scales=[]", remedy="give at least one size.")
    directions = directions_of(vector, name).at(name, int(lens.model.cfg.d_model))
    unit = directions.unit(centred=lens.host.centres_stream)
    row = _prompt_of(lens, prompt)
    str_tokens = lens.str_tokens(row)[0]
    position = _position_of(placeholder, str_tokens)
    longest = len(str_tokens) + length - 1
    Tokens(lens.model).require_context(longest, "the prompt with its continuation")

    slot = _Slot(lens.function(row), gates, name, position)
    size = slot.mean_size()
    mean_sized = unit * size
    by_multiple = unit[:, None] * torch.tensor(multiples, dtype=unit.dtype)[:, None]
    vectors = (by_multiple * size).flatten(0, 1)
    plain = slot.unchanged_logits().softmax(-1)
    logits, tokens = slot.continued(vectors, length)
    require_finite(logits, "a logit")
    probabilities = logits.softmax(-1)
    likeliest = probabilities.topk(min(count, probabilities.shape[-1]))
    by_direction_and_scale = (len(unit), len(multiples), -1)
    return Patchscope(
        ids=likeliest.indices.view(by_direction_and_scale),
        probabilities=likeliest.values.view(by_direction_and_scale),
        plain=plain,
        readings=read_through(lens, over_scale(lens, mean_sized, mean_sized)),
        continuations=_texts_of(lens, tokens.view(by_direction_and_scale)),
        strings=lens.vocabulary,
        directions=directions.names,
        scales=tuple(multiples),
        size=size,
        name=name,
        prompt=tuple(str_tokens),
        position=position,
        at=strength,
        meta=lens.describe(row),
    )


def _require_stream(lens: LoraLens, name: str) -> None:
    """Refuse a hook point that does not hold the residual stream."""
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


def _position_of(placeholder: str, tokens: Sequence[str]) -> int:
    """The position of the last token that contains the placeholder."""
    if not isinstance(placeholder, str) or not placeholder:
        raise ArgumentError(f"placeholder={placeholder!r}: expected text that a token contains.")
    positions = [i for i, token in enumerate(tokens) if placeholder in token]
    if not positions or positions[-1] == 0:
        raise ArgumentError(
            f"placeholder={placeholder!r}: none of the tokens {list(tokens)} after the first "
            "contains it, so there is no token for the vector to replace."
        )
    return positions[-1]


@dataclasses.dataclass(frozen=True, eq=False)
class _Slot:
    """A token of the prompt whose h vectors replace.

    Attributes:
        f: the function of the prompt.
        gates: the gates of the model.
        name: the hook point.
        position: the position of the token.
    """

    f: Function
    gates: Float[Tensor, " site"]
    name: str
    position: int

    def mean_size(self) -> float:
        """The mean ‖h‖ of the prompt's tokens, without sinks and this token. One forward pass.

        If no other token is left, it is ‖h‖ of this one.
        """
        firings = self.f.passes.record([self.name], self.gates).firings
        self.f.lens.points(self.name).fired(firings, updated=True)
        norms = firings[self.name][-1].cpu().double().norm(dim=-1)
        is_counted = ~sinks_among([norms], self.f.rows.real.cpu())[0]
        is_counted[0] = False
        is_counted[self.position] = False
        if not bool(is_counted.any()):
            is_counted[self.position] = True
        return float(norms[0, is_counted].mean())

    def unchanged_logits(self) -> Float[Tensor, " vocab"]:
        """The logits of the next token after the unchanged prompt. One forward pass."""
        return self.f.passes.logits(under=self.f.lens.adapted(self.gates))[0]

    def continued(
        self, vectors: Float[Tensor, "row d"], length: int
    ) -> tuple[Float[Tensor, "row vocab"], Int[Tensor, "row new"]]:
        """The logits of the next token after each vector, and the likeliest continuations.

        Args:
            vectors: each is put into a copy of the prompt.
            length: the number of tokens in each continuation. One forward pass for each.
        """
        tokens = self.f.rows.tokens.repeat(len(vectors), 1)
        lengths = self.f.rows.lengths.repeat(len(vectors))
        first_logits: Tensor | None = None
        for step in range(length):
            rows = Prompts(tokens, lengths + step)
            logits = self.f.of_rows(rows).passes.logits(under=self._filled_with(vectors))
            if first_logits is None:
                first_logits = logits
            likeliest = logits.argmax(-1)[:, None].to(tokens)
            tokens = torch.cat([tokens, likeliest], 1)
        assert first_logits is not None, "max_new_tokens is at least 1"
        return first_logits, tokens[:, -length:]

    @contextlib.contextmanager
    def _filled_with(self, vectors: Float[Tensor, "row d"]) -> Generator[None]:
        """Within the block each row has its own vector in place of h."""
        lens = self.f.lens

        def put_in_place(h: Tensor, hook: Any) -> Tensor:
            del hook
            return h.select_scatter(vectors.to(h), 1, self.position)

        with lens.adapted(self.gates), lens.hooked([(self.name, put_in_place)]):
            yield


def _texts_of(
    lens: LoraLens, tokens: Int[Tensor, "direction scale new"]
) -> tuple[tuple[str, ...], ...]:
    """The continuations as text, by direction and scale."""
    by_direction: list[tuple[str, ...]] = []
    for by_scale in tokens.tolist():
        by_direction.append(tuple(Tokens(lens.model).text(ids) for ids in by_scale))
    return tuple(by_direction)
