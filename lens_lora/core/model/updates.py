"""An adapter's sites with their updates in the Hugging Face basis, in the order of a forward pass.

1. Shapes are compared with the model's own weights, and what has no low rank with free memory.
2. Each site's update is made plain: A, B and Δb, or Δγ and Δβ.

       factors           s·B·A,  Δb = s·b_B + (b' − b)
       DoRA              ΔW = m/‖W₀ + sBA‖_row ⊙ (W₀ + sBA) − W
       trained module    ΔW = W' − W, one factor the identity,  Δb = b' − b
       trained rows t    ΔW = Σ_t (W'_t − W_t) at row t: one factor selects the rows
       norm              Δγ = γ' − γ,  Δβ = β' − β

   W, b, γ and β are the base's (`HookedHost.base_weight` and others). W₀ = W, unless PEFT wrote an
   embedding of the file into the base: then ΔW has W₀ − W beside s·B·A. What equals the base to one
   rounding of the coarser dtype is no update, and a site without one is left out.
3. What the base ties to an embedding or a head follows it, as PEFT treats it. All that one site
   gets is one update.
4. Where norms are folded, readers' A' = A diag(γ) would depend on γ's gate: γ and β are refused.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora import errors
from lens_lora.compat import float64_device, in_float64
from lens_lora.core.adapter.factors import LoRAFactors, ModuleUpdate, TrainedModule, dense_factors
from lens_lora.core.model.bases import is_same
from lens_lora.core.model.basis import NormUpdate, Update
from lens_lora.core.model.hooked_host import HookedHost
from lens_lora.core.model.sites import SiteFactors, in_order, outside_layer, site_name
from lens_lora.errors import AdapterError, ModelStateError, UnsupportedAdapterError
from lens_lora.families import NORM_KINDS

_TIED = {"embed": "unembed", "unembed": "embed"}
# A dense update is held twice while it is turned into the model's basis.
_COPIES = 2


@dataclasses.dataclass(frozen=True, eq=False)
class SiteUpdate:
    """A site as the adapter holds it, and what it adds in the Hugging Face basis."""

    site: SiteFactors
    update: Update | NormUpdate


def site_updates(host: HookedHost, sites: Sequence[SiteFactors]) -> tuple[SiteUpdate, ...]:
    """Every site that differs from the base. No forward pass.

    Raises:
        AdapterError: shapes that do not fit the model's, or nothing differs.
        SiteError: the model has no such module.
        UnsupportedAdapterError: two values for parameters that are tied.
        ModelStateError: the base is needed and was not given, or norms that changed are folded.
        OutOfMemoryError: dense updates that do not fit into memory.
    """
    by_kind = {(site.kind, site.adapter): site for site in sites}
    _require_fit(host, sites)
    _require_memory(host, sites)
    updates: dict[str, SiteUpdate] = {}
    for site in sites:
        for part in filter(None, (site, follower(site, by_kind, host))):
            update = _update_of(part, host)
            if update is not None:
                updates[part.name] = _joined(updates.get(part.name), SiteUpdate(part, update))
    if not updates:
        raise AdapterError(
            "all that the adapter holds are parameters that equal the base model's: it changes "
            "nothing, so there is nothing to explain."
        )
    return tuple(sorted(updates.values(), key=lambda update: in_order(update.site)))


def _update_of(site: SiteFactors, host: HookedHost) -> Update | NormUpdate | None:
    """None where the adapter holds what the base has."""
    if site.kind not in NORM_KINDS:
        return _linear_update(site, host)
    is_folded = host.is_folded(site.layer, site.kind)
    update = None if is_folded and host.base is None else _norm_update(site, host)
    if is_folded and (host.base is None or update is not None):
        raise ModelStateError(
            f"{site.label}: the adapter changes this norm's γ or β, and this {host.class_name} has "
            "them folded into the weights that read the norm, whose own updates would then depend "
            "on it. Load the hooked model unprocessed (from_pretrained_no_processing, or a "
            "TransformerBridge before enable_compatibility_mode)."
        )
    return update


def _joined(earlier: SiteUpdate | None, later: SiteUpdate) -> SiteUpdate:
    """Both as one, under the module that the adapter names there itself."""
    if earlier is None:
        return later
    site = earlier.site if earlier.site.path == earlier.site.module else later.site
    if isinstance(earlier.update, NormUpdate) or isinstance(later.update, NormUpdate):
        raise AdapterError(f"{site.label}: the adapter holds two updates of it.")
    return SiteUpdate(site, _summed(earlier.update, later.update))


def _summed(*updates: Update) -> Update:
    device = float64_device(updates[0].A.device)
    A = torch.cat([in_float64(u.A).to(device) for u in updates])
    B = torch.cat([in_float64(u.B).to(device) * u.scale for u in updates], 1)
    biases = [u.bias.to(device) for u in updates if u.bias is not None]
    return Update(A, B, 1.0, torch.stack(biases).sum(0) if biases else None)


# --- shapes


def _require_fit(host: HookedHost, sites: Sequence[SiteFactors]) -> None:
    """Check shapes against the model's own weights, [out, in]."""
    for site in sites:
        if site.kind in NORM_KINDS:
            continue
        place = site.layer, site.kind
        out, width = host.known("shape", *place, make=functools.partial(host.shape, *place))
        for theirs in _shapes(site, (out, width)):
            if theirs != (out, width):
                maps = f"{theirs[1]}→{theirs[0]}, the model {width}→{out}"
                raise site.misfit(f"the adapter maps {maps}")
        experts = host.experts(*place)
        if experts != _experts_of(site.factors):
            counts = f"{_experts_of(site.factors)} experts, the model's stack {experts}"
            raise site.misfit(f"the adapter's factors are of {counts}")


