"""Forward mode: tangents J δz by dual numbers through the hooks, for any readout of the logits.

    site or part p:   output_l ← output_l + d·(p's part of δ_l(z)),   d dual with derivative 1
    all together:     every gate is the dual number at_l + direction_l·d

1. Each pass runs within `dual_forward` (engine/dual_pass.py).
2. `joint_tangent`: all sites along one direction of gates, in one row a prompt.
3. `part_tangents`: each site, position, head or rank has its own tangent, in its own row. Before
   its block a part has no tangent, and its row would only repeat the base. So a pass starts with
   one row, without a tangent; at each block's input rows are added for that block's parts, as
   copies of the first row (`engine/branching.py`).
4. Where a model's batch cannot grow, and for parts of the embeddings, every row starts at once.

Cost: one dual forward pass (about 2.5 F) for all together; at most one a part, and about half of
that for every site of a model in turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from lens_lora.engine.batching import tangents_at_once
from lens_lora.engine.branching import more_copies
from lens_lora.engine.dual_pass import dual_forward, tangent_of
from lens_lora.engine.duals import OneProduct
from lens_lora.engine.parts import Slots, part_deltas
from lens_lora.engine.read import read_final, read_logits
from lens_lora.errors import ArgumentError
from lens_lora.hooked.attaching import HookFn
from lens_lora.hooked.gates import ScaleInject, add, weight_of
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts

__all__ = [
    "JointInject",
    "Part",
    "joint_tangent",
    "part_tangents",
]


class JointInject:
    """Every site's gate is the dual number at_l + direction_l · d.

    Args:
        lens: the adapter over the model.
        at: the gates' values.
        direction: their derivatives.
    """

    def __init__(
        self, lens: LoraLens, at: Float[Tensor, "site"], direction: Float[Tensor, "*batch site"]
    ) -> None:
        self._injections, self._at, self._direction = lens.plan.injections, at, direction

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor:
        """out + (at_l + direction_l·d) δ_l(z), as a dual number.

        Args:
            index: of the injection.
            out: the running output.
            z: the site's input.
        """
        at = self._at.expand_as(self._direction).clone()
        gates = fwad.make_dual(at, self._direction.clone())
        injection = self._injections[index]
        return add(out, injection.map, z, weight_of(injection, gates))


def joint_tangent(
    lens: LoraLens, prompts: Prompts, at: Float[Tensor, "site"], direction: Float[Tensor, "site"]
) -> Float[Tensor, "batch *slot vocab"]:
    """Σ_l direction_l ∂f/∂ε_l: the tangent of all sites together. One dual forward pass.

    Raises:
        ModelStateError: the model uses an operation without a forward-mode derivative.
    """
    with dual_forward(), lens.injected(JointInject(lens, at, direction)):
        return tangent_of(read_logits(lens, prompts))


_Logits = Float[Tensor, "batch part *slot vocab"]
_End = Callable[[LoraLens, Prompts], Tensor]
Read = Callable[[_Logits], Float[Tensor, "batch part *out"]]


@dataclasses.dataclass(frozen=True)
class Part:
    """A direction in gate space: one site, perhaps only one of its positions, heads or ranks.

    Attributes:
        site: its index.
        position, head, rank: the only one that is moved; None for all of them.
        others: sites that are moved with it, none of them in an earlier block.
    """

    site: int
    position: int | None = None
    head: int | None = None
    rank: int | None = None
    others: tuple[int, ...] = ()


def part_tangents(
    lens: LoraLens,
    prompts: Prompts,
    at: Float[Tensor, "site"],
    parts: Sequence[Part],
    read: Read = tangent_of,
    *,
    final: bool = False,
    progress: bool = True,
) -> Float[Tensor, "batch part *out"]:
    """The tangent of each part: of the logits, or of what `read` computes from the dual logits.

    One dual forward pass a part, batched in rows; about half of that where the batch can grow.

    Args:
        lens: the adapter over the model.
        prompts: what is run.
        at: the gates at which the tangents are taken.
        parts: at least one.
        read: what is kept of the dual logits, [batch, part, vocab].
        final: nothing is unembedded; what is read is the final residual stream at the slots.
        progress: show a bar.

    Raises:
        ArgumentError: no parts, or less memory than one part takes.
        ModelStateError: the model uses an operation without a forward-mode derivative.
    """
    order = sorted(range(len(parts)), key=lambda j: lens.sites[parts[j].site].layer)
    branching, whole = [], []
    for j in order:
        starts_in_block = lens.plan.host.grows and lens.sites[parts[j].site].layer >= 0
        (branching if starts_in_block else whole).append(j)
    found: Tensor | None = None
    longest = prompts.row(int(prompts.lengths.argmax()))
    end = read_final if final else read_logits
    ways = ((whole, _in_rows, prompts), (branching, _branching, longest))
    with tqdm(total=len(parts), desc="tangents", leave=False, disable=not progress) as bar:
        for some, run, at_once in ways:
            if not some:
                continue
            step = tangents_at_once(lens, at_once, read=0 if final else prompts.batch)
            for start in range(0, len(some), step):
                chunk = some[start : start + step]
                with dual_forward() as products:
                    rows = run(lens, prompts, at, [parts[j] for j in chunk], products, end)
                    tangents = read(rows)
                if found is None:
                    found = tangents.new_empty(len(tangents), len(parts), *tangents.shape[2:])
                found[:, chunk] = tangents
                bar.update(len(chunk))
    if found is None:
        raise ArgumentError("parts=[] asks for nothing; give at least one.")
    return found


def _in_rows(
    lens: LoraLens,
    prompts: Prompts,
    at: Float[Tensor, "site"],
    parts: Sequence[Part],
    products: OneProduct,
    end: _End,
) -> _Logits:
    """Every part of every prompt in a row of one batch, from the embeddings on."""
    del products
    rows = [(b * len(parts) + j, p) for b in range(prompts.batch) for j, p in enumerate(parts)]
    many = prompts.repeat(len(parts))
    with lens.injected(_PartsInject(lens, at, rows, many.read_positions)):
        return end(lens, many).unflatten(0, (prompts.batch, len(parts)))


def _branching(
    lens: LoraLens,
    prompts: Prompts,
    at: Float[Tensor, "site"],
    parts: Sequence[Part],
    products: OneProduct,
    end: _End,
) -> _Logits:
    """One prompt at a time, without its padding; each part's row begins at its block."""
    found = []
    rows, grow = list(enumerate(parts, start=1)), _growing(lens, parts, products)
    for one in map(prompts.row, range(prompts.batch)):
        read = one.read_positions.expand(len(parts) + 1, -1)
        inject = _PartsInject(lens, at, rows, read)
        try:
            with lens.injected(inject, before=grow):
                logits = end(lens, one)[1:]
                found.append(logits if one.reads is None else _widened(logits, prompts.slots))
        finally:
            products.rows = 1
    return torch.stack(found)


