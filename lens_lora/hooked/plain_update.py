"""One site's update in the Hugging Face basis, made plain: A, B and Δb, or Δγ and Δβ.

    factors           s·B·A,  Δb = s·b_B + (b' − b)
    DoRA              ΔW = m/‖W₀ + sBA‖_row ⊙ (W₀ + sBA) − W
    trained module    ΔW = W' − W, one factor the identity,  Δb = b' − b
    trained rows t    ΔW = Σ_t (W'_t − W_t) at row t: one factor selects the rows
    norm              Δγ = γ' − γ,  Δβ = β' − β

W, b, γ and β are the base's. W₀ = W, unless PEFT wrote an embedding of the file into the base: then
ΔW has W₀ − W beside s·B·A. What equals the base to one rounding is no update.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.adapters.factors import LoRAFactors, dense_factors
from lens_lora.adapters.trained import TrainedModule
from lens_lora.errors import AdapterError
from lens_lora.float64 import float64_device, in_float64
from lens_lora.hooked.base_at_hand import BaseAtHand, is_same
from lens_lora.hooked.basis import Update
from lens_lora.hooked.norm_map import NormUpdate
from lens_lora.hooked.site_factors import SiteFactors

__all__ = ["linear_update", "norm_update", "summed", "token_axis"]


def linear_update(site: SiteFactors, base: BaseAtHand) -> Update | None:
    """ΔW and Δb of a linear module, an embedding or a head; None where nothing differs.

    Args:
        site: as the adapter holds it.
        base: the base's own parameters.

    Raises:
        AdapterError: the adapter was trained beside other parameters than the model's.
        ModelStateError: the base is needed, and was not given.
    """
    factors = site.factors
    if isinstance(factors, LoRAFactors):
        return _of_factors(site, factors, base)
    delta, bias = _of_trained(site, factors, base), _bias_change(site, base)
    if delta is None and bias is None:
        return None
    if delta is None:
        out, width = base.shape(site)
        delta = Update(torch.zeros(0, width), torch.zeros(out, 0), 1.0)
    return dataclasses.replace(delta, bias=bias)


def norm_update(site: SiteFactors, base: BaseAtHand, offset: float) -> NormUpdate | None:
    """Δγ and Δβ of a norm; None where nothing differs.

    Args:
        site: as the adapter holds it.
        base: the base's own parameters.
        offset: what is added to a stored weight to give γ.

    Raises:
        AdapterError: sizes that are not the model's, or a bias of a norm that has none.
        SiteError: the model has no such norm.
    """
    trained, (gamma, beta) = cast(TrainedModule, site.factors), base.affine(site)
    weight = trained.weight if trained.weight is None or not offset else trained.weight + offset
    of_gamma = _vector_change(site, weight, gamma)
    of_beta = _vector_change(site, trained.bias, beta)
    if of_gamma is None and of_beta is None:
        return None
    of_gamma = torch.zeros_like(gamma) if of_gamma is None else of_gamma * trained.strength
    return NormUpdate(of_gamma, None if of_beta is None else of_beta * trained.strength)


def _vector_change(site: SiteFactors, held: Tensor | None, own: Tensor | None) -> Tensor | None:
    if held is None:
        return None
    if own is None or held.shape != own.shape:
        has = "none" if own is None else f"{tuple(own.shape)}"
        raise AdapterError(
            f"{site.name} ({site.module}): the adapter holds a norm's vector {tuple(held.shape)}, "
            f"and the model's is {has}; it was trained on another base model."
        )
    return None if is_same(held, own) else _difference(held, own)


def _of_factors(site: SiteFactors, factors: LoRAFactors, base: BaseAtHand) -> Update:
    """s·BA, or DoRA's dense ΔW; and W₀ − W where the file holds another W₀."""
    scale, stored = factors.scale * factors.strength, _unlike(site, factors.base_weight, base)
    is_open = factors.width is None
    A = factors.A.new_zeros(factors.rank, base.shape(site)[1]) if is_open else factors.A
    own = Update(A, factors.B, scale, _bias_change(site, base))
    if stored is None and not factors.needs_base_weight:
        return own
    what = "DoRA's ΔW" if factors.needs_base_weight else "ΔW of a stored weight"
    held = base.weight(site, what)
    W = in_float64(held)
    if factors.needs_base_weight:
        turned = factors.materialise((W if stored is None else stored).to(W))
        dtype = torch.promote_types(held.dtype, torch.float32)  # a dense ΔW is kept, half as large
        own = dataclasses.replace(_dense(turned.to(dtype)), bias=own.bias)
    if stored is None:
        return own
    return summed(own, _dense(factors.strength * _difference(stored, W)))


