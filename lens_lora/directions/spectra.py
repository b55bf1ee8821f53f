"""How large an adapter's updates are, and in how many directions: the spectrum of each ΔW.

1. ΔW = s·B·A is never built. With the QR factors B = Q_B R_B and Aᵀ = Q_A R_A,

       s·B·A = Q_B (s·R_B R_Aᵀ) Q_Aᵀ,

   so its singular values are those of s·R_B R_Aᵀ, a matrix of at most rank × rank.
2. With a lens a row is a site (a fused projection is several) and has ‖ΔW‖ / ‖W‖. Both are in the
   Hugging Face basis, so the hooked model must be unprocessed.
3. What depends on the base model's parameters (DoRA, trained modules, trained biases) has no
   spectrum, or no ‖Δb‖, unless a lens gives them. A norm's ΔW is diag(Δγ), its Δb is Δβ.
4. How the weight changes of two adapters lie to each other, whatever their factors:

       cos = ⟨ΔW, ΔW′⟩ / (‖ΔW‖ ‖ΔW′‖),   ⟨ΔW, ΔW′⟩ = tr((U′ᵀU) Σ (V′ᵀV)ᵀ Σ′)
       cosines of the principal angles: singular values of VᵀV′ (what is read), of UᵀU′ (written)

   A rotation (GA, BG⁻¹) of the factors changes none of it. On the null scale U′ and V′ are
   uniformly random frames, and Σ′ is kept; angles are taken from the first coordinates, as a random
   frame lies to every fixed one alike. Changes of bias are left out. A norm has a cosine, and no
   frames.

No forward pass. Cost of a module: (in + out) · rank²; of a dense ΔW one decomposition.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from typing import Any, NamedTuple, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.compat import in_float64
from lens_lora.core import Adapter, LoRAFactors, LoraLens, ModuleUpdate, Result, Update, stored
from lens_lora.core.adapter.factors import size_of
from lens_lora.core.model.bases import is_centred
from lens_lora.core.model.basis import NormUpdate, svd_factors
from lens_lora.core.model.find_host import host_of
from lens_lora.core.model.host import Host
from lens_lora.core.model.sites import SiteFactors
from lens_lora.errors import ModelStateError
from lens_lora.families import FAMILIES
from lens_lora.formats.arithmetic import orthonormal

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
    singular_values: Float[Tensor, " direction"]
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
        """‖ΔW‖_F² / ‖ΔW‖₂² = Σσ² / σ₁²: between 1 and the rank, 0 for ΔW = 0, NaN if unknown."""
        if not len(self.singular_values):
            return math.nan
        first = self.spectral_norm
        return float((self.singular_values / first).square().sum()) if first else 0.0

    @property
    def relative_norm(self) -> float:
        """‖ΔW‖_F / ‖W‖_F; NaN without a lens."""
        return self.norm / self.weight_norm if self.weight_norm else math.nan


def singular_values(factors: LoRAFactors) -> Float[Tensor, " direction"]:
    """Those of s·B·A that can be nonzero, min(rank, in, out) of them, descending, in float64.

    Biases, and DoRA's magnitude, are no part of it. Of experts those of each, in one order.
    """
    if factors.experts > 1:
        return torch.cat(list(map(singular_values, factors.by_expert()))).sort(descending=True)[0]
    reads, writes = (torch.linalg.qr(in_float64(X), mode="r").R for X in (factors.A.T, factors.B))
    return abs(factors.scale * factors.strength) * torch.linalg.svdvals(writes @ reads.T)


_OUTSIDE = {"embed": "embeddings", "pos_embed": "embeddings", "unembed": "head"}


@final
class AdapterSummary(Result):
    """What an adapter is: one row per module, or with a lens per site.

    Attributes:
        name: the adapter's.
        base_model: the base that it names.
        model: name and class of the lens' model; None without a lens.
        module_count: modules that the adapter adapts.
        rows: in the adapter's order, or with a lens in that of a forward pass.
        missing: modules that the lens does not cover (their rows have no site).
        unchanged: modules of which the adapter holds what the lens' model has (no site either).
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
        """'self_attn.q_proj' → in how many layers it is adapted."""
        return dict(Counter(row.target for row in self._modules()))

    @property
    def ranks(self) -> dict[int, int]:
        """Rank → how many modules have factors of it."""
        return self._counted("rank")

    @property
    def scales(self) -> dict[float, int]:
        """s → how many modules have factors of it."""
        return self._counted("scale")

    @property
    def parts(self) -> dict[str, int]:
        """'DoRA', 'lora_bias', 'embeddings', 'head', … → how many modules have or are it."""
        parts = Counter[str]()
        for row in self._modules():
            parts.update((*row.parts, *filter(None, [_outside_blocks(row.module)])))
        return dict(parts)

    @property
    def norm(self) -> float:
        """√Σ‖ΔW‖_F² over everything; NaN where a spectrum is unknown."""
        return math.sqrt(sum(row.norm**2 for row in self.rows))

    @property
    def relative_norm(self) -> float:
        """√Σ‖ΔW‖_F² / √Σ‖W‖_F² over the sites; NaN without a lens.

        A weight that several adapters of a sum change counts once.
        """
        sites = [row for row in self.rows if row.site is not None]
        weights = {str(row.site).partition("@")[0]: row.weight_norm for row in sites}
        weight = math.hypot(*weights.values())
        return math.hypot(*(row.norm for row in sites)) / weight if weight else math.nan

    @property
    def trained_whole(self) -> tuple[str, ...]:
        """Modules that were trained themselves: their weight, not factors beside it."""
        return tuple(dict.fromkeys(r.module for r in self.rows if set(r.parts) & set(TRAINED)))

    @property
    def bias_norm(self) -> float:
        """√Σ‖Δb‖² over everything, beside `norm`; NaN where a bias was trained."""
        return math.sqrt(sum(row.bias_norm**2 for row in self.rows))

    def top(self, k: int | None = None) -> tuple[Spectrum, ...]:
        """The rows of largest ‖ΔW‖_F, unknown ones last.

        Args:
            k: the number of rows; None for all.
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

    def _counted(self, name: str) -> dict[Any, int]:
        counts = Counter(getattr(row, name) for row in self._modules() if row.has_factors)
        return dict(sorted(counts.items()))

    def _modules(self) -> list[Spectrum]:
        """One row of each module, however many sites it has, in the order of their names."""
        rows = {row.module: row for row in self.rows}
        return [rows[name] for name in sorted(rows)]


def summarise(adapter: Adapter, lens: LoraLens | None = None) -> AdapterSummary:
    """Spectrum and size of every update. No forward pass."""
    covered = () if lens is None else _site_spectra(lens)
    in_lens = {} if lens is None else lens.adapter.modules
    of_sites = {row.module for row in covered}
    rest = [key for key in adapter.modules if key not in of_sites]
    unchanged = tuple(key for key in rest if key in in_lens)
    nothing = {"singular_values": torch.zeros(1, dtype=torch.float64), "bias_norm": 0.0}
    rows = [_module_spectrum(key, adapter.modules[key]) for key in rest]
    others = [dataclasses.replace(r, **nothing) if r.module in unchanged else r for r in rows]
    about = {} if lens is None else lens.describe()
    return AdapterSummary(
        name=adapter.name,
        base_model=adapter.base_model,
        model=f"{about['model']} ({about['model_class']})" if about else None,
        module_count=len(adapter),
        rows=(*covered, *others),
        missing=() if lens is None else tuple(key for key in rest if key not in in_lens),
        unchanged=unchanged,
    )


def _site_spectra(lens: LoraLens) -> tuple[Spectrum, ...]:
    """One for each site of an unprocessed model, in the order of a forward pass."""
    host, rows = host_of(lens.model), list[Spectrum]()
    for site_update in lens.plan.updates:
        site, update = site_update.site, site_update.update
        if isinstance(update, NormUpdate):
            weight, sizes, bias = host.norm_affine(site)[0], update.gamma, update.beta
            sigma = in_float64(sizes).abs().sort(descending=True).values
        else:
            weight, bias = _base_weight(host, site), update.bias
            sigma = update.A.new_zeros(1, dtype=torch.float64)
            if len(update.A):
                plain = LoRAFactors(update.A, update.B, update.scale, experts=update.experts)
                sigma = singular_values(plain)
        row = _module_spectrum(site.key, lens.adapter.modules[site.key])
        norms = {"weight_norm": size_of(weight), "bias_norm": size_of(bias)}
        rows.append(dataclasses.replace(row, site=site.name, singular_values=sigma, **norms))
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


def _module_spectrum(module: str, update: ModuleUpdate) -> Spectrum:
    """Of a module, without a base model."""
    sigma = torch.empty(0, dtype=torch.float64)
    if isinstance(update, LoRAFactors):
        scale = update.scale * update.strength
        sigma = sigma if update.needs_base_weight else singular_values(update)
    else:
        scale = update.strength
        sigma = sigma.new_zeros(1) if update.weight is None else sigma
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


def lacking(adapter: Adapter, model: Any) -> tuple[str, ...]:
    """The adapter's modules that a hooked model lacks, by name alone."""
    host = host_of(model)
    places = {key: host.family.place(key.partition("@")[0]) for key in adapter.modules}
    return tuple(
        key for key, place in places.items() if place is None or (place.layer or 0) >= host.n_layers
    )


