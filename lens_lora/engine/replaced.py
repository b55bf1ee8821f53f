"""g with the δ of some sites, or of one rank of a site, replaced by something else.

    u_l ← u_l + P(ū_l − u_l)   in rank space, so that δ_l = B_l u_l

1. A whole site: P = 1. A single rank j: P = e_j e_jᵀ, with the rank spaces in the coordinates of
   the SVD of ΔW (`hooked/gauge.py`), so that σ_j v_jᵀx is replaced.
2. ū is what `engine/stand_in.py` found; for zero, ū = 0 at every token.
3. All that follows is live: other sites read the changed residual stream.

Cost: a forward pass a point, batched in rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from lens_lora.engine.batching import rows_at_once
from lens_lora.engine.function import read_value, require_finite
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
        gates: ε.
        sites: which sites the run is about.
        ranks: which rank of its only site a run is about; None for whole sites.
        alone: whether of that site only that rank writes.
        replaced: whether its δ is replaced.
    """

    gates: Float[Tensor, "point site"]
    sites: Bool[Tensor, "point site"]
    ranks: Int[Tensor, "point"] | None
    alone: bool
    replaced: bool

    def __len__(self) -> int:
        return len(self.gates)

    def some(self, first: int, end: int) -> Points:
        """Points first … end − 1.

        Args:
            first: index of the first.
            end: index after the last.
        """
        ranks = None if self.ranks is None else self.ranks[first:end]
        return dataclasses.replace(
            self, gates=self.gates[first:end], sites=self.sites[first:end], ranks=ranks
        )


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
    """g of every prompt in every run. A forward pass a point, batched.

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
    columns, step, count = [], rows_at_once(reading.prompts), len(points)
    silent = not progress or count < _SLOW
    with torch.no_grad(), tqdm(total=count, desc=what, leave=False, disable=silent) as bar:
        for first in range(0, count, step):
            some = points.some(first, first + step)
            many = reading.repeat(len(some))
            with lens.injected(_ReplaceInject(lens, some, len(reading.owner), stand_in)):
                columns.append(read_value(lens, many).view(reading.batch, -1))
            bar.update(len(some))
    values = torch.cat(columns, 1)
    require_finite(values, "the readout")
    return values


class _ReplaceInject:
    """Rows r0 r0 … r1 r1 …, one of each row for every point."""

    def __init__(self, lens: LoraLens, points: Points, rows: int, stand_in: StandIn | None) -> None:
        self._lens, self._points, self._stand_in = lens, points, stand_in
        device = points.gates.device
        self._row = torch.arange(rows, device=device).repeat_interleave(len(points))
        self._point = torch.arange(len(points), device=device).repeat(rows)
        self._gates = points.gates[self._point]

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        injection = self._lens.plan.injections[index]
        gate = weight_of(injection, self._gates)
        if not bool((gate != 0).any()):
            return None
        u = self._moved(index, injection, injection.map.coordinates(z))
        return write(out, injection.map, u, gate)

    def _moved(self, index: int, injection: Injection, u: Tensor) -> Tensor:
        points, site = self._points, injection.site
        own = points.sites[:, site][self._point].to(u.device)
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
            gap = (of if len(of) == 1 else of[self._row.to(of.device)]) - u
            head = self._lens.sites[site].kind == "unembed"
            at = self._stand_in.at_slots if head else self._stand_in.at
            where = own[:, None] & at.to(u.device)[self._row.to(u.device)]
        return start + torch.where(_over(where, u), self._part(gap), 0.0)

    def _part(self, u: Tensor) -> Tensor:
        """P u, with each row's own rank."""
        if self._points.ranks is None:
            return u
        kept = self._points.ranks[self._point].to(u.device)[:, None]
        kept = kept == torch.arange(u.shape[-1], device=u.device)
        return u * kept.view(len(kept), *[1] * (u.ndim - 2), -1)


def _over(values: Tensor, u: Tensor) -> Tensor:
    """Of each row, or of each row and token: as wide as u."""
    return values.view(*values.shape, *[1] * (u.ndim - values.ndim))
