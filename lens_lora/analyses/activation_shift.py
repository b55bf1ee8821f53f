"""Δh = h(1) − h(0): what an adapter changes at any hook point, token by token, exactly.

1. The texts run once in each model, those of like length together; h is kept at the named points.
2. Means leave out sinks: each text's first token, whose h is up to hundreds of times larger and
   whose Δh says little of the others', and tokens whose ‖h(0)‖ is an outlier. The first token's Δh
   is kept apart.
3. At points of the residual stream the mean is read through the final norm and the unembedding, the
   norm's denominator held at the base's (`engine/final_reading.py`).

Cost: two forward passes, and two vectors unembedded for each point.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.analyses.hook_points import Names, firing, require_positions, resolved
from lens_lora.engine.activations import sinks_among
from lens_lora.engine.asked import ask_prompts
from lens_lora.engine.batching import ROW_TOKENS
from lens_lora.engine.final_reading import over_scale, read_through
from lens_lora.engine.function import require_finite
from lens_lora.engine.recording import record
from lens_lora.engine.texts import by_length, first_occurrences
from lens_lora.errors import ArgumentError
from lens_lora.hooked.alone import alone
from lens_lora.lens import LoraLens, Scale
from lens_lora.readouts.prompts import Prompts, PromptsLike
from lens_lora.results.activation_shift import ActivationShift, is_stream
from lens_lora.results.examples import chosen_positions

__all__ = ["activation_shift"]

Positions = int | slice | Sequence[int] | None


@alone
def activation_shift(
    lens: LoraLens,
    texts: PromptsLike,
    names: Names,
    *,
    positions: Positions = None,
    scale: Scale = 1.0,
    sinks: bool = False,
) -> ActivationShift:
    """Δh at hook points, of each token of each text and in the mean. Two forward passes.

    Holds one vector for each hook point and token; name few points for many texts.

    Args:
        lens: the adapter over the model.
        texts: strings, conversations, ids, or `Prompts`.
        names: a hook point, several, globs, or a predicate. A name in full must fire; globs and
            predicates choose among the points that do.
        positions: None for all tokens, or of each text an index, a slice or indices; negative ones
            count from its end, and those beyond a text are not there.
        scale: the gates of h(1), as for `LoraLens.gates`.
        sinks: count sinks in the means too.

    Raises:
        SiteError: a hook point that the model lacks, with the nearest names.
        ModelStateError: a point that never fires, holds no activations by position, or lies between
            a site's input and output.
        ArgumentError: positions at which no text has a token that is counted.
        PromptError: a text that does not fit the model.
        NumericsError: non-finite activations.
    """
    asked = ask_prompts(lens, texts)
    rows = asked.prompts
    wanted_at = _wanted(positions, rows)
    in_full, wanted = resolved(lens, names)
    kept = _Kept(lens, rows)
    for index, some in by_length(rows, ROW_TOKENS):
        base, moved = (record(lens, some, at, wanted) for at in (0.0, scale))
        points = firing(lens, base, in_full, wanted)
        if not kept.values:
            require_positions(lens, some, base, points, 0.0)
        for name in points:
            kept.add(name, index, base.firings[name][-1], moved.firings[name][-1])
    return _result(kept, wanted_at, scale, sinks=sinks)


def _wanted(positions: Positions, rows: Prompts) -> Bool[Tensor, "batch token"]:
    if isinstance(positions, str):
        raise ArgumentError(
            f"positions={positions!r}: expected None, an index, a slice, or indices."
        )
    found = torch.zeros_like(rows.real, device="cpu")
    for text, length in enumerate(rows.lengths.tolist()):
        found[text, :length] = torch.from_numpy(chosen_positions(positions, length, length))
    if not bool(found.any()):
        longest = int(rows.lengths.max())
        raise ArgumentError(
            f"positions={positions!r}: no text has a token there; the longest has {longest}."
        )
    return found


class _Kept:
    """h(0) and Δh of every text by hook point, NaN at padding."""

    def __init__(self, lens: LoraLens, rows: Prompts) -> None:
        self.lens, self.rows = lens, rows
        self.base: dict[str, Float[Tensor, "batch token d"]] = {}
        self.values: dict[str, Float[Tensor, "batch token d"]] = {}

    def add(self, name: str, index: list[int], base: Tensor, moved: Tensor) -> None:
        """Some texts' activations at one point, [text, token, …]; heads are laid flat."""
        real, dtype = self.rows.chosen(index).real.cpu(), self.lens.gate_dtype
        ends = [h.cpu().to(dtype).flatten(2).expand(len(index), -1, -1) for h in (base, moved)]
        for end in ends:
            require_finite(end[real], f"the activation at {name}")
        for held, values in ((self.base, ends[0]), (self.values, ends[1] - ends[0])):
            if name not in held:
                shape = (*self.rows.tokens.shape, values.shape[-1])
                held[name] = torch.full(shape, torch.nan, dtype=dtype)
            own = values.masked_fill(~real[..., None], torch.nan)
            held[name][index, : real.shape[1]] = own


def _result(
    kept: _Kept, wanted: Bool[Tensor, "batch token"], scale: Scale, *, sinks: bool
) -> ActivationShift:
    lens, real = kept.lens, kept.rows.real.cpu()
    sizes = {name: h.norm(dim=-1) for name, h in kept.base.items()}
    found = sinks_among(list(sizes.values()), real) & real
    counted = wanted if sinks else wanted & ~found
    if not bool(counted.any()):
        raise ArgumentError(
            "every token that is asked for is a sink (a text's first token, or one of outlying "
            "size), and sinks are left out of means; ask for other positions, or with sinks=True."
        )
    return ActivationShift(
        values={
            name: shift.masked_fill(~wanted[..., None], torch.nan)
            for name, shift in kept.values.items()
        },
        base_norms=sizes,
        first={name: shift[:, 0].clone() for name, shift in kept.values.items()},
        sinks=found,
        counted=counted,
        distinct=first_occurrences(kept.rows),
        readings={
            name: _reading(lens, kept.values[name], kept.base[name], counted)
            for name in kept.values
            if is_stream(name) and kept.base[name].shape[-1] == lens.model.cfg.d_model
        },
        strings=lens.vocabulary,
        at=f"ε = {scale:g}" if isinstance(scale, int | float) else "gates of the caller",
        str_tokens=tuple(map(tuple, lens.str_tokens(kept.rows))),
        meta=lens.describe(),
    )


def _reading(
    lens: LoraLens, shift: Tensor, base: Tensor, counted: Bool[Tensor, "batch token"]
) -> Float[Tensor, "vocab"]:
    mean = over_scale(lens, shift[counted], base[counted]).double().mean(0)
    return read_through(lens, mean.to(shift)).cpu()
