"""g with the δ of some sites, or of one rank of a site, replaced by something else.

    u_l ← u_l + P(ū_l − u_l)   in rank space, so that δ_l = B_l u_l

1. A whole site: P = 1. A single rank j: P = e_j e_jᵀ, with the rank spaces in the coordinates of
   the SVD of ΔW (`hooked/gauge.py`), so that σ_j v_jᵀx is replaced.
2. ū is what `engine/stand_in.py` found; for zero, ū = 0 at every token.
3. All that follows is live: other sites read the changed residual stream.

4. Points that share their first blocks branch there (`engine/branching.py`).

Cost: a forward pass a point, batched in rows; about half of that where they branch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from lens_lora.engine import branching as tree
from lens_lora.engine.batching import branches_at_once, pass_groups, rows_at_once
from lens_lora.engine.function import require_finite
from lens_lora.engine.read import read_value
from lens_lora.engine.stand_in import StandIn
from lens_lora.errors import ArgumentError
from lens_lora.hooked.gates import weight_of, write
from lens_lora.hooked.norm_map import NormUpdate
from lens_lora.hooked.plan import Injection
from lens_lora.lens import LoraLens
from lens_lora.readouts.rows import Reading

__all__ = ["Points", "replaced_readout", "require_ranks"]

_SLOW = 8


@dataclasses.dataclass(frozen=True)
class Points:
    """What each run does.

    Attributes:
        states: 0 where a site is off, 1 where it is on and the run is not about it, 2 where the run
            is about it, or 2 + j where it is about its rank j.
        of_ranks: whether the runs are about single ranks.
        alone: whether of its site only that rank writes.
        replaced: whether its δ is replaced.
    """

    states: Float[Tensor, "point site"]
    of_ranks: bool
    alone: bool
    replaced: bool

    def __len__(self) -> int:
        return len(self.states)

    def but(self, states: Float[Tensor, "some site"]) -> Points:
        """Runs of the same kind, with other states.

        Args:
            states: of each.
        """
        return dataclasses.replace(self, states=states)


def require_ranks(lens: LoraLens, sites: Sequence[int]) -> None:
    """Refuse sites that have no ranks.

    Args:
        lens: the adapter over the model.
        sites: their indices.

    Raises:
        ArgumentError: a norm.
    """
    for index in sites:
        if isinstance(lens.plan.updates[index].update, NormUpdate):
            raise ArgumentError(
                f"{lens.sites[index].name} is a norm that was trained, whose update has no ranks; "
                "choose other sites (sites=…), or of='site'."
            )


def replaced_readout(
    lens: LoraLens,
    reading: Reading,
    points: Points,
    stand_in: StandIn | None,
    *,
    progress: bool,
    what: str,
) -> Float[Tensor, "batch point"]:
    """g of every prompt in every run. At most a forward pass a point, batched.

    Args:
        lens: the adapter over the model.
        reading: what is run, and read.
        points: the runs.
        stand_in: what replaces; None for zero.
        progress: show a bar.
        what: the bar's name.

    Raises:
        NumericsError: a non-finite readout.
    """
    each = reading.each_row()
    is_tree = each is not None and tree.pays(lens, points.states)
    run = functools.partial(_as_tree, each) if is_tree and each is not None else _in_batches
    count = len(points)
    silent = not progress or count < _SLOW
    with torch.no_grad(), tqdm(total=count, desc=what, leave=False, disable=silent) as bar:
        values = run(lens, reading, points, stand_in, bar)
    require_finite(values, "the readout")
    return values


def _in_batches(
    lens: LoraLens, reading: Reading, points: Points, stand_in: StandIn | None, bar: tqdm
) -> Float[Tensor, "batch point"]:
    """Some prompts at a time, where all of them are too many."""
    found, first = [], 0
    for some in pass_groups(lens, reading):
        rows = torch.arange(first, first := first + len(some.owner))
        found.append(_in_one_batch(lens, some, rows, points, stand_in, bar))
    return torch.cat(found)


def _in_one_batch(
    lens: LoraLens,
    reading: Reading,
    rows: Int[Tensor, "row"],
    points: Points,
    stand_in: StandIn | None,
    bar: tqdm,
) -> Float[Tensor, "batch point"]:
    """Rows r0 r0 … r1 r1 …, one of each row for every point."""
    columns = []
    for states in points.states.split(rows_at_once(lens, reading)):
        many, own = reading.repeat(len(states)), points.but(states.repeat(len(rows), 1))
        row_of = rows.repeat_interleave(len(states))
        with lens.injected(_ReplaceInject(lens, own, row_of, stand_in)):
            columns.append(read_value(lens, many).view(reading.batch, -1))
        bar.update(len(states))
    return torch.cat(columns, 1)


def _as_tree(
    each: Sequence[Reading],
    lens: LoraLens,
    reading: Reading,
    points: Points,
    stand_in: StandIn | None,
    bar: tqdm,
) -> Float[Tensor, "batch point"]:
    """One row of the reading at a time, which branches where the points part."""
    order = tree.neighbours_first(lens, points.states)
    columns = []
    for states in points.states[order].split(branches_at_once(lens, reading)):
        branches, rows = tree.Tree.of(lens, states), []
        for row, one in enumerate(each):
            grown = one.grown(branches.width)

            def inject(own: Tensor, row: int = row) -> _ReplaceInject:
                row_of = torch.full((len(own),), row)
                return _ReplaceInject(lens, points.but(own), row_of, stand_in)

            rows.append(branches.run(lens, lambda grown=grown: read_value(lens, grown), inject))
        columns.append(reading.by_prompt(torch.stack(rows)))
        bar.update(len(states))
    return torch.cat(columns, 1)[:, order.argsort()]


class _ReplaceInject:
    """What each row of a run writes: its point, and the row of the reading that it is of."""

    def __init__(
        self,
        lens: LoraLens,
        points: Points,
        rows: Int[Tensor, "row"],
        stand_in: StandIn | None,
    ) -> None:
        self._lens, self._points, self._rows, self._stand_in = lens, points, rows, stand_in
        self._gates = (points.states > 0).to(lens.gate_dtype)
        self._ranks = (points.states.amax(1) - 2).long()

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        injection = self._lens.plan.injections[index]
        gate = weight_of(injection, self._gates)
        if not bool((gate != 0).any()):
            return None
        u = self._moved(index, injection, injection.map.coordinates(z))
        return write(out, injection.map, u, gate)

    def _moved(self, index: int, injection: Injection, u: Tensor) -> Tensor:
        points, site = self._points, injection.site
        own = (points.states[:, site] >= 2).to(u.device)
        if not bool(own.any()):
            return u
        start = torch.where(_over(own, u), self._part(u), u) if points.alone else u
        if not points.replaced:
            return start
        if self._stand_in is None:
            # Each of two partners adds half of what they add together: all of the rank's is out.
            gap, where = -u if injection.partner is None else -2 * u, own[:, None]
        else:
            of = self._stand_in.u[index]
            gap = (of if len(of) == 1 else of[self._rows.to(of.device), : u.shape[1]]) - u
            head = self._lens.sites[site].kind == "unembed"
            at = self._stand_in.at_slots if head else self._stand_in.at
            where = own[:, None] & at.to(u.device)[self._rows.to(u.device), : u.shape[1]]
        return start + torch.where(_over(where, u), self._part(gap), 0.0)

    def _part(self, u: Tensor) -> Tensor:
        """P u, with each row's own rank."""
        if not self._points.of_ranks:
            return u
        kept = self._ranks.to(u.device)[:, None] == torch.arange(u.shape[-1], device=u.device)
        return u * kept.view(len(kept), *[1] * (u.ndim - 2), -1)


def _over(values: Tensor, u: Tensor) -> Tensor:
    """Of each row, or of each row and token: as wide as u."""
    return values.view(*values.shape, *[1] * (u.ndim - values.ndim))
