"""Tangents J δz of the logits, by passes of dual numbers through the hooks.

    site or part p:   output_l ← output_l + d·(p's part of δ_l(z)),   d dual with derivative 1
    all together:     every gate is the dual number at_l + direction_l·d

1. Each pass runs within `dual_forward` (`duals.py`).
2. `joint_tangent`: all sites along one direction of gates, in one row a prompt.
3. `part_tangents`: each site, position, head or rank has its own tangent, in its own row. Before
   its block a part has no tangent, and its row would only repeat the base. So a pass starts with
   one row, without a tangent; at each block's input rows are added for that block's parts, as
   copies of the first row. Where a model's batch cannot grow, and for parts of the embeddings,
   every row starts at once.
4. `tangents_along`: any directions of gates. Directions of ones and zeros are parts; others have a
   row each, from the start.

Cost: one dual forward pass (about 2.5 F) for all together; at most one a part, and about half of
that for every site of a model in turn.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from lens_lora.core.function import forward, memory, tree
from lens_lora.core.function.contraction import HeadedMap, Slots, part_deltas
from lens_lora.core.function.duals import OneProduct, dual_forward, tangent_of
from lens_lora.core.model import Groups, HookFn, LoraLens
from lens_lora.core.model.injections import ScaleInject
from lens_lora.core.readout import Prompts
from lens_lora.errors import ArgumentError

_Logits = Float[Tensor, "batch part *slot vocab"]
Read = Callable[[_Logits], Float[Tensor, "batch part *out"]]
# The slot of a position at which nothing is read: no slot is equal to it.
_NO_SLOT = -2


@dataclasses.dataclass(frozen=True)
class ExpansionPoint:
    """Where the logits are expanded in the gates: the rows, and the gates of all of them.

    Attributes:
        lens: the adapter over the model.
        rows: what is run.
        gates: the gates at which tangents are taken.
    """

    lens: LoraLens
    rows: Prompts
    gates: Float[Tensor, " site"]


# --- Along directions of the gates


class JointInject(ScaleInject):
    """Every site's gate is the dual number at_l + direction_l · d. To be made in `dual_forward`."""

    def __init__(
        self, lens: LoraLens, at: Float[Tensor, " site"], direction: Float[Tensor, "*batch site"]
    ) -> None:
        gates = fwad.make_dual(at.expand_as(direction).clone(), direction.clone())
        super().__init__(lens.plan, gates)


def joint_tangent(
    point: ExpansionPoint, direction: Float[Tensor, " site"]
) -> Float[Tensor, "batch *slot vocab"]:
    """Σ_l direction_l ∂f/∂ε_l: the tangent of all sites together. One dual forward pass.

    In groups of prompts, where all of them are beyond the bound of the lens.
    """
    lens = point.lens
    rows = point.rows
    rows_at_once = memory.rows_of_duals(lens, rows) or rows.batch
    tangents: list[Tensor] = []
    for first in range(0, rows.batch, rows_at_once):
        group = rows.cut(first, min(first + rows_at_once, rows.batch))
        with dual_forward(), lens.injected(JointInject(lens, point.gates, direction)):
            tangent = tangent_of(forward.read_logits(lens, group))
        if rows.reads is not None:
            # Zeros for slots that no prompt of the group has.
            missing_slots = rows.slots - group.slots
            tangent = functional.pad(tangent, (0, 0, 0, missing_slots))
        tangents.append(tangent)
    return torch.cat(tangents)


def tangents_along(
    point: ExpansionPoint,
    directions: Float[Tensor, "direction site"],
    read: Callable[[Tensor], Tensor] | None,
    *,
    progress: bool,
) -> Float[Tensor, "direction row *out"]:
    """Σ_l v_l ∂f/∂ε_l along each direction v.

    Args:
        point: where the derivative is taken.
        directions: the v.
        read: what is kept of the tangents of some directions, [row, direction, *slot, vocab]; None
            for all of them.
        progress: show a bar.

    Raises:
        ModelStateError: the model has an operation without a forward-mode derivative.
    """
    keep = read or _as_it_is
    if len(directions) == 1:
        tangent = joint_tangent(point, directions[0])
        by_row = keep(tangent[:, None])
    elif _are_groups(directions):
        groups = {str(i): _members(direction) for i, direction in enumerate(directions)}

        def read_dual(logits: Tensor) -> Tensor:
            return keep(tangent_of(logits))

        parts = group_parts(point.lens, groups)
        by_row = part_tangents(point, parts, read_dual, progress=progress)
    else:
        rows = point.rows
        directions_at_once = memory.tangents_at_once(point.lens, rows, read=rows.batch)
        chunks: list[Tensor] = []
        for some_directions in directions.split(directions_at_once):
            tangents = _of_each_direction(point, some_directions)
            chunks.append(keep(tangents))
        by_row = torch.cat(chunks, 1)
    return by_row.movedim(1, 0)


