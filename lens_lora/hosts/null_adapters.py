"""Null adapters of a lens: updates with the adapter's spectra, in random directions."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lens_lora import errors
from lens_lora.core import Adapter, LoRAFactors, LoraLens
from lens_lora.core.adapter import module_path, null_draws
from lens_lora.core.model import Plan, extensions, fused_rows, holds_another_base


@extensions.null_adapters.provide
def null_adapters(lens: LoraLens, seed: int, draws: int) -> Iterator[Adapter]:
    """The null draws of a lens's adapter, which keep the spectrum of each fused part.

    Args:
        lens: the adapter over a model.
        seed: the seed of all draws.
        draws: the number of draws.

    Raises:
        UnsupportedAdapterError: a module's change is not its factors alone, because the adapter's
            file holds another weight of the base than this model's.
    """
    if not draws:
        return
    for pair in lens.updates:
        if holds_another_base(pair.site, lens.plan.host):
            raise errors.UnsupportedAdapterError(
                f"{pair.site.label}: the adapter's file holds another weight of the base than this "
                "model's, and the difference is a part of its change, which a null adapter lacks.",
                remedy="Load the base that it was trained on, or leave the module out with "
                "adapter.without_modules(…).",
                in_shell="Name the base that it was trained on with --model.",
            )
    yield from null_draws(lens.adapter, seed, range(draws), fused_parts(lens.plan, lens.adapter))


def fused_parts(plan: Plan, adapter: Adapter) -> dict[str, list[Tensor]]:
    """The rows of q, k and v (gate and up) in each fused module, for `Adapter.null`."""
    host = plan.host
    parts: dict[str, list[Tensor]] = {}
    for key, factors in adapter.modules.items():
        place = host.family.place(module_path(key))
        if place is None or place.layout == "whole" or not isinstance(factors, LoRAFactors):
            continue
        of_kinds: list[Tensor] = []
        for kind in place.kinds:
            rows = fused_rows(place, kind, host.heads, len(factors.B))
            if rows is not None:
                of_kinds.append(rows)
        parts[key] = of_kinds
    return parts
