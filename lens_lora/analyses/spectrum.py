"""The spectrum of one ΔW: of a module, or with a lens of a site.

1. ΔW = s·B·A is never built. With the QR factors B = Q_B R_B and Aᵀ = Q_A R_A,

       s·B·A = Q_B (s·R_B R_Aᵀ) Q_Aᵀ,

   so its singular values are those of s·R_B R_Aᵀ, a matrix of at most rank × rank.
2. What depends on the base model's parameters (DoRA, trained modules, trained biases) has no
   spectrum, or no ‖Δb‖, unless a lens gives them. A norm's ΔW is diag(Δγ), its Δb is Δβ.

Cost of a module: (in + out) · rank²; of a dense ΔW one decomposition.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.adapters.factors import LoRAFactors
from lens_lora.adapters.trained import ModuleUpdate
from lens_lora.errors import ModelStateError
from lens_lora.float64 import in_float64
from lens_lora.hooked.host import Host
from lens_lora.hooked.hosts import host_of
from lens_lora.hooked.norm_map import NormUpdate
from lens_lora.hooked.processing import is_centred
from lens_lora.hooked.site_factors import SiteFactors
from lens_lora.lens import LoraLens
from lens_lora.results.storage import stored

__all__ = [
    "TRAINED",
    "Spectrum",
    "module_spectrum",
    "singular_values",
    "site_spectra",
    "stable_rank",
]

TRAINED = ("trained weight", "trained rows", "trained norm")
_WITHOUT_FACTORS = (*TRAINED, "bias alone")


@final
@stored
@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """One ΔW: of a module, or with a lens of a site.

    Attributes:
        module: Hugging Face path.
        site: name of the site; None without a lens, or where the model lacks it.
        target: the module within its layer, 'self_attn.q_proj'.
        parts: what stands beside s·B·A, or in its place: 'DoRA', 'lora_bias', 'trained bias',
            'trained weight', 'trained rows', 'trained norm', 'bias alone'.
        rank: r; of a trained module the rank that its ΔW may have.
        scale: s, with the adapter's strength in it; of a trained module that strength.
        singular_values: of ΔW, descending, those that its rank allows to be nonzero; empty where
            it depends on the base model, and there is no lens.
        weight_norm: ‖W‖_F of the base, or ‖γ‖; NaN without a lens.
        bias_norm: ‖Δb‖, which is no part of ΔW; NaN for a trained bias without a lens.
    """

    module: str
    site: str | None
    target: str
    parts: tuple[str, ...]
    rank: int
    scale: float
    singular_values: Float[Tensor, "direction"]
    weight_norm: float
    bias_norm: float

    @property
    def has_factors(self) -> bool:
        """Whether the update is s·B·A, perhaps with more beside it; a trained module is not."""
        return not set(self.parts) & set(_WITHOUT_FACTORS)

    @property
    def norm(self) -> float:
        """‖ΔW‖_F; NaN where the spectrum is unknown."""
        return float(self.singular_values.norm()) if len(self.singular_values) else math.nan

    @property
    def spectral_norm(self) -> float:
        """‖ΔW‖₂ = σ₁; NaN where the spectrum is unknown."""
        return float(self.singular_values[0]) if len(self.singular_values) else math.nan

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖_F² / ‖ΔW‖₂²; NaN where the spectrum is unknown."""
        return stable_rank(self.singular_values) if len(self.singular_values) else math.nan

    @property
    def relative_norm(self) -> float:
        """‖ΔW‖_F / ‖W‖_F; NaN without a lens."""
        return self.norm / self.weight_norm if self.weight_norm else math.nan


def singular_values(factors: LoRAFactors) -> Float[Tensor, "direction"]:
    """Those of s·B·A that can be nonzero, min(rank, in, out) of them, descending, in float64.

    Biases, and DoRA's magnitude, are no part of it.

    Args:
        factors: of one module.
    """
    reads, writes = (
        torch.linalg.qr(in_float64(matrix), mode="r").R for matrix in (factors.A.T, factors.B)
    )
    scale = abs(factors.scale * factors.strength)
    return scale * torch.linalg.svdvals(writes @ reads.T)


