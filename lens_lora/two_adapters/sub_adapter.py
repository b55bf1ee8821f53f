"""A part of an adapter as an adapter of its own, which PEFT's format holds.

    ΔW′ = Σ_{j kept} σ_j u_j v_jᵀ    of each site's ΔW = UΣVᵀ, in the Hugging Face basis

A′ holds the kept rows of ΣVᵀ and B′ the kept columns of U; in a fused module each site fills its
own output rows. A module of which nothing is kept is left out, and one whose sites are all kept
whole stays as it is. DoRA stays only if no module is kept in part, as PEFT's format does not mix
DoRA with plain factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.core import Adapter, LoRAFactors, ModuleUpdate, SiteUpdate, TrainedModule
from lens_lora.errors import UnsupportedAdapterError
from lens_lora.two_adapters.rank_gates import GateLayout, Of


def require_expressible(layout: GateLayout) -> None:
    """Refuse, before a long run, an adapter of which a part cannot be written as an adapter.

    Args:
        layout: the gates by which parts are chosen.

    Raises:
        UnsupportedAdapterError: tied modules, or ranks of modules that were trained whole.
    """
    adapter = layout.lens.adapter
    for update in layout.lens.updates:
        site = update.site
        if site.path != site.module:
            raise UnsupportedAdapterError(
                f"{site.name} follows {site.module}, to which the base ties it, so no adapter can "
                "switch one of them alone.",
                remedy="Leave the module out: adapter.without_modules(…).",
                in_shell="In Python, leave the module out: "
                "adapter.without_modules(…).save(folder).",
            )
        if layout.of == "rank" and isinstance(adapter.modules[site.key], TrainedModule):
            raise UnsupportedAdapterError(
                f"{site.name} ({site.module}) was trained whole, so its ranks are as many as the "
                "model is wide",
                remedy="use of='site', or make it low-rank first: Adapter.between(base, merged, "
                "rank=…).",
                in_shell="use --of site, or make it low-rank first, in Python: "
                "Adapter.between(base, merged, rank=…).save(folder).",
            )


class _SitePart(NamedTuple):
    """The part of one site that is kept.

    Attributes:
        update: the site's update in the Hugging Face basis.
        kept: which of its gates are kept.
        is_whole: whether all gates that move anything are kept.
    """

    update: SiteUpdate
    kept: Bool[Tensor, " gate"]
    is_whole: bool


def sub_adapter(layout: GateLayout, kept: Bool[Tensor, " gate"], name: str) -> Adapter:
    """The adapter with the kept gates at one and all others at zero.

    Args:
        layout: the places of all gates.
        kept: which gates are kept.
        name: the new adapter's name.
    """
    adapter = layout.lens.adapter
    parts = _parts_by_module(layout, kept)
    unchanged = _unchanged(adapter, parts)
    modules: dict[str, ModuleUpdate] = {}
    for key, of_module in parts.items():
        if key in unchanged:
            modules[key] = adapter.modules[key]
        elif _has_any(of_module):
            modules[key] = _reduced(adapter.modules[key], of_module, layout.of)
    return Adapter(modules, name=name, base_model=adapter.base_model)


def _parts_by_module(layout: GateLayout, kept: Bool[Tensor, " gate"]) -> dict[str, list[_SitePart]]:
    """The parts of each module's sites, by the module's key in the adapter."""
    parts: dict[str, list[_SitePart]] = {}
    of_sites = layout.by_site(kept)
    alive_of_sites = layout.by_site(layout.alive)
    for update, of_site, alive in zip(layout.lens.updates, of_sites, alive_of_sites, strict=True):
        part = _SitePart(update, of_site, is_whole=bool(of_site[alive].all()))
        parts.setdefault(update.site.key, []).append(part)
    return parts


def _has_any(parts: Sequence[_SitePart]) -> bool:
    return any(bool(part.kept.any()) for part in parts)


def _unchanged(adapter: Adapter, parts: Mapping[str, Sequence[_SitePart]]) -> set[str]:
    """The modules that stay as they are.

    If one module becomes plain factors, every DoRA module becomes plain factors too.
    """
    whole: set[str] = set()
    becomes_plain = False
    for key, of_module in parts.items():
        if all(part.is_whole for part in of_module):
            whole.add(key)
        elif _has_any(of_module):
            becomes_plain = True
    if not becomes_plain:
        return whole
    return {key for key in whole if not _is_dora(adapter.modules[key])}


def _is_dora(update: ModuleUpdate) -> bool:
    return isinstance(update, LoRAFactors) and update.needs_base_weight


def _reduced(update: ModuleUpdate, parts: Sequence[_SitePart], of: Of) -> LoRAFactors:
    """The kept directions of a module's sites, in its own rows."""
    directions = [_directions(update, part, of) for part in parts if bool(part.kept.any())]
    reads = torch.cat([each.reads for each in directions])
    writes = torch.cat([each.writes for each in directions], 1)
    bias = torch.stack([each.bias for each in directions]).sum(0)
    if not len(reads):
        # What is kept is a change of bias alone, and factors cannot be empty.
        reads = reads.new_zeros(1, reads.shape[1])
        writes = writes.new_zeros(len(writes), 1)

    dtype = _dtype_of(update)
    lora_bias: Tensor | None = None
    if bool(bias.any()):
        lora_bias = bias.to(dtype)
    experts = 0
    if isinstance(update, LoRAFactors):
        experts = update.experts
    return LoRAFactors(
        reads.to(dtype).contiguous(), writes.to(dtype), lora_bias=lora_bias, experts=experts
    )


def _dtype_of(update: ModuleUpdate) -> torch.dtype:
    """The dtype of the module's own tensors, at least float32."""
    for field in dataclasses.fields(update):
        value = getattr(update, field.name)
        if isinstance(value, Tensor) and value.is_floating_point():
            return torch.promote_types(value.dtype, torch.float32)
    raise TypeError(f"a {type(update).__name__} holds no tensor of floating point")


class _Directions(NamedTuple):
    """The directions that one site keeps, in float64 on the CPU, in its module's output rows.

    Attributes:
        reads: kept rows of ΣVᵀ.
        writes: kept columns of U.
        bias: Δb, or zeros.
    """

    reads: Float[Tensor, "kept in"]
    writes: Float[Tensor, "out kept"]
    bias: Float[Tensor, " out"]


def _directions(module: ModuleUpdate, part: _SitePart, of: Of) -> _Directions:
    # Parts of a norm never come here: it has no ranks, and its module has no other site.
    update = part.update.linear
    reads, writes, sigma = part.update.svd()
    # The gate after those of the ranks is that of the change of bias.
    keep = sigma > 0 if of == "site" else part.kept[: len(sigma)]
    if update.experts:
        # Each expert has as many ranks as any other, so those that go are set to zero.
        writes = writes * keep
        keep = torch.ones_like(keep)

    height = module.output_count(reads.shape[1])
    rows_of_site = part.update.site.rows
    # A module with no other site has all its rows in this one.
    rows = torch.arange(height) if rows_of_site is None else rows_of_site.cpu()
    writes_of_module = writes.new_zeros(height, int(keep.sum()))
    writes_of_module[rows] = writes[:, keep]
    bias = writes.new_zeros(height)
    if update.bias is not None and bool(part.kept[-1]):
        bias[rows] = update.bias.cpu().double()
    return _Directions(reads[keep], writes_of_module, bias)