def _unlike(site: SiteFactors, stored: Tensor | None, base: BaseAtHand) -> Tensor | None:
    """The weight W₀ that the file holds, if it is not the base's."""
    return None if stored is None or base.has_weight(site, stored) else stored


def _of_trained(site: SiteFactors, trained: TrainedModule, base: BaseAtHand) -> Update | None:
    """ΔW of a weight, or of rows of it; None where it is the base's."""
    weight, tokens = trained.weight, trained.tokens
    if weight is None:
        return None
    stored = None if tokens is None else _unlike(site, trained.base_weight, base)
    if tokens is not None and stored is None:
        return _of_rows(site, trained, tokens, base)
    if tokens is not None and stored is not None:
        weight = stored.index_copy(token_axis(site.kind), tokens, weight.to(stored))
    if base.has_weight(site, weight):
        return None
    W = base.weight(site, "ΔW of a trained weight")
    return _dense(trained.strength * _difference(weight, W))


def _of_rows(
    site: SiteFactors, trained: TrainedModule, tokens: Int[Tensor, "row"], base: BaseAtHand
) -> Update | None:
    """One factor selects the rows, the other is their change; dense where they are many."""
    W, axis = base.weight(site, "ΔW of trained rows"), token_axis(site.kind)
    held, tokens = cast(Tensor, trained.weight), tokens.to(W.device)
    own = W.index_select(axis, tokens)
    if is_same(held, own):
        return None
    change = trained.strength * _difference(held, own)
    if len(tokens) > W.shape[1 - axis]:
        return _dense(torch.zeros_like(W, dtype=change.dtype).index_copy(axis, tokens, change))
    select = change.new_zeros(len(tokens), W.shape[axis])
    select[torch.arange(len(tokens)), tokens] = 1
    return Update(select, change, 1.0) if axis else Update(change, select.T, 1.0)


def _bias_change(site: SiteFactors, base: BaseAtHand) -> Float[Tensor, "out"] | None:
    """Δb = strength · (s·b_B + b' − b); None where the bias stays."""
    factors, change = site.factors, None
    trained = factors.trained_bias if isinstance(factors, LoRAFactors) else factors.bias
    if isinstance(factors, LoRAFactors) and factors.lora_bias is not None:
        change = factors.scale * in_float64(factors.lora_bias)
    if trained is not None:
        own = base.bias(site)
        if own is None:
            raise AdapterError(
                f"{site.name} ({site.module}): the adapter holds a trained bias, and the base "
                "model has none there; it was trained on another base model."
            )
        if not is_same(trained, own):
            wide = in_float64(trained)
            moved = wide - in_float64(own).to(wide.device)
            change = moved if change is None else change + moved
    elif isinstance(factors, TrainedModule) and factors.tokens is not None:
        # In PEFT's layer of trained rows a head has no bias.
        own = base.bias(site) if site.kind == "unembed" else None
        change = None if own is None or not bool(own.any()) else -in_float64(own)
    return None if change is None else change * factors.strength


def token_axis(kind: str) -> int:
    """The axis of tokens in a weight [out, in].

    Args:
        kind: of an embedding or a head.
    """
    return 0 if kind == "unembed" else 1


def summed(one: Update, other: Update) -> Update:
    """Two updates of one site as one.

    Args:
        one, other: of the same site.
    """
    device = float64_device(one.A.device)
    A = torch.cat([in_float64(u.A).to(device) for u in (one, other)])
    B = torch.cat([in_float64(u.B).to(device) * u.scale for u in (one, other)], 1)
    biases = [u.bias.to(device) for u in (one, other) if u.bias is not None]
    return Update(A, B, 1.0, torch.stack(biases).sum(0) if biases else None)


def _difference(held: Tensor, own: Tensor) -> Tensor:
    """held − own, where own lies, in no less than float32."""
    dtype = torch.promote_types(torch.promote_types(held.dtype, own.dtype), torch.float32)
    return held.to(own.device, dtype) - own.to(dtype)


def _dense(delta: Float[Tensor, "out in"]) -> Update:
    factors = dense_factors(delta)
    return Update(factors.A, factors.B, 1.0)