def _are_groups(directions: Float[Tensor, "direction site"]) -> bool:
    """Whether every direction is a group of sites: ones and zeros, and not only zeros."""
    is_switch = (directions == 0) | (directions == 1)
    return bool(is_switch.all() & directions.any(1).all())


def _members(direction: Float[Tensor, " site"]) -> tuple[int, ...]:
    return tuple(direction.nonzero()[:, 0].tolist())


def _of_each_direction(
    point: ExpansionPoint, directions: Float[Tensor, "direction site"]
) -> Float[Tensor, "row direction *slot vocab"]:
    """Run every row once for each direction, in one dual forward pass."""
    lens = point.lens
    many = point.rows.repeat(len(directions))
    direction_of_row = directions.repeat(point.rows.batch, 1)
    with dual_forward(), lens.injected(JointInject(lens, point.gates, direction_of_row)):
        tangents = tangent_of(forward.read_logits(lens, many))
    return tangents.unflatten(0, (point.rows.batch, len(directions)))


def _as_it_is(tangents: Tensor) -> Tensor:
    return tangents


# --- Tangents of single sites and their parts


@dataclasses.dataclass(frozen=True)
class Part:
    """A direction in gate space: one site, or one of its positions, heads, experts or ranks.

    Attributes:
        site: the index of the site.
        position, head, expert, rank: the single one that is moved; None for all of them.
        others: sites that are moved together with it, none of them in an earlier block.
    """

    site: int
    position: int | None = None
    head: int | None = None
    expert: int | None = None
    rank: int | None = None
    others: tuple[int, ...] = ()


def group_parts(lens: LoraLens, groups: Groups) -> list[Part]:
    """The direction in gate space of each group of sites, Σ_{l in G} ∂/∂ε_l."""
    parts: list[Part] = []
    for group in groups.values():
        first, *others = sorted(group, key=lambda site: lens.sites[site].layer)
        parts.append(Part(first, others=tuple(others)))
    return parts


def all_parts(lens: LoraLens, prompts: Prompts, axes: tuple[str, ...]) -> list[Part]:
    """List every part of every site along these axes."""
    parts: list[Part] = []
    for index, site in enumerate(lens.sites):
        sizes = {
            "position": prompts.tokens.shape[1],
            "head": _head_slots(lens, index),
            "expert": site.experts,
            "rank": site.rank,
        }
        slots: list[Sequence[int | None]] = []
        for axis, size in sizes.items():
            if axis in axes and size > 0:
                slots.append(range(size))
            else:
                # One part has all slots of this axis.
                slots.append([None])
        for position, head, expert, rank in itertools.product(*slots):
            parts.append(Part(index, position=position, head=head, expert=expert, rank=rank))
    return parts


def _head_slots(lens: LoraLens, index: int) -> int:
    """The number of slots of a site's heads, with one more where a bias belongs to no head."""
    heads = lens.heads.of(lens.sites[index].kind)
    a0_by_head = lens.maps[index].a0_by_head
    if heads and a0_by_head is not None:
        return len(a0_by_head)
    return heads