def _experts_of(update: ModuleUpdate) -> int:
    """How many experts share the ranks; 0 where this is one map."""
    experts = update.experts if isinstance(update, LoRAFactors) else 0
    return experts if experts > 1 else 0


def _shapes(site: SiteFactors, ours: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """(out, in) as each of the adapter's tensors has them; an open side is the model's."""
    factors = site.factors
    if isinstance(factors, LoRAFactors):
        yield len(factors.B), factors.width or ours[1]
        return
    if factors.bias is not None:
        yield len(factors.bias), ours[1]
    if factors.weight is not None:
        out, width = factors.weight.reshape(len(factors.weight), -1).shape
        if factors.tokens is not None:
            _require_tokens(site, factors.weight, factors.tokens, ours)
            out, width = (ours[0], width) if site.kind == "unembed" else (out, ours[1])
        yield out, width


def _require_tokens(
    site: SiteFactors, weight: Tensor, tokens: Int[Tensor, " row"], ours: tuple[int, int]
) -> None:
    if site.kind not in (*_TIED, "pos_embed"):
        raise UnsupportedAdapterError(
            f"{site.label}: trained rows are read of embeddings and heads only."
        )
    axis, last = _token_axis(site.kind), int(tokens.max())
    if weight.shape[axis] != len(tokens):
        raise AdapterError(
            f"{site.label}: the adapter holds {weight.shape[axis]} rows of {len(tokens)} tokens."
        )
    if last >= ours[axis]:
        raise AdapterError(
            f"{site.label}: the adapter trains the row of token {last}, and the model has "
            f"{ours[axis]} rows. Resize the base model as it was resized for the training, and "
            "build the hooked model from it."
        )


def _token_axis(kind: str) -> int:
    """The axis of tokens in a weight [out, in]."""
    return 0 if kind == "unembed" else 1


# --- memory


def _require_memory(host: HookedHost, sites: Sequence[SiteFactors]) -> None:
    """Check that the dense updates fit into what is free on each device, before any is made.

    DoRA's ΔW and that of a module trained whole have full rank: ΔW [out, in] is held, in float32 at
    least, 4 · out · in bytes a module, several times the adapter. Where the model was processed or
    the bias changes as well, the other factor is no view (`dense`), and min(out, in)² numbers more
    are held.
    """
    dense = [site for site in sites if _is_dense(site)]
    needed: Counter[torch.device] = Counter()
    for site in dense:
        weight = host.weight(site.layer, site.kind)
        entries = weight.numel()
        if host.needs_base() or _has_bias(site.factors):
            entries += min(weight.shape) ** 2
        needed[weight.device] += _COPIES * max(4, weight.dtype.itemsize) * entries
    for device, size in needed.items():
        free = free_bytes(device)
        if free is not None and size > free:
            raise errors.OutOfMemoryError(
                f"DoRA and modules that were trained whole have a dense ΔW: for these {len(dense)} "
                f"modules about {size:.3g} bytes on {device}, where {free:.3g} are free. Take some "
                "of the modules, adapter.only('*.layers.1?.*'), or fine-tune by a plain LoRA."
            )


def free_bytes(device: torch.device) -> float | None:
    """What is free on a device; None where it does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available) if device.type == "cpu" else None


def _is_dense(site: SiteFactors) -> bool:
    factors = site.factors
    if isinstance(factors, LoRAFactors):
        return factors.needs_base_weight
    return site.kind not in NORM_KINDS and factors.weight is not None and factors.tokens is None


def _has_bias(factors: ModuleUpdate) -> bool:
    bias = factors.lora_bias if isinstance(factors, LoRAFactors) else factors.bias
    return bias is not None


# --- updates of linear modules, embeddings and heads


def _linear_update(site: SiteFactors, host: HookedHost) -> Update | None:
    """ΔW and Δb; None where nothing differs."""
    factors = site.factors
    if isinstance(factors, LoRAFactors):
        update = _of_factors(site, factors, host)
    else:
        update = _of_trained(site, factors, host)
    bias = _bias_change(site, host)
    if update is None and bias is not None:
        out, width = host.weight(site.layer, site.kind).shape
        update = Update(torch.zeros(0, width), torch.zeros(out, 0), 1.0)
    return None if update is None else dataclasses.replace(update, bias=bias)


def _of_factors(site: SiteFactors, factors: LoRAFactors, host: HookedHost) -> Update:
    """s·BA, or DoRA's dense ΔW; and W₀ − W where the file holds another W₀."""
    stored = _unlike_base(site, factors.base_weight, host)
    width = factors.width or host.weight(site.layer, site.kind).shape[1]
    A = factors.A if factors.width else factors.A.new_zeros(factors.rank, width)
    update = Update(A, factors.B, factors.scale * factors.strength, experts=_experts_of(factors))
    if stored is None and not factors.needs_base_weight:
        return update
    named = "DoRA's ΔW" if factors.needs_base_weight else "ΔW of a stored weight"
    base = host.base_weight(site, named)
    W = in_float64(base)
    if factors.needs_base_weight:
        delta = factors.materialise((W if stored is None else stored).to(W))
        # A dense ΔW is kept in the base's dtype: half as large as in float64.
        update = _dense(delta.to(torch.promote_types(base.dtype, torch.float32)))
    if stored is None:
        return update
    return _summed(update, _dense(factors.strength * _difference(stored, W)))


def holds_another_base(site: SiteFactors, host: HookedHost) -> bool:
    """Whether W₀ − W is a part of the update, beside that of the factors."""
    stored = site.factors.base_weight if isinstance(site.factors, LoRAFactors) else None
    return _unlike_base(site, stored, host) is not None


def _of_trained(site: SiteFactors, trained: TrainedModule, host: HookedHost) -> Update | None:
    """ΔW of a weight, or of rows of it; None where it is the base's."""
    weight, tokens = trained.weight, trained.tokens
    if weight is not None and tokens is not None:
        stored = _unlike_base(site, trained.base_weight, host)
        if stored is None:
            return _of_rows(site, weight, tokens, trained.strength, host)
        weight = stored.index_copy(_token_axis(site.kind), tokens, weight.to(stored))
    if _unlike_base(site, weight, host) is None:
        return None
    W = host.base_weight(site, "ΔW of a trained weight")
    return _dense(trained.strength * _difference(cast(Tensor, weight), W))


def _of_rows(
    site: SiteFactors, rows: Tensor, tokens: Int[Tensor, " row"], strength: float, host: HookedHost
) -> Update | None:
    """One factor selects the rows, the other is their change; dense where they are many."""
    W, axis = host.base_weight(site, "ΔW of trained rows"), _token_axis(site.kind)
    tokens = tokens.to(W.device)
    before = W.index_select(axis, tokens)
    if is_same(rows, before):
        return None
    change = strength * _difference(rows, before)
    if len(tokens) > W.shape[1 - axis]:
        return _dense(torch.zeros_like(W, dtype=change.dtype).index_copy(axis, tokens, change))
    select = change.new_zeros(len(tokens), W.shape[axis])
    select[torch.arange(len(tokens)), tokens] = 1
    return Update(select, change, 1.0) if axis else Update(change, select.T, 1.0)


def _bias_change(site: SiteFactors, host: HookedHost) -> Float[Tensor, " out"] | None:
    """Δb = strength · (s·b_B + b' − b); None where the bias stays."""
    factors, change = site.factors, None
    trained = factors.trained_bias if isinstance(factors, LoRAFactors) else factors.bias
    if isinstance(factors, LoRAFactors) and factors.lora_bias is not None:
        change = factors.scale * in_float64(factors.lora_bias)
    if trained is not None:
        bias = host.base_bias(site)
        if bias is None:
            raise site.misfit("the adapter holds a trained bias, the base model has none there")
        if not is_same(trained, bias):
            wide = in_float64(trained)
            moved = wide - in_float64(bias).to(wide.device)
            change = moved if change is None else change + moved
    elif isinstance(factors, TrainedModule) and factors.tokens is not None:
        # In PEFT's layer of trained rows a head has no bias.
        bias = host.base_bias(site) if site.kind == "unembed" else None
        change = None if bias is None or not bool(bias.any()) else -in_float64(bias)
    return None if change is None else change * factors.strength


def _unlike_base(site: SiteFactors, held: Tensor | None, host: HookedHost) -> Tensor | None:
    """The weight that the adapter's file holds, [out, in], if it is not the base's.

    A centred weight of the model is enough to tell, if no base was given.

    Raises:
        AdapterError: it has another size.
        ModelStateError: the model's own was processed, and no base was given.
    """
    if held is None:
        return None
    weight = host.weight(site.layer, site.kind)
    if held.shape != weight.shape:
        raise AdapterError(
            f"{site.label}: the adapter holds a weight {tuple(held.shape)}, the model's is "
            f"{tuple(weight.shape)}: it was resized, or is another model's. Resize the base model "
            "in the same way, and build the hooked model from it."
        )
    if host.base is None and not host.needs_base() and host.is_centred(site.kind, weight):
        wide = in_float64(held)
        weight = in_float64(weight) / host.embedding_scale(site.kind)
        off = (wide - wide.mean(0, keepdim=True)).to(weight.device) - weight
        eps = max(torch.finfo(held.dtype).eps, torch.finfo(host.working_dtype).eps)
        room = 4 * eps * wide.abs().amax(0, keepdim=True).to(weight.device)
        is_base = bool((off.abs() <= room).all())
    else:
        is_base = is_same(held, host.base_weight(site, "whether its stored weight is the base's"))
    return None if is_base else held


def _difference(held: Tensor, base: Tensor) -> Tensor:
    """held − base, where the base lies, in no less than float32."""
    dtype = torch.promote_types(torch.promote_types(held.dtype, base.dtype), torch.float32)
    return held.to(base.device, dtype) - base.to(dtype)


def _dense(delta: Float[Tensor, "out in"]) -> Update:
    factors = dense_factors(delta)
    return Update(factors.A, factors.B, 1.0)


# --- updates of norms


def _norm_update(site: SiteFactors, host: HookedHost) -> NormUpdate | None:
    """Δγ and Δβ of a norm; None where nothing differs."""
    trained, (gamma, beta) = cast(TrainedModule, site.factors), host.base_affine(site)
    weight = None if trained.weight is None else trained.weight + host.family.gamma_offset
    d_gamma = _vector_change(site, weight, gamma)
    d_beta = _vector_change(site, trained.bias, beta)
    if d_gamma is None and d_beta is None:
        return None
    d_gamma = torch.zeros_like(gamma) if d_gamma is None else d_gamma * trained.strength
    return NormUpdate(d_gamma, None if d_beta is None else d_beta * trained.strength)


def _vector_change(site: SiteFactors, held: Tensor | None, base: Tensor | None) -> Tensor | None:
    if held is None:
        return None
    if base is None or held.shape != base.shape:
        size = "none" if base is None else f"{tuple(base.shape)}"
        raise site.misfit(
            f"the adapter holds a norm's vector {tuple(held.shape)}, the model's is {size}"
        )
    return None if is_same(held, base) else _difference(held, base)


# --- what the base ties to an embedding or a head


def follower(
    site: SiteFactors, sites: Mapping[tuple[str, str], SiteFactors], host: HookedHost
) -> SiteFactors | None:
    """The head, or the embedding, that changes with this site; None where none does.

    1. Trained rows of an embedding are the tied head's as well, unless it has rows of other tokens.
    2. A weight that PEFT writes into the base's own parameter is that of both.
    3. A module of `modules_to_save` is a copy: nothing follows it, and it follows nothing.
    4. Factors are each module's own.

    `sites` are the adapter's own, by kind and part of a sum.

    Raises:
        UnsupportedAdapterError: the two are tied, and the adapter holds different parameters.
        ModelStateError: whether they are tied, or the base's weight, is not known.
    """
    shared = _shared_parameters(site, host)
    if shared is None or not host.ties_head(site):
        return None
    kind = _TIED[site.kind]
    other = sites.get((kind, site.adapter))
    if other is not None and _holds(other, site, shared):
        return None
    return dataclasses.replace(
        site,
        name=site_name(0, kind, site.adapter),
        path=host.head if kind == "unembed" else host.family.embed,
        layer=outside_layer(kind, host.n_layers),
        kind=kind,
        factors=shared,
    )


def _shared_parameters(site: SiteFactors, host: HookedHost) -> TrainedModule | None:
    """What a tied module would have of this one, turned to its own [out, in]."""
    factors = site.factors
    if site.kind not in _TIED:
        return None
    if isinstance(factors, TrainedModule) and factors.tokens is not None and factors.tied:
        return dataclasses.replace(factors.turned(), bias=None)
    stored = _unlike_base(site, _written_to_base(factors), host)
    return None if stored is None else TrainedModule(stored.T, strength=factors.strength)


def _holds(other: SiteFactors, site: SiteFactors, shared: TrainedModule) -> bool:
    """Whether the adapter itself holds, for the tied module, what that would follow."""
    factors, weight = other.factors, cast(Tensor, shared.weight)
    if isinstance(factors, LoRAFactors) and factors.base_weight is None:
        return False
    is_trained = isinstance(factors, TrainedModule)
    if shared.tokens is not None:
        tokens = factors.tokens if is_trained else None
        is_of_rows = tokens is not None and torch.equal(tokens, shared.tokens)
        held = factors.weight if is_trained and is_of_rows else None
    elif is_trained and factors.tokens is None and not factors.tied:
        held = weight
    else:
        held = _written_to_base(factors)
    if held is None or not is_same(held, weight):
        raise UnsupportedAdapterError(
            f"{site.label} and {other.label}: the base ties the one to the other, and the adapter "
            "holds different parameters for the two, which PEFT cannot both use. It was trained on "
            "a base whose head is not tied to its embedding: build the hooked model from that."
        )
    return True


def _written_to_base(factors: ModuleUpdate) -> Tensor | None:
    """The weight that PEFT writes into the base's own parameter, [out, in]."""
    if isinstance(factors, LoRAFactors) or not factors.tied or factors.tokens is not None:
        return factors.base_weight
    return factors.weight
