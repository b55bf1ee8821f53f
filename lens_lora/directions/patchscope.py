"""Patchscope (arXiv 2401.06102): what the model calls a vector.

v takes the place of h at one token of a prompt that repeats what stands there,
"cat -> cat; 135 -> 135; hello -> hello; ? ->", and the model goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, final

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.arguments import number, numbers_of, whole
from lens_lora.core import (
    Described,
    HookFn,
    LoraLens,
    Prompts,
    alone,
    attached,
    long_table,
)
from lens_lora.core.function.activations import sinks_among
from lens_lora.core.function.forward import read_logits, require_finite
from lens_lora.core.function.interventions import record
from lens_lora.core.model.sites import firing, known_point
from lens_lora.core.readout.prompts import decoded, require_context
from lens_lora.core.results.tokens import ranked_tokens
from lens_lora.directions.alignment import direction_index
from lens_lora.errors import ArgumentError, SiteError
from lens_lora.formats.directions import directions_of, is_stream
from lens_lora.hidden.stream_reading import over_scale, read_through

IDENTITY = "cat -> cat; 135 -> 135; hello -> hello; ? ->"
_DEFAULT_SCALES = (0.5, 1.0, 2.0, 4.0)


@final
class Patchscope(Described):
    """What the model goes on with when a vector stands in the place of a token.

    Attributes:
        ids: [direction, scale, rank], the likeliest next tokens.
        probabilities: theirs.
        plain: [vocab], the probabilities of the next token with nothing put in place.
        continuations: by direction and scale, the likeliest tokens one after another.
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
        k = whole("k", k, 0)
        rows = [
            (label, scale, [self.strings[i] for i in self.ids[d, s, :k].tolist()], text[s])
            for d, (label, text) in enumerate(zip(self.directions, self.continuations, strict=True))
            for s, scale in enumerate(self.scales)
        ]
        return pd.DataFrame(rows, columns=["direction", "scale", "tokens", "continuation"])

    def logit_lens(
        self, k: int = 10, direction: str | None = None, *, largest: bool = True
    ) -> pd.DataFrame:
        """The k tokens that a vector reads as, with the layers after the point left out.

        It alone goes through the final norm, by its own size, and the unembedding; no bias counts.

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
        axes = {"direction": self.directions}, {"scale": self.scales}
        ranks = {"rank": range(1, self.ids.shape[2] + 1)}
        numbers = {"probability": self.probabilities, "unpatched": self.plain[self.ids]}
        table = long_table(numbers, *axes, ranks)
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
    """What the model calls a vector: put in the place of one token's h, at several sizes.

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
    k, most = whole("k", k, 1), whole("max_new_tokens", max_new_tokens, 1)
    if not is_stream(known_point(lens, name)):
        raise SiteError(
            f"{name} does not hold the residual stream, in which a token's whole h can be "
            "replaced; name a point such as 'blocks.3.hook_resid_post'."
        )
    sizes, gate = numbers_of("scales", scales), lens.gates(number("at", at))
    if not sizes:
        raise ArgumentError("scales=[]; give at least one size.")
    source = directions_of(vector, name).at(name, int(lens.model.cfg.d_model))
    unit = source.unit(centred=lens.plan.host.centres_stream)
    if not isinstance(prompt, str):
        raise ArgumentError(f"prompt={prompt!r}: expected one text that holds the placeholder.")
    row = lens.prompts(prompt)
    said = lens.str_tokens(row)[0]
    place = _place(said, placeholder)
    seen = record(lens, row, gate, [name]).firings
    firing(lens, seen, [name], [name])
    norms = seen[name][-1].cpu().double().norm(dim=-1)
    sinks = sinks_among([norms], row.real.cpu())[0].tolist()
    others = [i for i in range(1, len(said)) if i != place and not sinks[i]] or [place]
    size = float(norms[0, others].mean())
    vectors = (unit[:, None] * torch.tensor(sizes, dtype=unit.dtype)[:, None]).flatten(0, 1) * size
    require_context(lens.model, len(said) + most - 1, "the prompt with its continuation")

    hooks: list[tuple[str, HookFn]] = [
        (name, lambda h, hook: h.select_scatter(vectors.to(h), 1, place))
    ]
    with torch.no_grad(), lens.adapted(gate):
        plain = read_logits(lens, row)[0].softmax(-1)
        with attached(lens.model, hooks):
            logits, tokens = _continued(lens, row, len(vectors), most)
    require_finite(logits, "a logit")
    p = logits.softmax(-1)
    best = p.topk(min(k, p.shape[-1]))
    shape = len(unit), len(sizes), -1
    return Patchscope(
        ids=best.indices.view(shape),
        probabilities=best.values.view(shape),
        plain=plain,
        readings=read_through(lens, over_scale(lens, unit * size, unit * size)),
        continuations=tuple(
            tuple(decoded(lens.model, ids) for ids in by_scale)
            for by_scale in tokens.view(shape).tolist()
        ),
        strings=lens.vocabulary,
        directions=source.names,
        scales=tuple(sizes),
        size=size,
        name=name,
        prompt=tuple(said),
        position=place,
        at=number("at", at),
        meta=lens.describe(row),
    )


def _place(tokens: Sequence[str], placeholder: str) -> int:
    """The position of the last token that contains the placeholder."""
    places = [i for i, token in enumerate(tokens) if placeholder in token]
    if not places or not places[-1]:
        raise ArgumentError(
            f"placeholder={placeholder!r}: none of the tokens {list(tokens)} after the first "
            "contains it; the vector takes the place of that token."
        )
    return places[-1]


def _continued(
    lens: LoraLens, row: Prompts, count: int, most: int
) -> tuple[Float[Tensor, "row vocab"], Int[Tensor, "row new"]]:
    """The first next token's logits of so many copies of a row, and the likeliest tokens."""
    tokens, logits = row.tokens.repeat(count, 1), list[Tensor]()
    for step in range(most):
        logits.append(read_logits(lens, Prompts(tokens, row.lengths.repeat(count) + step)))
        tokens = torch.cat([tokens, logits[-1].argmax(-1)[:, None].to(tokens)], 1)
    return logits[0], tokens[:, -most:]