def _outside_blocks(key: str) -> str | None:
    """'embeddings' or 'head' for a module that some family has outside its layers."""
    for family in FAMILIES:
        place = family.place(key.partition("@")[0])
        if place is not None and place.layer is None:
            return _OUTSIDE.get(place.kinds[0])
    return None


# --- two updates of one site


@dataclasses.dataclass(frozen=True, eq=False)
class Thin:
    """ΔW = UΣVᵀ in float64, the directions with σ > 0.

    Attributes:
        U: the directions that are written.
        sigma: the largest first; of a stack of experts those of each, one after another.
        V: those that are read; None of a norm, whose σ is Δγ itself.
        parts: of a stack, each expert's own; U and V are None, as experts share no space.
    """

    U: Float[Tensor, "out few"] | None
    sigma: Float[Tensor, " few"]
    V: Float[Tensor, "in few"] | None
    parts: tuple[Thin, ...] = ()


class Pair(NamedTuple):
    """Two updates of one site.

    Attributes:
        inner: ⟨ΔW, ΔW′⟩.
        read, write: cosines of the principal angles, the largest first; empty of a norm.
    """

    inner: float
    read: Float[Tensor, " angle"]
    write: Float[Tensor, " angle"]


def thin_updates(lens: LoraLens) -> dict[str, Thin]:
    """The SVD of each site's ΔW, by site name."""
    pairs = zip(lens.sites, lens.plan.updates, strict=True)
    return {site.name: _thin(site_update.update) for site, site_update in pairs}


