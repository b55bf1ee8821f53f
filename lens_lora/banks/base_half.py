"""The base's half of first order, contracted with one adapter after another.

    a_l = ⟨G_l, s_l B_l A_l z_l⟩        z_l what a map reads, G_l = ∂g/∂(its output)

At ε = 0 z and G are those of the base model, whatever the adapter. So they are recorded once
(`banks/record.py`), and first order of an adapter costs no pass:

1. Adapters of plain factors are contracted by products alone, many at once
   (`banks/plain_factors.py`).
2. Any other adapter is laid over the model, and its lens is shown the recorded tensors in place of
   a backward pass (`Half.slopes`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.banks.plain_factors import Shapes, SharedPlan, can_share_plan, shapes_of
from lens_lora.banks.record import Half, Stacks, TensorPool, record
from lens_lora.core import Adapter, Function, LoraLens, Site, require_finite_slopes
from lens_lora.core.model import extensions
from lens_lora.errors import LensLoraError

# How many plans are kept, each with the first adapter of its modules and shapes.
_PLANS = 16
# Bytes of an adapter, above which no other plan is kept beside its own.
LARGE = 2**28

# A lens whose sites are the adapter's, and ∂g/∂ε_l of each half.
SlopesOfAdapter = tuple[LoraLens, Sequence[Float[Tensor, "prompt site"]]]


class RecordedBase:
    """The base's half over some rows, contracted with any adapter.

    Attributes:
        plans: what adapters of the same shapes share, the latest last.
    """

    def __init__(self, lens: LoraLens, halves: Sequence[Half], stacks: Stacks) -> None:
        self._lens = lens
        self._halves = halves
        self._stacks = stacks
        self.plans: dict[Shapes, SharedPlan] = {}

    def plan_of(self, adapter: Adapter) -> SharedPlan | LoraLens:
        """Products that all adapters of its shapes share, or a lens of it where none are enough.

        Raises:
            LensLoraError: the adapter does not fit the model.
        """
        shapes = shapes_of(adapter)
        if shapes in self.plans:
            return self.plans[shapes]
        lens = self._lens.with_adapter(adapter)
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
        """∂g/∂ε_l at 0 of each half, and a lens whose sites are the adapter's.

        Raises:
            LensLoraError: the adapter does not fit the model, or what was recorded of it.
        """
        plan = self.plan_of(adapter)
        if isinstance(plan, LoraLens):
            return plan, self.split(plan)
        (slopes,) = plan.slopes([plan.factors_of(adapter)])
        return plan.lens, slopes

    def slopes_of_plain(self, adapters: Sequence[Adapter]) -> dict[int, SlopesOfAdapter]:
        """The slopes of those adapters that are products alone, by the adapter's `id`.

        Adapters of the same shapes are contracted together. An adapter that is not among them is
        asked for alone, by `slopes`, which says what is wrong with it.
        """
        by_plan: dict[SharedPlan, list[Adapter]] = {}
        for adapter in adapters:
            if not shapes_of(adapter):
                continue
            with contextlib.suppress(LensLoraError):
                plan = self.plan_of(adapter)
                if isinstance(plan, SharedPlan):
                    by_plan.setdefault(plan, []).append(adapter)

        by_id: dict[int, SlopesOfAdapter] = {}
        for plan, alike in by_plan.items():
            factors = [plan.factors_of(adapter) for adapter in alike]
            for adapter, slopes in zip(alike, plan.slopes(factors), strict=True):
                by_id[id(adapter)] = (plan.lens, slopes)
        return by_id

    def split(self, lens: LoraLens, axes: tuple[str, ...] = ()) -> list[Tensor]:
        """∂g/∂ε_l at 0 of each half, by the lens's own plan, split along these axes.

        Raises:
            SiteError: the lens has a module of which nothing was recorded.
        """
        return [half.slopes(lens, self._stacks, axes) for half in self._halves]


def bytes_of(adapter: Adapter) -> int:
    """The memory of all tensors: factors, magnitudes, and modules that were trained whole."""
    total = 0
    for update in adapter.modules.values():
        for part in vars(update).values():
            if isinstance(part, Tensor):
                # Of a view that repeats its entries only these are stored.
                total += min(part.nbytes, part.untyped_storage().nbytes())
    return total


@extensions.slopes_of_adapters.provide
def slopes_of_adapters(
    g: Function,
    adapters: Callable[[], Iterable[Adapter]],
    sites: Sequence[Site],
    like: Sequence[Adapter],
) -> Float[Tensor, "adapter batch site"]:
    """∂g/∂ε_l at 0 of many adapters: see `Function.slopes_of_adapters`."""
    by_group: list[Tensor] = []
    for group in g.groups(graph=True):
        pool = TensorPool()
        # One at a time, as there may be many.
        lenses = (g.lens.with_adapter(adapter) for adapter in like)
        half = record(group, lenses, pool, by_token=False)
        base = RecordedBase(g.lens, [half], pool.stacks())
        rows: list[Tensor] = []
        for adapter in adapters():
            lens, (slopes,) = base.slopes(adapter)
            require_finite_slopes(lens, slopes)
            index = {site.name: i for i, site in enumerate(lens.sites)}
            rows.append(slopes[:, [index[site.name] for site in sites]])
        by_group.append(torch.stack(rows))
    return torch.cat(by_group, 1)