def part_tangents(
    point: ExpansionPoint,
    parts: Sequence[Part],
    read: Read = tangent_of,
    *,
    final: bool = False,
    progress: bool = True,
) -> Float[Tensor, "batch part *out"]:
    """The tangent of each part: of the logits, or of what `read` computes from the dual logits.

    With `final` nothing is unembedded: `read` gets the final residual stream where it is read. It
    takes one dual forward pass a part, batched in rows, or about half of that if the batch can
    grow.

    Raises:
        ArgumentError: no parts, or less memory than one part takes.
        ModelStateError: the model uses an operation without a forward-mode derivative.
    """
    if not parts:
        raise ArgumentError("parts=[] asks for nothing; give at least one.")
    if final:
        passes = _Passes(point, end=forward.read_final, unembedded=0)
    else:
        passes = _Passes(point, end=forward.read_logits, unembedded=point.rows.batch)
    tangents: Tensor | None = None
    with tqdm(total=len(parts), desc="tangents", leave=False, disable=not progress) as bar:
        for one_pass in passes.over(parts):
            some = [parts[index] for index in one_pass.indices]
            with dual_forward() as products:
                values = read(one_pass.run(some, products))
            if tangents is None:
                tangents = values.new_empty(len(values), len(parts), *values.shape[2:])
            tangents[:, one_pass.indices] = values
            bar.update(len(some))
    assert tangents is not None, "there are parts"
    return tangents


class _OnePass(NamedTuple):
    """The parts that are run in one dual forward pass.

    Attributes:
        indices: the indices of these among all parts.
        run: computes the dual logits (or residual stream) of these parts.
    """

    indices: list[int]
    run: Callable[[Sequence[Part], OneProduct], _Logits]


@dataclasses.dataclass(frozen=True)
class _Passes:
    """Dual forward passes in which each part of some sites has a row of its own.

    Attributes:
        point: where the derivative is taken.
        end: what a pass ends with: the logits, or the final residual stream.
        unembedded: the number of prompts whose logits are computed.
    """

    point: ExpansionPoint
    end: Callable[[LoraLens, Prompts], Tensor]
    unembedded: int

    def over(self, parts: Sequence[Part]) -> Iterator[_OnePass]:
        """Divide all parts into passes, in the order of their blocks."""
        lens = self.point.lens
        rows = self.point.rows
        layers = [lens.sites[part.site].layer for part in parts]
        in_order = sorted(range(len(parts)), key=layers.__getitem__)
        # Parts of the embeddings have no block at whose input a row could begin.
        branches = [lens.host.grows and layer >= 0 for layer in layers]
        whole = [index for index in in_order if not branches[index]]
        branching = [index for index in in_order if branches[index]]
        if whole:
            parts_at_once = memory.tangents_at_once(lens, rows, read=self.unembedded)
            for start in range(0, len(whole), parts_at_once):
                yield _OnePass(whole[start : start + parts_at_once], self.in_rows)
        if branching:
            longest = rows.row(int(rows.lengths.argmax()))
            parts_at_once = memory.tangents_at_once(lens, longest, read=self.unembedded)
            for start in range(0, len(branching), parts_at_once):
                yield _OnePass(branching[start : start + parts_at_once], self.branching)

    def in_rows(self, parts: Sequence[Part], products: OneProduct) -> _Logits:
        """Run one batch with a row for every part of every prompt, from the embeddings on."""
        del products  # Rows have different primals from the start.
        lens = self.point.lens
        batch = self.point.rows.batch
        part_of_row: list[tuple[int, Part]] = []
        for prompt in range(batch):
            first = prompt * len(parts)
            part_of_row += enumerate(parts, start=first)
        many = self.point.rows.repeat(len(parts))
        inject = _PartsInject(lens, self.point.gates, part_of_row, many.read_positions)
        with lens.injected(inject):
            ends = self.end(lens, many)
        return ends.unflatten(0, (batch, len(parts)))

    def branching(self, parts: Sequence[Part], products: OneProduct) -> _Logits:
        """Run each prompt alone, without padding; the row of each part begins at its block."""
        lens = self.point.lens
        part_of_row = list(enumerate(parts, start=1))  # The first row has no tangent.
        grow = self._growing(parts, products)
        ends: list[Tensor] = []
        for index in range(self.point.rows.batch):
            prompt = self.point.rows.row(index)
            read_positions = prompt.read_positions.expand(len(parts) + 1, -1)
            inject = _PartsInject(lens, self.point.gates, part_of_row, read_positions)
            try:
                with lens.injected(inject, before=grow):
                    end = self.end(lens, prompt)
            finally:
                products.rows = 1
            without_first = end[1:]
            ends.append(self._widened(without_first))
        return torch.stack(ends)

    def _widened(self, out: Float[Tensor, "part *own vocab"]) -> Float[Tensor, "part *slot vocab"]:
        """Repeat the last slot up to as many slots as the longest response of the batch has."""
        if self.point.rows.reads is None:
            return out
        slots = torch.arange(self.point.rows.slots, device=out.device)
        return out[:, slots.clamp(max=out.shape[1] - 1)]

    def _growing(self, parts: Sequence[Part], products: OneProduct) -> list[tuple[str, HookFn]]:
        """Hooks that append rows for each block's parts; parts must be in the order of blocks."""
        host = self.point.lens.host
        sites = self.point.lens.sites
        blocks = [min(sites[part.site].layer, host.n_layers - 1) for part in parts]

        def tell_rows(tensor: Tensor, hook: Any) -> None:
            del hook
            products.rows = len(tensor)  # All of them have the same primal.

        hooks: list[tuple[str, HookFn]] = []
        for layer in sorted(set(blocks)):
            point = host.block_input(layer)
            hooks.append((point, tree.more_copies(blocks.count(layer))))
            if host.keeps_rows:
                hooks.append((point, tell_rows))
        return hooks


