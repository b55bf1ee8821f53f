"""Activation patching between the base and the adapted model, at any hook point.

    base to adapted   g(1) − g(1 | h ← h of the base)      what is lost when h is set back
    adapted to base   g(0 | h ← h of the adapted) − g(0)   what h alone brings to the base model

1. The donor runs once; its activations at the named points are kept.
2. The recipient runs once for each patch, as rows of a batch: at one hook point, and one position,
   some of them, or all (`engine/swap.py`).
3. Points without an effect are tried with noise: where that has none either, the model ignores the
   value that a hook leaves there (`engine/ignored.py`), and the call raises an error.

In an adapted recipient the updates stay live: a patch at or before a site's input changes its δ,
and a patch at its output replaces W z + δ, as in a model of the merged weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.analyses.hook_points import Names, few, firing, require_positions, resolved
from lens_lora.arguments import one_entry, whole, word
from lens_lora.engine.asked import ask
from lens_lora.engine.ignored import unheard
from lens_lora.engine.recording import record
from lens_lora.engine.swap import Patch, patched_readout
from lens_lora.errors import ArgumentError, ModelStateError
from lens_lora.hooked.alone import alone
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts, PromptsLike
from lens_lora.readouts.readout import Readout
from lens_lora.readouts.rows import Reading
from lens_lora.results.activation_effects import ActivationEffects
from lens_lora.results.measured import header

__all__ = ["patch_activations"]

Positions = Literal["each"] | int | slice | Sequence[int] | None
Direction = Literal["base_to_adapted", "adapted_to_base"]
_DONOR_AND_RECIPIENT = {"base_to_adapted": (0.0, 1.0), "adapted_to_base": (1.0, 0.0)}
_SMALL, _ROUNDINGS = 1e-3, 64


@alone
def patch_activations(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    names: Names,
    *,
    direction: Direction = "base_to_adapted",
    positions: Positions = None,
    progress: bool = True,
) -> ActivationEffects:
    """What one activation carries of the shift: replaced by the other model's, at each hook point.

    Cost: three forward passes, four for the noise floor, and one per name (and position with
    'each'), batched; rows begin at the block in which they patch, where the model's batch may grow
    (not Bloom and OPT on a Bridge). One short pass more for positions, and one for each name
    without an effect.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        names: a hook point, several, or a predicate. A name in full must fire; globs and
            predicates choose among the points that do.
        direction: 'base_to_adapted', g(1) − g(patched), or 'adapted_to_base', g(patched) − g(0).
        positions: None for the whole sequence at once; 'each' for one number per position; an
            index, a slice, or indices, replaced together. They count within each prompt, negative
            ones from its own end; an answer's tokens, after the prompt, are in None and 'each'.
        progress: show a bar.

    Returns:
        ActivationEffects with values [batch, name], or [batch, name, position] with 'each' (NaN
        where a prompt has no such position), in the readout's units.

    Raises:
        SiteError: a hook point that the model lacks, with the nearest names.
        ModelStateError: a point that never fires, whose value the model ignores, that does not
            hold activations by prompt (and by position, with positions), or that lies between a
            site's input and output, where the adapted model's value does not exist.
        ArgumentError: a position outside a prompt, another direction.
        NumericsError: a non-finite readout.
    """
    donor_scale, scale = _DONOR_AND_RECIPIENT[word("direction", direction, _DONOR_AND_RECIPIENT)]
    positions, asked = _checked(positions), ask(lens, prompts, readout)
    reading = asked.reading
    where = _where(positions, asked.prompts, reading)
    in_full, wanted = resolved(lens, names)
    donor = record(lens, reading.prompts, donor_scale, wanted)
    points = firing(lens, donor, in_full, wanted)
    if positions is not None:
        require_positions(lens, reading.prompts, donor, points, donor_scale)
    patches = [Patch(name, mask) for name in points for mask in where]
    base, adapted = asked.ends
    found = patched_readout(
        lens, reading, donor, patches, donor_scale=donor_scale, scale=scale, progress=progress
    ).unflatten(1, (len(points), -1))
    to_adapted = direction == "base_to_adapted"
    values = adapted[:, None, None] - found if to_adapted else found - base[:, None, None]
    _require_heard(lens, reading.prompts, scale, points, values, asked.ends)
    if positions == "each":
        values = values.masked_fill(~_exists(reading).to(values.device)[:, None], float("nan"))
    return ActivationEffects(
        values=values if positions == "each" else values[..., 0],
        names=points,
        direction=direction,
        positions=_label(positions),
        noise_floor=asked.effect_noise(scale),
        **header(asked),
    )


def _require_heard(
    lens: LoraLens,
    prompts: Prompts,
    scale: float,
    points: Sequence[str],
    values: Float[Tensor, "batch name position"],
    ends: Float[Tensor, "end batch"],
) -> None:
    """Refuse points without an effect at which nothing at all would have one."""
    rounding = _ROUNDINGS * torch.finfo(lens.dtype).eps * float(ends.abs().max())
    least = max(_SMALL * float((ends[1] - ends[0]).abs().max()), rounding)
    largest = values.abs().amax((0, 2)).tolist()
    doubtful = [name for name, size in zip(points, largest, strict=True) if size <= least]
    silent = unheard(lens, prompts.row(0), scale, doubtful) if doubtful else []
    if silent:
        raise ModelStateError(
            f"{few(silent)}: the hook point fires, but the model ignores what a hook makes of its "
            "value, so a patch there says nothing; leave it out."
        )


def _checked(positions: object) -> Positions:
    """An index as a plain int, several as a list of them."""
    index = one_entry(positions)
    if index is None or isinstance(index, slice):
        return index
    if isinstance(index, str):
        word("positions", index, ["each"])
        return "each"
    if isinstance(index, Iterable):
        return [whole("positions", each) for each in index]
    return whole("positions", index)


def _where(
    positions: Positions, prompts: Prompts, reading: Reading
) -> list[Bool[Tensor, "row pos"] | None]:
    """The masks to patch under, one a number.

    Raises:
        ArgumentError: a position outside a prompt, or none.
    """
    if positions is None:
        return [None]
    real = reading.prompts.real.cpu()
    if isinstance(positions, str):
        slots = torch.arange(real.shape[1])
        return [real & (slots == slot) for slot in slots]
    mask = torch.zeros_like(real)
    lengths = prompts.lengths.tolist()
    for row, owner in enumerate(reading.owner.tolist()):
        mask[row, _indices(positions, lengths[owner], owner)] = True
    return [mask]


def _indices(positions: int | slice | Sequence[int], length: int, prompt: int) -> list[int]:
    if isinstance(positions, slice):
        chosen = list(range(*positions.indices(length)))
    else:
        chosen = [positions] if isinstance(positions, int) else list(positions)
    outside = [index for index in chosen if not -length <= index < length]
    if outside or not chosen:
        what = f"no position {outside[0]}" if outside else "no position in this choice"
        raise ArgumentError(
            f"positions={_label(positions)}: prompt {prompt} has {length} tokens and {what}."
        )
    return [index % length for index in chosen]


def _exists(reading: Reading) -> Bool[Tensor, "batch pos"]:
    """Positions that some row of a prompt has."""
    return reading.by_prompt(reading.prompts.real.float()) > 0


def _label(positions: Positions) -> str:
    """'all', 'each', '-1', '2:5', '0, 3'."""
    if positions is None or isinstance(positions, str):
        return positions or "all"
    if isinstance(positions, slice):
        bounds = [positions.start, positions.stop, positions.step]
        bounds = bounds if positions.step is not None else bounds[:2]
        return ":".join("" if b is None else str(b) for b in bounds)
    return ", ".join(str(i) for i in ([positions] if isinstance(positions, int) else positions))