def _thin(update: Update | NormUpdate) -> Thin:
    if isinstance(update, NormUpdate):
        return Thin(None, update.gamma.detach().cpu().double(), None)
    if update.experts:
        parts = tuple(map(_thin, update.by_expert()))
        return Thin(None, torch.cat([part.sigma for part in parts]), None, parts)
    reads, writes, sigma = svd_factors(update)
    kept = sigma > 0
    return Thin(writes[:, kept], sigma[kept], reads[kept].T / sigma[kept])


def compared(mine: Thin, theirs: Thin, generator: torch.Generator | None = None) -> Pair:
    """Inner product and principal angles; with a generator of `theirs` in random directions.

    Of stacks, the sum over experts, and the angles of each expert with the same one.
    """
    if mine.parts:
        pairs = [compared(*both, generator) for both in zip(mine.parts, theirs.parts, strict=True)]
        inner, *angles = zip(*pairs, strict=True)
        read, write = (torch.cat(cosines).sort(descending=True).values for cosines in angles)
        return Pair(math.fsum(inner), read, write)
    if mine.U is None or mine.V is None or theirs.U is None or theirs.V is None:
        is_known = mine.U is None and theirs.U is None and generator is None
        inner = float(mine.sigma @ theirs.sigma) if is_known else math.nan
        return Pair(inner, mine.sigma.new_zeros(0), mine.sigma.new_zeros(0))
    frames = (mine.V, theirs.V), (mine.U, theirs.U)
    if generator is None:
        read, write = (own.T @ other for own, other in frames)
    else:
        read, write = (
            orthonormal(len(own), other.shape[1], generator)[: own.shape[1]]
            for own, other in frames
        )
    inner = float(torch.einsum("i,j,ij,ij->", mine.sigma, theirs.sigma, read, write))
    return Pair(inner, _cosines(read), _cosines(write))


def _cosines(product: Float[Tensor, "few few2"]) -> Float[Tensor, " angle"]:
    if not product.numel():
        return product.new_zeros(0)
    return torch.linalg.svdvals(product).clamp(max=1.0)