class _MovedRows(NamedTuple):
    """The rows in which a site has a tangent.

    Attributes:
        rows: their indices in the batch.
        slots: the part of the site that each of them keeps.
    """

    rows: Int[Tensor, " part"]
    slots: Slots


class _PartsInject:
    """An inject in which some rows carry the tangent of one part each, at the gates `at`."""

    def __init__(
        self,
        lens: LoraLens,
        at: Float[Tensor, " site"],
        rows: Sequence[tuple[int, Part]],
        read_positions: Int[Tensor, "row slot"],
    ) -> None:
        self._lens = lens
        self._at = at.tolist()
        self._scaled = ScaleInject(lens.plan, at)
        by_site: dict[int, list[tuple[int, Part]]] = {}
        for row, part in rows:
            for site in (part.site, *part.others):
                by_site.setdefault(site, []).append((row, part))
        self._moved: dict[int, _MovedRows] = {}
        for site, parts_of_site in by_site.items():
            self._moved[site] = self._moved_rows(site, parts_of_site, read_positions)

    def _moved_rows(
        self, site: int, moved: Sequence[tuple[int, Part]], read_positions: Int[Tensor, "row slot"]
    ) -> _MovedRows:
        device = self._lens.maps[site].device
        rows = torch.tensor([row for row, _ in moved], device=device)
        parts = [part for _, part in moved]
        position = _slot_of_each([part.position for part in parts], device)
        if position is not None and self._lens.sites[site].kind == "unembed":
            # The unembedding runs at the positions that are read only, so positions become slots.
            is_slot = read_positions.to(device)[rows] == position[:, None]
            is_read = is_slot.any(1)
            slot = torch.where(is_read, is_slot.int().argmax(1), _NO_SLOT)
            position = torch.where(position == -1, -1, slot)
        slots = Slots(
            position=position,
            head=_slot_of_each([part.head for part in parts], device),
            expert=_slot_of_each([part.expert for part in parts], device),
            rank=_slot_of_each([part.rank for part in parts], device),
        )
        return _MovedRows(rows, slots)

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        """Write what the gates say, with the tangents of this site's parts."""
        written = self._scaled(index, out, z)
        injection = self._lens.plan.injections[index]
        # Where δ is multiplied by the gate of another site, so is its tangent.
        weight = 1.0
        if injection.partner is not None:
            weight = self._at[injection.partner]
        if injection.site not in self._moved or weight == 0:
            return written
        rows, slots = self._moved[injection.site]
        site_map = injection.map
        if slots.position is not None:
            site_map = injection.map_by_position
        if site_map is None:
            return written
        kind = self._lens.sites[injection.site].kind
        z_of_rows = fwad.unpack_dual(z).primal[rows]
        delta = part_deltas(HeadedMap.of(self._lens, kind, site_map), z_of_rows, slots)
        tangent = out.new_zeros(*out.shape[:2], delta.shape[-1])
        tangent[rows] = (weight * delta).to(out.dtype)
        if written is None:
            written = out
        return written + fwad.make_dual(torch.zeros_like(out), tangent.view(out.shape))


def _slot_of_each(slots: Sequence[int | None], device: torch.device) -> Int[Tensor, " part"] | None:
    """The slot that each part keeps, with −1 for all; None if every part keeps all."""
    if all(slot is None for slot in slots):
        return None
    numbers: list[int] = []
    for slot in slots:
        numbers.append(-1 if slot is None else slot)
    return torch.tensor(numbers, device=device)
