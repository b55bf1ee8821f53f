"""Some ranks, or some sites, of an adapter as an adapter of its own, which PEFT's format holds.

    ΔW′ = Σ_{j kept} σ_j u_j v_jᵀ   of each site's ΔW = UΣVᵀ,   in the Hugging Face basis

1. A module all of whose sites are kept whole stays as training left it; DoRA only where every
   module does, as PEFT's format does not mix the two kinds.
2. Else A′ has the kept rows of ΣVᵀ and B′ the kept columns of U. Of a fused module each site's
   columns stand in its own rows, and the parts follow one another along the rank.
3. A module of which nothing is kept is left out.

No forward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool
from torch import Tensor

from lens_lora.adapters.adapter import Adapter
from lens_lora.adapters.factors import LoRAFactors
from lens_lora.adapters.trained import ModuleUpdate, TrainedModule
from lens_lora.engine.rank_gates import GateLayout
from lens_lora.errors import UnsupportedAdapterError
from lens_lora.hooked.basis import Update
from lens_lora.hooked.gauge import svd_factors
from lens_lora.hooked.updates import SiteUpdate

__all__ = ["require_expressible", "sub_adapter"]


def require_expressible(layout: GateLayout) -> None:
    """Refuse, before a long run, an adapter of which a part cannot be written as an adapter.

    Args:
        layout: of the gates.

    Raises:
        UnsupportedAdapterError: tied modules, or ranks of modules that were trained whole.
    """
    adapter = layout.lens.adapter
    for one in layout.lens.plan.updates:
        site = one.site
        if site.path != site.module:
            raise UnsupportedAdapterError(
                f"{site.name} follows {site.module}, to which the base ties it, so no adapter "
                "switches one of them alone. Leave the module out: adapter.without(…)."
            )
        if layout.of == "rank" and isinstance(adapter.modules[_key(one)], TrainedModule):
            raise UnsupportedAdapterError(
                f"{site.name} ({site.module}) was trained whole, so its ranks are as many as the "
                "model is wide; use of='site', or make it low-rank first: Adapter.between(base, "
                "merged, rank=…)."
            )


def sub_adapter(layout: GateLayout, kept: Bool[Tensor, "gate"], name: str) -> Adapter:
    """The adapter with the kept gates at one and all others at zero.

    Args:
        layout: of the gates.
        kept: which of them, at least one.
        name: of the new adapter.
    """
    adapter = layout.lens.adapter
    alive = layout.by_site(layout.alive)
    parts: dict[str, list[tuple[SiteUpdate, Tensor, bool]]] = {}
    for i, (one, own) in enumerate(
        zip(layout.lens.plan.updates, layout.by_site(kept), strict=True)
    ):
        is_whole = bool(own[alive[i]].all())
        parts.setdefault(_key(one), []).append((one, own, is_whole))
    whole = {key for key, own in parts.items() if all(is_whole for *_, is_whole in own)}
    some = {key for key, own in parts.items() if any(bool(mask.any()) for _, mask, _ in own)}
    if some - whole:
        whole = {key for key in whole if not _is_dora(adapter.modules[key])}
    modules = {
        key: adapter.modules[key]
        if key in whole
        else _reduced(adapter.modules[key], own, layout.of)
        for key, own in parts.items()
        if key in whole | some
    }
    return Adapter(modules, name=name, base_model=adapter.base_model)


def _is_dora(update: ModuleUpdate) -> bool:
    return isinstance(update, LoRAFactors) and update.magnitude is not None


def _key(one: SiteUpdate) -> str:
    site = one.site
    return f"{site.module}@{site.adapter}" if site.adapter else site.module


def _reduced(
    update: ModuleUpdate, parts: Sequence[tuple[SiteUpdate, Tensor, bool]], of: str
) -> LoRAFactors:
    """The kept directions of a module's sites, in its own rows."""
    found = [_directions(one, mask, of) for one, mask, _ in parts if bool(mask.any())]
    reads = torch.cat([part.reads for part in found])
    out = _outputs(update, reads.shape[1])
    writes = reads.new_zeros(out, len(reads))
    bias = reads.new_zeros(out)
    start = 0
    for part in found:
        at = torch.arange(out) if part.rows is None else part.rows
        writes[at, start : start + len(part.reads)] = part.writes
        bias[at] = part.bias
        start += len(part.reads)
    if not len(reads):  # a change of bias alone
        reads, writes = reads.new_zeros(1, reads.shape[1]), writes.new_zeros(out, 1)
    dtype = _stored_dtype(update)
    lora_bias = bias.to(dtype) if bool(bias.any()) else None
    return LoRAFactors(reads.to(dtype).contiguous(), writes.to(dtype), lora_bias=lora_bias)


class _Directions(NamedTuple):
    """Kept of one site, in float64 on the CPU: of ΣVᵀ, of U, Δb, and its rows in a fused module."""

    reads: Tensor
    writes: Tensor
    bias: Tensor
    rows: Tensor | None


def _directions(one: SiteUpdate, mask: Tensor, of: str) -> _Directions:
    update = cast(Update, one.update)  # a norm has neither ranks nor several sites
    reads, writes, sigma = svd_factors(update)
    keep = sigma > 0 if of == "site" else mask[: len(sigma)]
    keep_bias = update.bias is not None and bool(mask[-1])
    bias = writes.new_zeros(len(writes))
    if update.bias is not None and keep_bias:
        bias = update.bias.cpu().double()
    rows = one.site.rows
    return _Directions(reads[keep], writes[:, keep], bias, None if rows is None else rows.cpu())


def _outputs(update: ModuleUpdate, inputs: int) -> int:
    """Of the whole module, of which a site may have some rows only."""
    if isinstance(update, LoRAFactors):
        return len(update.B)
    if update.weight is None:
        return 0 if update.bias is None else len(update.bias)
    return update.weight.numel() // inputs  # stored as [out, in] or [in, out]


def _stored_dtype(update: ModuleUpdate) -> torch.dtype:
    held = [
        v for f in dataclasses.fields(update) if isinstance(v := getattr(update, f.name), Tensor)
    ]
    floating = [t.dtype for t in held if t.is_floating_point()]
    return torch.promote_types(floating[0], torch.float32)
