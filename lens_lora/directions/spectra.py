"""The spectrum of each ΔW: how large an update is, and in how many directions.

1. ΔW = s·B·A is never built. With the QR factors B = Q_B R_B and Aᵀ = Q_A R_A,

       s·B·A = Q_B (s·R_B R_Aᵀ) Q_Aᵀ,

   so its singular values are those of s·R_B R_Aᵀ, a matrix of at most rank × rank.
2. Without a lens there is a row for each module. With a lens there is one for each site (a fused
   projection has several), which also has ‖ΔW‖ / ‖W‖. Both norms are in Hugging Face's basis, so
   the hooked model must be unprocessed.
3. An update that depends on the base model's parameters (DoRA, trained modules, trained biases) has
   no spectrum, or no ‖Δb‖, unless a lens gives those parameters. A norm's ΔW is diag(Δγ), and its
   Δb is Δβ.

No forward pass is run. A module costs (in + out) · rank², and a dense ΔW one decomposition.
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

from lens_lora.arguments import whole
from lens_lora.compat import in_float64
from lens_lora.core import (
    Adapter,
    LoRAFactors,
    LoraLens,
    ModuleUpdate,
    Result,
    Update,
    host_of,
    storage,
)
from lens_lora.families import FAMILIES

# The parts of an update whose full weight was trained, and of every update without factors.
TRAINED = ("trained weight", "trained rows", "trained norm")
_WITHOUT_FACTORS = (*TRAINED, "bias alone")
# The names of modules outside the layers, by kind.
_OUTSIDE = {"embed": "embeddings", "pos_embed": "embeddings", "unembed": "head"}


@final
@storage.stored
@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """The spectrum of one ΔW, of a module or, with a lens, of a site.

    Attributes:
        module: its Hugging Face path.
        site: the name of the site; None without a lens, or if the model lacks it.
        target: the module within its layer, 'self_attn.q_proj'.
        parts: the parts beside s·B·A, or instead of it: 'DoRA', 'lora_bias', 'trained bias',
            'trained weight', 'trained rows', 'trained norm', 'bias alone'.
        rank: r; for a trained module the rank that its ΔW may have.
        scale: s times the adapter's strength; for a trained module that strength alone.
        singular_values: the singular values of ΔW that its rank allows to be nonzero, descending;
            empty if ΔW depends on the base model and there is no lens.
        weight_norm: ‖W‖_F of the base, or ‖γ‖; NaN without a lens.
        bias_norm: ‖Δb‖, which is not part of ΔW; NaN for a trained bias without a lens.
        layer, kind: the layer and the kind of the site; None if there is no site.
    """

    module: str
    site: str | None
    target: str
    parts: tuple[str, ...]
    rank: int
    scale: float
    singular_values: Float[Tensor, " direction"]
    weight_norm: float
    bias_norm: float
    layer: int | None = None
    kind: str | None = None

    @property
    def has_factors(self) -> bool:
        """Whether the update contains s·B·A; a module whose full weight was trained does not."""
        return not set(self.parts) & set(_WITHOUT_FACTORS)

    @property
    def norm(self) -> float:
        """The Frobenius norm ‖ΔW‖_F; NaN if the spectrum is unknown."""
        if not len(self.singular_values):
            return math.nan
        return float(self.singular_values.norm())

    @property
    def spectral_norm(self) -> float:
        """The spectral norm ‖ΔW‖₂ = σ₁; NaN if the spectrum is unknown."""
        if not len(self.singular_values):
            return math.nan
        return float(self.singular_values[0])

    @property
    def stable_rank(self) -> float:
        """The stable rank ‖ΔW‖_F² / ‖ΔW‖₂² = Σσ² / σ₁², between 1 and the rank.

        It is 0 if ΔW = 0, and NaN if the spectrum is unknown.
        """
        if not len(self.singular_values):
            return math.nan
        first = self.spectral_norm
        if first == 0:
            return 0.0
        return float((self.singular_values / first).square().sum())

    @property
    def relative_norm(self) -> float:
        """The size of the update relative to the weight, ‖ΔW‖_F / ‖W‖_F; NaN without a lens."""
        if not self.weight_norm:
            return math.nan
        return self.norm / self.weight_norm

    def columns(self) -> dict[str, Any]:
        """The columns of a table of spectra, by name."""
        return {
            "site": self.site,
            "module": self.module,
            "layer": self.layer,
            "kind": self.kind,
            "target": self.target,
            "rank": self.rank,
            "scale": self.scale,
            "norm": self.norm,
            "relative_norm": self.relative_norm,
            "spectral_norm": self.spectral_norm,
            "stable_rank": self.stable_rank,
            "bias_norm": self.bias_norm,
            "parts": ", ".join(self.parts),
            "singular_values": self.singular_values.tolist(),
        }


def singular_values(factors: LoRAFactors) -> Float[Tensor, " direction"]:
    """The singular values of s·B·A that can be nonzero, descending, in float64.

    There are min(rank, in, out) of them. Biases and DoRA's magnitude are left out. The singular
    values of all experts of a stack are sorted together.

    Args:
        factors: the factors of one module.
    """
    if factors.experts > 1:
        of_each = [singular_values(expert) for expert in factors.by_expert()]
        return torch.cat(of_each).sort(descending=True).values
    R_A = torch.linalg.qr(in_float64(factors.A.T), mode="r").R
    R_B = torch.linalg.qr(in_float64(factors.B), mode="r").R
    return abs(factors.scale * factors.strength) * torch.linalg.svdvals(R_B @ R_A.T)


@final
class AdapterSummary(Result):
    """The size of an adapter's updates, with a row for each module or, with a lens, for each site.

    Attributes:
        name: the adapter's name.
        base_model: the base that it names.
        model: name and class of the lens' model; None without a lens.
        module_count: the number of modules that the adapter changes.
        rows: the rows, in the adapter's order; with a lens, in the order of a forward pass.
        missing: the modules that the lens does not cover; their rows have no site.
        unchanged: the modules whose weights are the same in the adapter and in the lens' model;
            their rows have no site either.
    """

    name: str
    base_model: str | None
    model: str | None
    module_count: int
    rows: tuple[Spectrum, ...]
    missing: tuple[str, ...]
    unchanged: tuple[str, ...] = ()

    @property
    def targets(self) -> dict[str, int]:
        """The number of layers in which each target, such as 'self_attn.q_proj', is adapted."""
        return dict(Counter(row.target for row in self._modules()))

    @property
    def ranks(self) -> dict[int, int]:
        """The number of modules with factors of each rank."""
        return self._counted("rank")

    @property
    def scales(self) -> dict[float, int]:
        """The number of modules with factors of each scale s."""
        return self._counted("scale")

    @property
    def parts(self) -> dict[str, int]:
        """The number of modules with each part, such as 'DoRA', 'embeddings' or 'head'."""
        parts = Counter[str]()
        for row in self._modules():
            parts.update(row.parts)
            outside = _outside_blocks(row.module)
            if outside is not None:
                parts.update([outside])
        return dict(parts)

    @property
    def norm(self) -> float:
        """The norm √Σ‖ΔW‖_F² over all rows; NaN if a spectrum is unknown."""
        return math.sqrt(sum(row.norm**2 for row in self.rows))

    @property
    def relative_norm(self) -> float:
        """The relative norm √Σ‖ΔW‖_F² / √Σ‖W‖_F² over the sites; NaN without a lens.

        A weight that several adapters of a sum change counts once.
        """
        norms: list[float] = []
        weight_norms: dict[str, float] = {}
        for row in self.rows:
            if row.site is not None:
                # If there are several adapters, the name of a site ends in '@' and the adapter.
                weight, _, _ = row.site.partition("@")
                weight_norms[weight] = row.weight_norm
                norms.append(row.norm)
        norm_of_weights = math.hypot(*weight_norms.values())
        if not norm_of_weights:
            return math.nan
        return math.hypot(*norms) / norm_of_weights

    @property
    def trained_whole(self) -> tuple[str, ...]:
        """Modules whose weight itself was trained, without factors."""
        modules = [row.module for row in self.rows if set(row.parts) & set(TRAINED)]
        return tuple(dict.fromkeys(modules))

    @property
    def bias_norm(self) -> float:
        """The norm √Σ‖Δb‖² of biases, which `norm` leaves out; NaN if one is unknown."""
        return math.sqrt(sum(row.bias_norm**2 for row in self.rows))

    def top(self, k: int | None = None) -> tuple[Spectrum, ...]:
        """The rows with the largest ‖ΔW‖_F; those whose norm is unknown come last.

        Args:
            k: the number of rows; None for all.

        Raises:
            ArgumentError: k is not a whole number, or is below 0.
        """
        count = None if k is None else whole("k", k, 0)

        def unknown_last(row: Spectrum) -> float:
            return math.inf if math.isnan(row.norm) else -row.norm

        return tuple(sorted(self.rows, key=unknown_last)[:count])

    def to_frame(self) -> pd.DataFrame:
        """One row per module or site."""
        frame = pd.DataFrame([row.columns() for row in self.rows])
        # A column of whole numbers, although some modules have no layer.
        return frame.astype({"layer": "Int64"})

    def _counted(self, name: str) -> dict[Any, int]:
        counts = Counter(getattr(row, name) for row in self._modules() if row.has_factors)
        return dict(sorted(counts.items()))

    def _modules(self) -> list[Spectrum]:
        """One row for each module, also if it has several sites, in the order of their names."""
        rows = {row.module: row for row in self.rows}
        return [rows[name] for name in sorted(rows)]


def summarise(adapter: Adapter, lens: LoraLens | None = None) -> AdapterSummary:
    """The spectrum and size of every update of an adapter. Nothing is run.

    Args:
        adapter: any adapter.
        lens: the adapter, or the part of it that fits, over a model; None without a model.

    Raises:
        ModelStateError: the lens' model is processed.
    """
    if lens is None:
        return AdapterSummary(
            name=adapter.name,
            base_model=adapter.base_model,
            model=None,
            module_count=len(adapter),
            rows=tuple(_module_spectrum(key, update) for key, update in adapter.modules.items()),
            missing=(),
        )
    rows = list(_site_spectra(lens))
    missing: list[str] = []
    unchanged: list[str] = []
    of_sites = {row.module for row in rows}
    for key, update in adapter.modules.items():
        if key in of_sites:
            continue
        row = _module_spectrum(key, update)
        if key in lens.adapter.modules:
            # It has no site in the lens, because the adapter's weight is the one of the model.
            unchanged.append(key)
            zero = torch.zeros(1, dtype=torch.float64)
            row = dataclasses.replace(row, singular_values=zero, bias_norm=0.0)
        else:
            missing.append(key)
        rows.append(row)
    about = lens.describe()
    return AdapterSummary(
        name=adapter.name,
        base_model=adapter.base_model,
        model=f"{about['model']} ({about['model_class']})",
        module_count=len(adapter),
        rows=tuple(rows),
        missing=tuple(missing),
        unchanged=tuple(unchanged),
    )


def _site_spectra(lens: LoraLens) -> tuple[Spectrum, ...]:
    """The spectrum of each site of an unprocessed model, in the order of a forward pass."""
    host = host_of(lens.model)
    rows: list[Spectrum] = []
    for site_update in lens.updates:
        site = site_update.site
        norm = site_update.norm
        if norm is not None:
            weight, _ = host.norm_affine(site)
            sigma = in_float64(norm.gamma).abs().sort(descending=True).values
            bias = norm.beta
        else:
            update = site_update.linear
            weight = host.unprocessed_weight(site)
            sigma = _singular_values_at(update)
            bias = update.bias
        row = dataclasses.replace(
            _module_spectrum(site.key, lens.adapter.modules[site.key]),
            site=site.name,
            layer=site.layer,
            kind=site.kind,
            singular_values=sigma,
            weight_norm=_size_of(weight),
            bias_norm=_size_of(bias),
        )
        rows.append(row)
    return tuple(rows)


def _size_of(tensor: Tensor | None) -> float:
    """‖t‖ in float64; 0 for None."""
    return 0.0 if tensor is None else float(in_float64(tensor.detach()).norm())


def _singular_values_at(update: Update) -> Float[Tensor, " direction"]:
    """The singular values of one site's ΔW; a single zero if only its bias changes."""
    if not len(update.A):
        return update.A.new_zeros(1, dtype=torch.float64)
    plain = LoRAFactors(update.A, update.B, update.scale, experts=update.experts)
    return singular_values(plain)


