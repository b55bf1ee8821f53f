"""Contract the base's half of first order with one adapter after another.

    a_l = ⟨G_l, s_l B_l A_l z_l⟩        z_l is what a map reads, G_l = ∂g/∂(its output)

At ε = 0, z and G are those of the base model, whatever the adapter. So they are recorded once
(`banks/record.py`), and first order of an adapter costs no pass:

1. Adapters of plain factors are contracted by matrix products alone, many at once
   (`banks/plain_factors.py`).
2. For any other adapter a lens over the model is made, which is shown the recorded tensors instead
   of a backward pass (`Half.slopes`).
3. Only modules before its point can move a readout inside the model, so the others are first taken
   out of an adapter (`RecordedBase.within_reach`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.banks.plain_factors import (
    Shapes,
    SharedPlan,
    can_share_plan,
    shapes_of,
)
from lens_lora.banks.record import Half, Stacks, TensorPool, record
from lens_lora.core import (
    Adapter,
    Function,
    LoraLens,
    ModuleUpdate,
    Site,
)
from lens_lora.core.model import extensions
from lens_lora.errors import LensLoraError, ModelStateError

# How many plans are kept. Each holds the first adapter of its modules and shapes.
_PLANS = 16
# The size of an adapter in bytes above which only its own plan is kept.
LARGE = 2**28

# A lens with the adapter's sites, and ∂g/∂ε_l at them for each half.
SlopesOfAdapter = tuple[LoraLens, Sequence[Float[Tensor, "prompt site"]]]


class _WithinReach(NamedTuple):
    """An adapter, and the same without the modules that cannot move what is read."""

    adapter: Adapter
    within_reach: Adapter


class RecordedBase:
    """The base's half over some rows, contracted with any adapter.

    Args:
        lens: a lens over the model, with any adapter.
        halves: what was recorded for the rows.
        stacks: the tensors that were recorded.
        behind: the paths of modules that cannot move what is read, because they write after it.

    Attributes:
        plans: what adapters of the same shapes share, the latest last.
    """

    def __init__(
        self,
        lens: LoraLens,
        halves: Sequence[Half],
        stacks: Stacks,
        behind: Sequence[str] = (),
    ) -> None:
        self._lens = lens
        self._halves = halves
        self._stacks = stacks
        self._behind = frozenset(behind)
        self.plans: dict[Shapes, SharedPlan] = {}

    def within_reach(self, adapter: Adapter) -> Adapter:
        """Leave out the adapter's modules that cannot move what is read, if there are any.

        Raises:
            ModelStateError: none of its modules can move what is read.
        """
        kept: dict[str, ModuleUpdate] = {}
        for key, update in adapter.modules.items():
            if _path(key) not in self._behind:
                kept[key] = update
        if not kept:
            raise ModelStateError(
                f"{adapter.name}: every module that it adapts writes after the hook point that is "
                "read, so the adapter does not move it",
                remedy="make a bank of a later point.",
            )
        if len(kept) == len(adapter.modules):
            return adapter
        return dataclasses.replace(adapter, modules=kept)

    def plan_of(self, adapter: Adapter) -> SharedPlan | LoraLens:
        """Return the plan that adapters of its shapes share, or a lens if it needs one of its own.

        Args:
            adapter: an adapter whose modules can all move what is read.

        Raises:
            LensLoraError: the adapter does not fit the model.
        """
        return self._plan_of(adapter, shapes_of(adapter))

    def _plan_of(self, adapter: Adapter, shapes: Shapes) -> SharedPlan | LoraLens:
        if shapes in self.plans:
            return self.plans[shapes]
        lens = _lens_of(adapter, self._lens)
        is_plain = bool(shapes) and lens.adapter is adapter
        if not is_plain or not can_share_plan(lens, self._halves, self._stacks):
            return lens

        plan = SharedPlan(lens, self._halves, self._stacks)
        self.plans[shapes] = plan
        plans_kept = 1 if bytes_of(adapter) > LARGE else _PLANS
        while len(self.plans) > plans_kept:
            oldest = next(iter(self.plans))
            del self.plans[oldest]
        return plan

    def slopes(self, adapter: Adapter) -> SlopesOfAdapter:
        """Compute ∂g/∂ε_l at 0 of each half, beside a lens with the adapter's sites.

        Raises:
            LensLoraError: the adapter does not fit the model, or what was recorded of the model.
        """
        within_reach = self.within_reach(adapter)
        plan = self.plan_of(within_reach)
        if isinstance(plan, LoraLens):
            return plan, self.split(plan)
        (slopes,) = plan.slopes(plan.stacked([within_reach]))
        return plan.lens, slopes

    def slopes_of_plain(self, adapters: Sequence[Adapter]) -> dict[int, SlopesOfAdapter]:
        """Compute the slopes of the adapters of plain factors, under each adapter's `id`.

        Adapters of the same shapes are contracted together. Adapters that are left out are to be
        passed to `slopes`, one by one, which raises an error if one does not fit.
        """
        alike: dict[SharedPlan, list[_WithinReach]] = {}
        for adapter in adapters:
            with contextlib.suppress(LensLoraError):
                within_reach = self.within_reach(adapter)
                shapes = shapes_of(within_reach)
                if not shapes:
                    continue
                plan = self._plan_of(within_reach, shapes)
                if isinstance(plan, SharedPlan):
                    alike.setdefault(plan, []).append(_WithinReach(adapter, within_reach))

        by_id: dict[int, SlopesOfAdapter] = {}
        for plan, of_plan in alike.items():
            factors = plan.stacked([each.within_reach for each in of_plan])
            for each, slopes in zip(of_plan, plan.slopes(factors), strict=True):
                by_id[id(each.adapter)] = (plan.lens, slopes)
        return by_id

    def split(self, lens: LoraLens, axes: tuple[str, ...] = ()) -> list[Tensor]:
        """Compute ∂g/∂ε_l at 0 of each half by the lens's own plan, split along `axes`.

        Raises:
            SiteError: the lens has a module for which nothing was recorded.
        """
        return [half.slopes(lens, self._stacks, axes) for half in self._halves]


def _lens_of(adapter: Adapter, known: LoraLens) -> LoraLens:
    """Return a lens of the adapter over the model of a known lens, which may be that lens."""
    return known if known.adapter is adapter else known.with_adapter(adapter)


def bytes_of(adapter: Adapter) -> int:
    """Sum the memory of an adapter's tensors: factors, magnitudes and trained modules."""
    total = 0
    for update in adapter.modules.values():
        for part in vars(update).values():
            if isinstance(part, Tensor):
                # A view that repeats its entries stores them only once.
                total += min(part.nbytes, part.untyped_storage().nbytes())
    return total


