"""Forward mode: ∂g/∂ε_l of every site, position, head and rank, a tangent for each.

The same numbers as `engine/reverse.py`, by the other route, and its check: each part's tangent goes
through the readout (`engine/forward.py`). Where v's constant part is added at o, its parts by
position are compared with the whole site, which takes a tangent more for each such site.

Cost: at most one dual forward pass a part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.engine.dual_pass import tangent_of
from lens_lora.engine.forward import Part, part_tangents
from lens_lora.engine.reverse import part_slots, require_split
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.rows import Reading

__all__ = ["tangent_slopes"]


def tangent_slopes(
    lens: LoraLens,
    reading: Reading,
    gates: Float[Tensor, "site"],
    axes: tuple[str, ...] = (),
    *,
    max_memory: float | None = None,
    progress: bool = True,
) -> Float[Tensor, "batch site *by"]:
    """∂g/∂ε_l at these gates, as `site_slopes` gives it. At most a dual forward pass a part.

    Args:
        lens: the adapter over the model.
        reading: what is run, and read.
        gates: at which the derivative is taken.
        axes: position, head and rank, as far as they are asked for.
        max_memory: bytes that a pass may take beside the model.
        progress: show a bar.

    Raises:
        ArgumentError: less memory than one part takes.
        ModelStateError: an operation without a forward-mode derivative, or a split that does not
            exist.
    """
    prompts = reading.prompts
    shape = (reading.batch, len(lens.sites), *part_slots(lens, prompts, axes))
    values = torch.zeros(shape, dtype=lens.gate_dtype, device=lens.device)
    wanted = _all_parts(lens, prompts, axes)

    def read(rows: Float[Tensor, "row part *slot vocab"]) -> Float[Tensor, "batch part"]:
        many = reading.repeat(rows.shape[1])
        return tangent_of(many.read(rows.flatten(0, 1))).view(reading.batch, -1)

    def tangents(some: Sequence[Part]) -> Float[Tensor, "batch part"]:
        return part_tangents(
            lens, prompts, gates, some, read, max_memory=max_memory, progress=progress
        )

    slots = [[_last_if_none(getattr(part, axis)) for part in wanted] for axis in axes]
    values[(slice(None), [part.site for part in wanted], *slots)] = tangents(wanted)
    whole = [Part(index) for index in lens.plan.with_constants]
    if "position" in axes and whole:
        require_split(lens, values, tangents(whole))
    return values


def _last_if_none(slot: int | None) -> int:
    return -1 if slot is None else slot


def _all_parts(lens: LoraLens, prompts: Prompts, axes: tuple[str, ...]) -> list[Part]:
    found = []
    for index, site in enumerate(lens.sites):
        heads = lens.heads.of(site.kind)
        ranges = {
            "position": range(prompts.tokens.shape[1]),
            "head": range(_head_slots(lens, index)) if heads else [None],
            "rank": range(site.rank),
        }
        options = [
            ranges[axis] if axis in axes else [None] for axis in ("position", "head", "rank")
        ]
        found += [Part(index, p, h, r) for p in options[0] for h in options[1] for r in options[2]]
    return found


def _head_slots(lens: LoraLens, index: int) -> int:
    """The site's heads, and one slot more where a bias belongs to none of them."""
    by_head = lens.maps[index].a0_by_head
    heads = lens.heads.of(lens.sites[index].kind)
    return heads if by_head is None else len(by_head)
