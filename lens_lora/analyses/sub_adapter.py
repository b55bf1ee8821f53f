"""Some ranks, or some sites, of an adapter as an adapter of its own, which PEFT's format holds.

    ΔW′ = Σ_{j kept} σ_j u_j v_jᵀ   of each site's ΔW = UΣVᵀ,   in the Hugging Face basis

1. A module whose sites are all kept whole stays as training left it; DoRA only where every module
   does, as PEFT's format does not mix the two kinds.
2. Otherwise A′ holds the kept rows of ΣVᵀ and B′ the kept columns of U. In a fused module each
   site's columns fill its own output rows, and the sites follow one another along the rank.
3. A module of which nothing is kept is left out.

No forward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.adapters.adapter import Adapter
from lens_lora.adapters.factors import LoRAFactors, ModuleUpdate, TrainedModule
from lens_lora.engine.activations import GateLayout
from lens_lora.errors import UnsupportedAdapterError
from lens_lora.model.basis import Update, svd_factors
from lens_lora.model.updates import SiteUpdate

SitePart = tuple[SiteUpdate, Bool[Tensor, " gate"]]


def require_expressible(layout: GateLayout) -> None:
    """Refuse, before a long run, an adapter of which a part cannot be written as an adapter.

    Raises:
        UnsupportedAdapterError: tied modules, or ranks of modules that were trained whole.
    """
    adapter = layout.lens.adapter
    for update in layout.lens.plan.updates:
        site = update.site
        if site.path != site.module:
            raise UnsupportedAdapterError(
                f"{site.name} follows {site.module}, to which the base ties it, so no adapter can "
                "switch one of them alone. Leave the module out: adapter.without(…)."
            )
        if layout.of == "rank" and isinstance(adapter.modules[site.key], TrainedModule):
            raise UnsupportedAdapterError(
                f"{site.name} ({site.module}) was trained whole, so its ranks are as many as the "
                "model is wide; use of='site', or make it low-rank first: Adapter.between(base, "
                "merged, rank=…)."
            )


def sub_adapter(layout: GateLayout, kept: Bool[Tensor, " gate"], name: str) -> Adapter:
    """The adapter with the kept gates at one and all others at zero."""
    adapter = layout.lens.adapter
    parts: dict[str, list[SitePart]] = {}
    cut: set[str] = set()
    by_site = zip(layout.by_site(kept), layout.by_site(layout.alive), strict=True)
    for update, (mask, alive) in zip(layout.lens.plan.updates, by_site, strict=True):
        parts.setdefault(update.site.key, []).append((update, mask))
        if not bool(mask[alive].all()):
            cut.add(update.site.key)
    used = {key for key, sites in parts.items() if any(bool(mask.any()) for _, mask in sites)}
    whole = set(parts) - cut
    if used & cut:
        whole = {key for key in whole if not _is_dora(adapter.modules[key])}
    modules = {
        key: adapter.modules[key]
        if key in whole
        else _reduced(adapter.modules[key], sites, layout.of)
        for key, sites in parts.items()
        if key in whole | used
    }
    return Adapter(modules, name=name, base_model=adapter.base_model)


def _is_dora(update: ModuleUpdate) -> bool:
    return isinstance(update, LoRAFactors) and update.needs_base_weight


def _reduced(update: ModuleUpdate, parts: Sequence[SitePart], of: str) -> LoRAFactors:
    """The kept directions of a module's sites, in its own rows."""
    kept = [_directions(update, *part, of) for part in parts if bool(part[1].any())]
    reads = torch.cat([reads for reads, _, _ in kept])
    writes = torch.cat([writes for _, writes, _ in kept], 1)
    bias = torch.stack([bias for _, _, bias in kept]).sum(0)
    if not len(reads):  # a change of bias alone, and factors cannot be empty
        reads, writes = reads.new_zeros(1, reads.shape[1]), writes.new_zeros(len(writes), 1)
    dtype = _stored_dtype(update)
    lora_bias = bias.to(dtype) if bool(bias.any()) else None
    experts = update.experts if isinstance(update, LoRAFactors) else 0
    reads = reads.to(dtype).contiguous()
    return LoRAFactors(reads, writes.to(dtype), lora_bias=lora_bias, experts=experts)


def _directions(
    module: ModuleUpdate, site_update: SiteUpdate, mask: Bool[Tensor, " gate"], of: str
) -> tuple[Float[Tensor, "kept in"], Float[Tensor, "out kept"], Float[Tensor, " out"]]:
    """Kept rows of ΣVᵀ, columns of U and Δb of one site, in float64 on the CPU."""
    update = cast(Update, site_update.update)  # a norm has neither ranks nor several sites
    reads, writes, sigma = svd_factors(update)
    keep = sigma > 0 if of == "site" else mask[: len(sigma)]
    if update.experts:  # each has as many ranks: those that go are zero
        writes, keep = writes * keep, torch.ones_like(keep)
    out = output_count(module, reads.shape[1])
    rows = slice(None) if site_update.site.rows is None else site_update.site.rows.cpu()
    placed, bias = writes.new_zeros(out, int(keep.sum())), writes.new_zeros(out)
    placed[rows] = writes[:, keep]
    if update.bias is not None and bool(mask[-1]):
        bias[rows] = update.bias.cpu().double()
    return reads[keep], placed, bias


def output_count(module: ModuleUpdate, inputs: int) -> int:
    """How many features the whole module writes; a site of a fused one has some of these rows."""
    if isinstance(module, LoRAFactors):
        return len(module.B)
    if module.weight is None:
        return 0 if module.bias is None else len(module.bias)
    return module.weight.numel() // inputs  # stored as [out, in] or [in, out]


def _stored_dtype(module: ModuleUpdate) -> torch.dtype:
    held = (getattr(module, field.name) for field in dataclasses.fields(module))
    floating = [t.dtype for t in held if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.promote_types(floating[0], torch.float32)