def _path(key: str) -> str:
    """Return a module's path from its key, which in a sum of adapters ends in '@' and a name."""
    return key.partition("@")[0]


@extensions.slopes_of_adapters.provide
def slopes_of_adapters(
    g: Function,
    adapters: Callable[[], Iterable[Adapter]],
    sites: Sequence[Site],
    like: Sequence[Adapter],
) -> Float[Tensor, "adapter batch site"]:
    """Compute ∂g/∂ε_l at 0 of many adapters: see `Function.slopes_of_adapters`."""
    asked = {_path(site.module) for site in sites}
    other_modules: set[str] = set()
    for adapter in like:
        other_modules.update(map(_path, adapter.modules))
    other_modules -= asked
    by_group: list[Tensor] = []
    for group in g.groups(graph=True):
        pool = TensorPool()
        # The lenses are made one at a time, since there may be many.
        lenses = (_lens_of(adapter, g.lens) for adapter in like)
        # If only some of the modules are asked for, gradients need not reach the others.
        half, _ = record(group, lenses, pool, require_all=not other_modules)
        base = RecordedBase(g.lens, [half], pool.stacks(), sorted(other_modules))
        rows: list[Tensor] = []
        for adapter in adapters():
            lens, (slopes,) = base.slopes(adapter)
            lens.sites.require_finite(slopes)
            index = {site.name: i for i, site in enumerate(lens.sites)}
            rows.append(slopes[:, [index[site.name] for site in sites]])
        by_group.append(torch.stack(rows))
    return torch.cat(by_group, 1)