def stable_rank(sigma: Float[Tensor, "direction"]) -> float:
    """‖ΔW‖_F² / ‖ΔW‖₂² = Σσ² / σ₁²: between 1 and the rank, and 0 for ΔW = 0.

    Args:
        sigma: singular values, descending.
    """
    first = float(sigma[0])
    return float((sigma / first).square().sum()) if first else 0.0


def site_spectra(lens: LoraLens) -> tuple[Spectrum, ...]:
    """One for each site of an unprocessed model, in the order of a forward pass.

    Args:
        lens: the adapter over the model.

    Raises:
        ModelStateError: the model was processed.
    """
    host, rows = host_of(lens.model), []
    for one in lens.plan.updates:
        site, update = one.site, one.update
        key = f"{site.module}@{site.adapter}" if site.adapter else site.module
        held = lens.adapter.modules[key]
        if isinstance(update, NormUpdate):
            weight, sizes, bias = host.norm_affine(site)[0], update.gamma, update.beta
            sigma = in_float64(sizes).abs().sort(descending=True).values
        else:
            weight, bias = _base_weight(host, site), update.bias
            sigma = update.A.new_zeros(1, dtype=torch.float64)
            if len(update.A):
                sigma = singular_values(LoRAFactors(update.A, update.B, update.scale))
        row = dataclasses.replace(
            module_spectrum(key, held),
            site=site.name,
            singular_values=sigma,
            weight_norm=float(in_float64(weight).norm()),
            bias_norm=0.0 if bias is None else float(in_float64(bias).norm()),
        )
        rows.append(row)
    return tuple(rows)


def _base_weight(host: Host, site: SiteFactors) -> Float[Tensor, "out in"]:
    """W of the Hugging Face base, in float64."""
    weight = host.weight(site.layer, site.kind)
    if host.needs_base() or is_centred(weight):
        raise ModelStateError(
            f"{site.name}: this {host.class_name} was processed, so its weights are not those that "
            "the adapter was added to. Load it unprocessed (from_pretrained_no_processing, or a "
            "TransformerBridge before enable_compatibility_mode)."
        )
    return in_float64(weight) / host.embedding_scale(site.kind)


def module_spectrum(module: str, update: ModuleUpdate) -> Spectrum:
    """Of a module, without a base model.

    Args:
        module: the adapter's key.
        update: of the module.
    """
    sigma = torch.empty(0, dtype=torch.float64)
    if isinstance(update, LoRAFactors):
        scale = update.scale * update.strength
        sigma = sigma if update.needs_base_weight else singular_values(update)
    else:
        scale, sigma = update.strength, sigma.new_zeros(1) if update.weight is None else sigma
    return Spectrum(
        module=module,
        site=None,
        target=_target(module),
        parts=_parts(update),
        rank=update.rank,
        scale=scale,
        singular_values=sigma,
        weight_norm=math.nan,
        bias_norm=update.bias_norm(),
    )


def _parts(update: ModuleUpdate) -> tuple[str, ...]:
    if isinstance(update, LoRAFactors):
        beside = {
            "DoRA": update.magnitude,
            "lora_bias": update.lora_bias,
            "trained bias": update.trained_bias,
        }
        return tuple(name for name, tensor in beside.items() if tensor is not None)
    if update.weight is None:
        return ("bias alone",)
    if update.tokens is not None:
        return ("trained rows",)
    return ("trained norm",) if update.weight.ndim == 1 else ("trained weight",)


def _target(key: str) -> str:
    """'model.layers.3.self_attn.q_proj' → 'self_attn.q_proj'; outside the layers, the last name."""
    path = key.partition("@")[0]
    within = re.split(r"\.\d+\.", path)[-1]
    return within if within != path else path.rpartition(".")[2]
