"""Tangents J δz of the logits, by passes of dual numbers through the hooks.

    site or part p:   output_l ← output_l + d·(p's part of δ_l(z)),   d dual with derivative 1
    all together:     every gate is the dual number at_l + direction_l·d

1. Each pass runs within `dual_forward` (`function/duals.py`).
2. `joint_tangent`: all sites along one direction of gates, in one row a prompt.
3. `part_tangents`: each site, position, head or rank has its own tangent, in its own row. Before
   its block a part has no tangent, and its row would only repeat the base. So a pass starts with
   one row, without a tangent; at each block's input rows are added for that block's parts, as
   copies of the first row. Where a model's batch cannot grow, and for parts of the embeddings,
   every row starts at once.

Cost: one dual forward pass (about 2.5 F) for all together; at most one a part, and about half of
that for every site of a model in turn.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from lens_lora.core.function import forward as function
from lens_lora.core.function import memory, reverse, tree
from lens_lora.core.function.duals import OneProduct, dual_forward, tangent_of
from lens_lora.core.function.memory import tangents_at_once
from lens_lora.core.model import Groups, HookFn, LoraLens
from lens_lora.core.model.injections import ScaleInject
from lens_lora.core.readout import Prompts
from lens_lora.errors import ArgumentError


class JointInject(ScaleInject):
    """Every site's gate is the dual number at_l + direction_l · d. To be made in `dual_forward`."""

    def __init__(
        self, lens: LoraLens, at: Float[Tensor, " site"], direction: Float[Tensor, "*batch site"]
    ) -> None:
        gates = fwad.make_dual(at.expand_as(direction).clone(), direction.clone())
        super().__init__(lens.plan, gates)


def joint_tangent(
    lens: LoraLens, prompts: Prompts, at: Float[Tensor, " site"], direction: Float[Tensor, " site"]
) -> Float[Tensor, "batch *slot vocab"]:
    """Σ_l direction_l ∂f/∂ε_l: the tangent of all sites together. One dual forward pass.

    In groups of prompts, where all of them are beyond the bound of the lens.
    """
    rows = prompts.batch
    fitting = memory.rows_of_duals(lens, prompts) or rows
    tangents: list[Tensor] = []
    for first in range(0, rows, fitting):
        group = prompts.cut(first, min(first + fitting, rows))
        with dual_forward(), lens.injected(JointInject(lens, at, direction)):
            tangent = tangent_of(function.read_logits(lens, group))
        if prompts.reads is not None:  # slots that none of the group has hold nothing
            tangent = functional.pad(tangent, (0, 0, 0, prompts.slots - group.slots))
        tangents.append(tangent)
    return torch.cat(tangents)


_Logits = Float[Tensor, "batch part *slot vocab"]
Read = Callable[[_Logits], Float[Tensor, "batch part *out"]]


@dataclasses.dataclass(frozen=True)
class Part:
    """A direction in gate space: one site, perhaps only one of its positions, heads or ranks.

    Attributes:
        site: its index.
        position, head, expert, rank: the only one that is moved; None for all of them.
        others: sites that are moved with it, none of them in an earlier block.
    """

    site: int
    position: int | None = None
    head: int | None = None
    expert: int | None = None
    rank: int | None = None
    others: tuple[int, ...] = ()


def part_tangents(
    lens: LoraLens,
    prompts: Prompts,
    at: Float[Tensor, " site"],
    parts: Sequence[Part],
    read: Read = tangent_of,
    *,
    final: bool = False,
    progress: bool = True,
) -> Float[Tensor, "batch part *out"]:
    """The tangent of each part: of the logits, or of what `read` computes from the dual logits.

    With `final` nothing is unembedded: `read` gets the final residual stream where it is read. One
    dual forward pass a part, batched in rows; about half of that where the batch can grow.

    Raises:
        ArgumentError: no parts, or less memory than one part takes.
        ModelStateError: the model uses an operation without a forward-mode derivative.
    """
    layers = [lens.sites[part.site].layer for part in parts]
    order = sorted(range(len(parts)), key=layers.__getitem__)
    branching = [j for j in order if lens.host.grows and layers[j] >= 0]
    whole = [j for j in order if j not in set(branching)]
    tangents: Tensor | None = None
    longest = prompts.row(int(prompts.lengths.argmax()))
    passes = _Passes(lens, prompts, at, function.read_final if final else function.read_logits)
    ways = ((whole, passes.in_rows, prompts), (branching, passes.branching, longest))
    with tqdm(total=len(parts), desc="tangents", leave=False, disable=not progress) as bar:
        for indices, run, at_once in ways:
            if not indices:
                continue
            step = tangents_at_once(lens, at_once, read=0 if final else prompts.batch)
            for start in range(0, len(indices), step):
                chunk = indices[start : start + step]
                with dual_forward() as products:
                    values = read(run([parts[j] for j in chunk], products))
                if tangents is None:
                    tangents = values.new_empty(len(values), len(parts), *values.shape[2:])
                tangents[:, chunk] = values
                bar.update(len(chunk))
    if tangents is None:
        raise ArgumentError("parts=[] asks for nothing; give at least one.")
    return tangents


