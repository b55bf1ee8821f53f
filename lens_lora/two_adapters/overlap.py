"""The angles between the weight changes of two adapters, whatever their factors.

With ΔW = UΣVᵀ and ΔW′ = U′Σ′V′ᵀ,

    cos = ⟨ΔW, ΔW′⟩ / (‖ΔW‖ ‖ΔW′‖),    ⟨ΔW, ΔW′⟩ = Σ_ij σ_i σ′_j (VᵀV′)_ij (UᵀU′)_ij

and the cosines of the principal angles are the singular values of VᵀV′ (of what is read) and of
UᵀU′ (of what is written). A rotation (GA, BG⁻¹) of the factors changes none of these.

The null scale is the same with U′ and V′ replaced by uniformly random frames, and Σ′ kept.

Changes of bias are left out. A norm has a cosine but no frames. Nothing here runs the model.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core import LoraLens, SiteUpdate
from lens_lora.formats.arithmetic import orthonormal


@dataclasses.dataclass(frozen=True, eq=False)
class ThinSVD:
    """ΔW = UΣVᵀ of one site in float64, with the directions of σ > 0 alone.

    Attributes:
        U: the directions that are written; None for a norm, and for a stack of experts.
        sigma: the singular values, the largest first. For a norm this is Δγ itself; for a stack
            of experts it holds those of each expert, one after another.
        V: the directions that are read; None where U is.
        experts: the SVD of each expert of a stack, as experts share no space.
    """

    U: Float[Tensor, "out few"] | None
    sigma: Float[Tensor, " few"]
    V: Float[Tensor, "in few"] | None
    experts: tuple[ThinSVD, ...] = ()


class Overlap(NamedTuple):
    """The angles between two updates of one site.

    Attributes:
        inner: ⟨ΔW, ΔW′⟩.
        read, write: cosines of the principal angles, the largest first; empty for a norm.
    """

    inner: float
    read: Float[Tensor, " angle"]
    write: Float[Tensor, " angle"]


def svd_of_sites(lens: LoraLens) -> dict[str, ThinSVD]:
    """The SVD of each site's ΔW, by site name.

    Args:
        lens: the adapter over the model.
    """
    by_site: dict[str, ThinSVD] = {}
    for site, site_update in zip(lens.sites, lens.updates, strict=True):
        by_site[site.name] = _svd(site_update)
    return by_site


def _svd(site_update: SiteUpdate) -> ThinSVD:
    norm = site_update.norm
    if norm is not None:
        return ThinSVD(None, norm.gamma.detach().cpu().double(), None)
    update = site_update.linear
    if update.experts:
        of_experts = [dataclasses.replace(site_update, update=each) for each in update.by_expert()]
        experts = tuple(map(_svd, of_experts))
        return ThinSVD(None, torch.cat([expert.sigma for expert in experts]), None, experts)
    reads, writes, sigma = site_update.svd()
    kept = sigma > 0
    U = writes[:, kept]
    V = reads[kept].T / sigma[kept]
    return ThinSVD(U, sigma[kept], V)


def overlap_of(mine: ThinSVD, theirs: ThinSVD, generator: torch.Generator | None = None) -> Overlap:
    """Inner product and principal angles of two updates of one site.

    For stacks of experts the inner product is the sum over experts, and the angles are those
    between each expert and the same expert of the other adapter.

    Args:
        mine, theirs: the SVD of each.
        generator: if it is given, `theirs` is turned into random directions first.
    """
    if mine.experts:
        return _overlap_of_experts(mine, theirs, generator)
    nothing = mine.sigma.new_zeros(0)
    if mine.U is None or mine.V is None or theirs.U is None or theirs.V is None:
        # A norm has Δγ alone, which has no random direction.
        inner = math.nan
        if mine.U is None and theirs.U is None and generator is None:
            inner = float(mine.sigma @ theirs.sigma)
        return Overlap(inner, nothing, nothing)

    if generator is None:
        read = mine.V.T @ theirs.V
        write = mine.U.T @ theirs.U
    else:
        read = _with_random_frame(mine.V, theirs.V.shape[1], generator)
        write = _with_random_frame(mine.U, theirs.U.shape[1], generator)
    inner = float(torch.einsum("i,j,ij,ij->", mine.sigma, theirs.sigma, read, write))
    return Overlap(inner, _cosines(read), _cosines(write))


def _overlap_of_experts(
    mine: ThinSVD, theirs: ThinSVD, generator: torch.Generator | None
) -> Overlap:
    overlaps = [
        overlap_of(expert, same_expert, generator)
        for expert, same_expert in zip(mine.experts, theirs.experts, strict=True)
    ]
    inner = math.fsum(overlap.inner for overlap in overlaps)
    read = torch.cat([overlap.read for overlap in overlaps])
    write = torch.cat([overlap.write for overlap in overlaps])
    return Overlap(inner, _largest_first(read), _largest_first(write))


def _largest_first(cosines: Float[Tensor, " angle"]) -> Float[Tensor, " angle"]:
    return cosines.sort(descending=True).values


def _with_random_frame(
    frame: Float[Tensor, "d few"], width: int, generator: torch.Generator
) -> Float[Tensor, "few width"]:
    """The products of a frame with a uniformly random frame of `width` vectors.

    The angles of a random frame to any fixed one have the same distribution, so the fixed frame is
    taken to be the first coordinates.
    """
    count = frame.shape[1]
    return orthonormal(len(frame), width, generator)[:count]


def _cosines(product: Float[Tensor, "few few2"]) -> Float[Tensor, " angle"]:
    """The singular values of the product of two frames."""
    if not product.numel():
        return product.new_zeros(0)
    return torch.linalg.svdvals(product).clamp(max=1.0)