def _widened(
    logits: Float[Tensor, "part own vocab"], slots: int
) -> Float[Tensor, "part slot vocab"]:
    """With as many slots as the longest response of the batch; the last one is repeated."""
    own = torch.arange(slots, device=logits.device).clamp(max=logits.shape[1] - 1)
    return logits[:, own]


def _growing(
    lens: LoraLens, parts: Sequence[Part], products: OneProduct
) -> list[tuple[str, HookFn]]:
    """Hooks that append rows for each block's parts; parts must be in the order of blocks."""
    view, hooks = lens.plan.host, []
    last = view.n_layers - 1
    blocks = [min(lens.sites[part.site].layer, last) for part in parts]
    for layer in sorted(set(blocks)):
        hooks.append((view.block_input(layer), more_copies(blocks.count(layer))))
        if view.keeps_rows:
            hooks.append((view.block_input(layer), _told(products)))
    return hooks


def _told(products: OneProduct) -> HookFn:
    """A hook that reports the number of rows, all of which have the same primal."""

    def tell(tensor: Tensor, hook: Any) -> None:
        del hook
        products.rows = len(tensor)

    return tell


class _PartsInject:
    """Some rows have the tangent of one part each; every row runs at the gates `at`."""

    def __init__(
        self,
        lens: LoraLens,
        at: Float[Tensor, "site"],
        rows: Sequence[tuple[int, Part]],
        read: Int[Tensor, "row slot"],
    ) -> None:
        self._scaled, self._at, self._lens = ScaleInject(lens.plan, at), at.tolist(), lens
        by_site: dict[int, list[tuple[int, Part]]] = {}
        for row, part in rows:
            for site in (part.site, *part.others):
                by_site.setdefault(site, []).append((row, part))
        self._rows = {site: self._gather(site, own, read) for site, own in by_site.items()}

    def _gather(
        self, site: int, own: Sequence[tuple[int, Part]], read: Int[Tensor, "row slot"]
    ) -> tuple[Int[Tensor, "part"], Slots]:
        device = self._lens.maps[site].device
        rows = torch.tensor([row for row, _ in own], device=device)
        position = _slot([part.position for _, part in own], device)
        if position is not None and self._lens.sites[site].kind == "unembed":
            same = read.to(device)[rows] == position[:, None]
            slot = torch.where(same.any(1), same.int().argmax(1), -2)
            position = torch.where(position == -1, -1, slot)
        head, rank = ([getattr(part, axis) for _, part in own] for axis in ("head", "rank"))
        return rows, Slots(position, _slot(head, device), _slot(rank, device))

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
        delta = part_deltas(split, kind, self._lens.heads.of(kind), primal, slots)
        tangent = out.new_zeros(*out.shape[:2], delta.shape[-1])
        tangent[rows] = (weight * delta).to(out.dtype)
        moved = out if moved is None else moved
        return moved + fwad.make_dual(torch.zeros_like(out), tangent.view(out.shape))


def _slot(kept: Sequence[int | None], device: torch.device) -> Int[Tensor, "part"] | None:
    """The slot that each part keeps, −1 for all; None where every part keeps all."""
    if all(slot is None for slot in kept):
        return None
    return torch.tensor([-1 if slot is None else slot for slot in kept], device=device)