def _module_spectrum(module: str, update: ModuleUpdate) -> Spectrum:
    """The spectrum of a module's update, as far as it is known without a base model."""
    sigma = torch.empty(0, dtype=torch.float64)
    scale = update.strength
    if isinstance(update, LoRAFactors):
        scale *= update.scale
        if not update.needs_base_weight:
            sigma = singular_values(update)
    elif update.weight is None:
        # Only the bias was trained, so ΔW = 0.
        sigma = torch.zeros(1, dtype=torch.float64)
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
    """The names of the parts beside s·B·A, or instead of it."""
    if isinstance(update, LoRAFactors):
        added = {
            "DoRA": update.magnitude,
            "lora_bias": update.lora_bias,
            "trained bias": update.trained_bias,
        }
        return tuple(name for name, tensor in added.items() if tensor is not None)
    if update.weight is None:
        return ("bias alone",)
    if update.tokens is not None:
        return ("trained rows",)
    if update.weight.ndim == 1:
        return ("trained norm",)
    return ("trained weight",)


def _target(key: str) -> str:
    """The module's path within its layer, 'self_attn.q_proj'; outside layers, its last name."""
    path = key.partition("@")[0]
    *_, within = re.split(r"\.\d+\.", path)
    if within == path:
        return path.rpartition(".")[2]
    return within


def lacking(adapter: Adapter, model: Any) -> tuple[str, ...]:
    """The adapter's modules that a hooked model lacks, judged by their names alone.

    Args:
        adapter: any adapter.
        model: the hooked model.
    """
    host = host_of(model)
    missing: list[str] = []
    for key in adapter.modules:
        place = host.family.place(key.partition("@")[0])
        # A module outside the layers has no layer.
        if place is None or (place.layer or 0) >= host.n_layers:
            missing.append(key)
    return tuple(missing)


def _outside_blocks(key: str) -> str | None:
    """'embeddings' or 'head' for a module that some family has outside its layers."""
    for family in FAMILIES:
        place = family.place(key.partition("@")[0])
        if place is not None and place.layer is None:
            return _OUTSIDE.get(place.kinds[0])
    return None