@dataclasses.dataclass(frozen=True)
class _Passes:
    lens: LoraLens
    prompts: Prompts
    gates: Float[Tensor, " site"]
    end: Callable[[LoraLens, Prompts], Tensor]

    def in_rows(self, parts: Sequence[Part], products: OneProduct) -> _Logits:
        """Every part of every prompt in a row of one batch, from the embeddings on."""
        batch, count = self.prompts.batch, len(parts)
        rows = [(b * count + j, part) for b in range(batch) for j, part in enumerate(parts)]
        many = self.prompts.repeat(count)
        inject = _PartsInject(self.lens, self.gates, rows, many.read_positions)
        with self.lens.injected(inject):
            return self.end(self.lens, many).unflatten(0, (batch, count))

    def branching(self, parts: Sequence[Part], products: OneProduct) -> _Logits:
        """One prompt at a time, without its padding; each part's row begins at its block."""
        logits, rows = [], list(enumerate(parts, start=1))
        grow = self._growing(parts, products)
        for prompt in map(self.prompts.row, range(self.prompts.batch)):
            read = prompt.read_positions.expand(len(parts) + 1, -1)
            inject = _PartsInject(self.lens, self.gates, rows, read)
            try:
                with self.lens.injected(inject, before=grow):
                    logits.append(self._widened(self.end(self.lens, prompt)[1:]))
            finally:
                products.rows = 1
        return torch.stack(logits)

    def _widened(self, out: Float[Tensor, "part *own vocab"]) -> Float[Tensor, "part *slot vocab"]:
        """With as many slots as the longest response of the batch; the last one is repeated."""
        if self.prompts.reads is None:
            return out
        slots = torch.arange(self.prompts.slots, device=out.device)
        return out[:, slots.clamp(max=out.shape[1] - 1)]

    def _growing(self, parts: Sequence[Part], products: OneProduct) -> list[tuple[str, HookFn]]:
        """Hooks that append rows for each block's parts; parts must be in the order of blocks."""
        host, hooks = self.lens.host, []
        blocks = [min(self.lens.sites[part.site].layer, host.n_layers - 1) for part in parts]

        def tell(tensor: Tensor, hook: Any) -> None:
            products.rows = len(tensor)  # all of which have the same primal

        for layer in sorted(set(blocks)):
            hooks.append((host.block_input(layer), tree.more_copies(blocks.count(layer))))
            if host.keeps_rows:
                hooks.append((host.block_input(layer), tell))
        return hooks


class _PartsInject:
    """Some rows have the tangent of one part each; every row runs at the gates `at`."""

    def __init__(
        self,
        lens: LoraLens,
        at: Float[Tensor, " site"],
        rows: Sequence[tuple[int, Part]],
        read: Int[Tensor, "row slot"],
    ) -> None:
        self._scaled, self._at, self._lens = ScaleInject(lens.plan, at), at.tolist(), lens
        by_site: dict[int, list[tuple[int, Part]]] = {}
        for row, part in rows:
            for site in (part.site, *part.others):
                by_site.setdefault(site, []).append((row, part))
        self._rows = {site: self._gather(site, moved, read) for site, moved in by_site.items()}

    def _gather(
        self, site: int, moved: Sequence[tuple[int, Part]], read: Int[Tensor, "row slot"]
    ) -> tuple[Int[Tensor, " part"], reverse.Slots]:
        device = self._lens.maps[site].device
        rows = torch.tensor([row for row, _ in moved], device=device)
        position = _slot([part.position for _, part in moved], device)
        if position is not None and self._lens.sites[site].kind == "unembed":
            same = read.to(device)[rows] == position[:, None]
            slot = torch.where(same.any(1), same.int().argmax(1), -2)
            position = torch.where(position == -1, -1, slot)
        others = ([getattr(part, axis) for _, part in moved] for axis in ("head", "expert", "rank"))
        return rows, reverse.Slots(position, *(_slot(slots, device) for slots in others))

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        moved = self._scaled(index, out, z)
        injection = self._lens.plan.injections[index]
        weight = 1.0 if injection.partner is None else self._at[injection.partner]
        if injection.site not in self._rows or not weight:
            return moved
        rows, slots = self._rows[injection.site]
        split = injection.map if slots.position is None else injection.map_by_position
        if split is None:
            return moved
        kind = self._lens.sites[injection.site].kind
        primal = fwad.unpack_dual(z).primal[rows]
        delta = reverse.part_deltas(split, kind, self._lens.heads.of(kind), primal, slots)
        tangent = out.new_zeros(*out.shape[:2], delta.shape[-1])
        tangent[rows] = (weight * delta).to(out.dtype)
        moved = out if moved is None else moved
        return moved + fwad.make_dual(torch.zeros_like(out), tangent.view(out.shape))


def _slot(kept: Sequence[int | None], device: torch.device) -> Int[Tensor, " part"] | None:
    """The slot that each part keeps, −1 for all; None where every part keeps all."""
    if all(slot is None for slot in kept):
        return None
    return torch.tensor([-1 if slot is None else slot for slot in kept], device=device)


def group_parts(lens: LoraLens, groups: Groups) -> list[Part]:
    """The direction in gate space of each group of sites: all together, Σ_{l in G} ∂/∂ε_l."""
    ordered = (sorted(group, key=lambda i: lens.sites[i].layer) for group in groups.values())
    return [Part(first, others=tuple(rest)) for first, *rest in ordered]


def all_parts(lens: LoraLens, prompts: Prompts, axes: tuple[str, ...]) -> list[Part]:
    """Every part of every site."""
    parts = []
    for index, site in enumerate(lens.sites):
        heads, by_head = lens.heads.of(site.kind), lens.maps[index].a0_by_head
        ranges = {
            "position": range(prompts.tokens.shape[1]),
            # One slot more where a bias belongs to none of the heads.
            "head": range(heads if by_head is None else len(by_head)) if heads else [None],
            "expert": range(site.experts) if site.experts else [None],
            "rank": range(site.rank),
        }
        options = [slots if axis in axes else [None] for axis, slots in ranges.items()]
        parts += [Part(index, p, h, e, r) for p, h, e, r in itertools.product(*options)]
    return parts
