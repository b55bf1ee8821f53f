"""How large an adapter's updates are, and in how many directions: the spectrum of each ΔW.

1. ΔW = s·B·A is never built. With the QR factors B = Q_B R_B and Aᵀ = Q_A R_A,

       s·B·A = Q_B (s·R_B R_Aᵀ) Q_Aᵀ,

   so its singular values are those of s·R_B R_Aᵀ, a matrix of at most rank × rank.
2. What depends on the base model's parameters (DoRA, trained modules, trained biases) has no
   spectrum, or no ‖Δb‖, unless a lens gives them. A norm's ΔW is diag(Δγ), its Δb is Δβ.
3. With a lens a row is a site (a fused projection is several) and has ‖ΔW‖ / ‖W‖. Both are in the
   Hugging Face basis, so the hooked model must be unprocessed.

No forward pass. Cost of a module: (in + out) · rank²; of a dense ΔW one decomposition.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from typing import Any, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.adapters.adapter import Adapter
from lens_lora.adapters.factors import LoRAFactors
from lens_lora.adapters.trained import ModuleUpdate
from lens_lora.errors import ModelStateError
from lens_lora.families import FAMILIES
from lens_lora.hooked.basis import is_centred
from lens_lora.hooked.host import Host
from lens_lora.hooked.hosts import host_of
from lens_lora.hooked.norm_map import NormUpdate
from lens_lora.hooked.site_factors import SiteFactors
from lens_lora.lens import LoraLens
from lens_lora.results.measured import Result
from lens_lora.results.storage import stored

__all__ = ["AdapterSummary", "Spectrum", "lacking", "singular_values", "stable_rank", "summarise"]

_OUTSIDE = {"embed": "embeddings", "pos_embed": "embeddings", "unembed": "head"}


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
            'trained weight', 'trained rows', 'trained norm'.
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


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AdapterSummary(Result):
    """What an adapter is: one row per module, or with a lens per site.

    Attributes:
        name: the adapter's.
        base_model: the base that it names.
        model: name and class of the lens' model; None without a lens.
        module_count: modules that the adapter adapts.
        rows: in the adapter's order, or with a lens in that of a forward pass.
        missing: modules that the lens does not cover (their rows have no site).
    """

    name: str
    base_model: str | None
    model: str | None
    module_count: int
    rows: tuple[Spectrum, ...]
    missing: tuple[str, ...]

    @property
    def targets(self) -> dict[str, int]:
        """'self_attn.q_proj' → in how many layers it is adapted."""
        return dict(Counter(target for _, target, *_ in self._modules()))

    @property
    def ranks(self) -> dict[int, int]:
        """Rank → how many modules have it."""
        return dict(sorted(Counter(rank for *_, rank, _ in self._modules()).items()))

    @property
    def scales(self) -> dict[float, int]:
        """s → how many modules have it."""
        return dict(sorted(Counter(scale for *_, scale in self._modules()).items()))

    @property
    def parts(self) -> dict[str, int]:
        """'DoRA', 'lora_bias', 'embeddings', 'head', … → how many modules have or are it."""
        found = Counter[str]()
        for path, _, parts, *_ in self._modules():
            found.update((*parts, *filter(None, [_outside_blocks(path)])))
        return dict(found)

    @property
    def norm(self) -> float:
        """√Σ‖ΔW‖_F² over everything; NaN where a spectrum is unknown."""
        return math.sqrt(sum(row.norm**2 for row in self.rows))

    @property
    def bias_norm(self) -> float:
        """√Σ‖Δb‖² over everything, beside `norm`; NaN where a bias was trained."""
        return math.sqrt(sum(row.bias_norm**2 for row in self.rows))

    def top(self, k: int | None = None) -> tuple[Spectrum, ...]:
        """The k rows of largest ‖ΔW‖_F, unknown ones last.

        Args:
            k: how many; None for all.
        """
        known = sorted(self.rows, key=lambda r: math.inf if math.isnan(r.norm) else -r.norm)
        return tuple(known[:k])

    def to_frame(self) -> pd.DataFrame:
        """One row per module or site."""
        fields = ("module", "site", "target", "rank", "scale")
        numbers = ("norm", "relative_norm", "spectral_norm", "stable_rank", "bias_norm")
        rows = [
            {name: getattr(row, name) for name in fields + numbers}
            | {"parts": ", ".join(row.parts), "singular_values": row.singular_values.tolist()}
            for row in self.rows
        ]
        return pd.DataFrame(rows)

    def _modules(self) -> list[tuple[str, str, tuple[str, ...], int, float]]:
        """(path, target, parts, rank, scale) of each module once, however many sites it has."""
        return sorted({(r.module, r.target, r.parts, r.rank, r.scale) for r in self.rows})


def summarise(adapter: Adapter, lens: LoraLens | None = None) -> AdapterSummary:
    """Spectrum and size of every update. No forward pass.

    Args:
        adapter: whose updates are measured.
        lens: of this adapter, or of the part of it that the model has, over an unprocessed model;
            adds sites, ‖ΔW‖ / ‖W‖, and DoRA's numbers.

    Raises:
        ModelStateError: the lens' model was processed.
    """
    covered = () if lens is None else _site_rows(lens)
    of_sites = {row.module for row in covered}
    others = tuple(
        _row(path, update) for path, update in adapter.modules.items() if path not in of_sites
    )
    about = {} if lens is None else lens.describe()
    return AdapterSummary(
        name=adapter.name,
        base_model=adapter.base_model,
        model=f"{about['model']} ({about['model_class']})" if about else None,
        module_count=len(adapter),
        rows=covered + others,
        missing=() if lens is None else tuple(row.module for row in others),
    )


def lacking(adapter: Adapter, model: Any) -> tuple[str, ...]:
    """The adapter's modules that a hooked model lacks, by name alone.

    Args:
        adapter: whose modules are looked up.
        model: a HookedTransformer or a TransformerBridge.

    Raises:
        ModelStateError: no hooked model, or one of a family that is not supported.
    """
    host = host_of(model)
    places = {key: host.family.place(key.partition("@")[0]) for key in adapter.modules}
    return tuple(k for k, at in places.items() if at is None or (at.layer or 0) >= host.n_layers)


def singular_values(factors: LoRAFactors) -> Float[Tensor, "direction"]:
    """Those of s·B·A that can be nonzero, min(rank, in, out) of them, descending, in float64.

    Biases, and DoRA's magnitude, are no part of it.

    Args:
        factors: of one module.
    """
    reads, writes = (
        torch.linalg.qr(matrix.double(), mode="r").R for matrix in (factors.A.T, factors.B)
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


def _outside_blocks(key: str) -> str | None:
    """'embeddings' or 'head' for a module that some family has outside its layers."""
    for family in FAMILIES:
        place = family.place(key.partition("@")[0])
        if place is not None and place.layer is None:
            return _OUTSIDE.get(place.kinds[0])
    return None


def _site_rows(lens: LoraLens) -> tuple[Spectrum, ...]:
    host, rows = host_of(lens.model), []
    for one in lens.plan.updates:
        site, update = one.site, one.update
        key = f"{site.module}@{site.adapter}" if site.adapter else site.module
        held = lens.adapter.modules[key]
        if isinstance(update, NormUpdate):
            weight, sizes, bias = host.norm_affine(site)[0], update.gamma, update.beta
            sigma = sizes.double().abs().sort(descending=True).values
        else:
            weight, bias = _base_weight(host, site), update.bias
            sigma = singular_values(LoRAFactors(update.A, update.B, update.scale))
        row = dataclasses.replace(
            _row(key, held),
            site=site.name,
            singular_values=sigma,
            weight_norm=float(weight.double().norm()),
            bias_norm=0.0 if bias is None else float(bias.double().norm()),
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
    return weight.double() / host.embedding_scale(site.kind)


def _row(module: str, update: ModuleUpdate) -> Spectrum:
    """Without a base model."""
    is_known = isinstance(update, LoRAFactors) and not update.needs_base_weight
    has_scale = isinstance(update, LoRAFactors)
    return Spectrum(
        module=module,
        site=None,
        target=_target(module),
        parts=_parts(update),
        rank=update.rank,
        scale=(update.scale if has_scale else 1.0) * update.strength,
        singular_values=singular_values(update) if is_known else torch.empty(0).double(),
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
        return ("trained bias",)
    if update.tokens is not None:
        return ("trained rows",)
    return ("trained norm",) if update.weight.ndim == 1 else ("trained weight",)


def _target(key: str) -> str:
    """'model.layers.3.self_attn.q_proj' → 'self_attn.q_proj'; outside the layers, the last name."""
    path = key.partition("@")[0]
    within = re.split(r"\.\d+\.", path)[-1]
    return within if within != path else path.rpartition(".")[2]
