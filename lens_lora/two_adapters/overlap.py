"""How the weight changes of two adapters lie to each other, whatever their factors.

With ΔW = UΣVᵀ and ΔW′ = U′Σ′V′ᵀ,

    cos = ⟨ΔW, ΔW′⟩ / (‖ΔW‖ ‖ΔW′‖),    ⟨ΔW, ΔW′⟩ = tr((U′ᵀU) Σ (V′ᵀV)ᵀ Σ′)

and the cosines of the principal angles are the singular values of VᵀV′ (of what is read) and of
UᵀU′ (of what is written). A rotation (GA, BG⁻¹) of the factors changes none of these.

The null scale is the same with U′ and V′ replaced by uniformly random frames, and Σ′ kept. A random
frame lies to every fixed one alike, so the fixed one is that of the first coordinates.

Changes of bias are left out. A norm has a cosine, and no frames. No forward pass.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core import LoraLens, NormUpdate, Update, svd_factors
from lens_lora.formats.arithmetic import orthonormal


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
    """The SVD of each site's ΔW, by site name.

    Args:
        lens: the adapter over the model.
    """
    thin: dict[str, Thin] = {}
    for site, site_update in zip(lens.sites, lens.updates, strict=True):
        thin[site.name] = _thin(site_update.update)
    return thin


def _thin(update: Update | NormUpdate) -> Thin:
    """The SVD of one update."""
    if isinstance(update, NormUpdate):
        return Thin(None, update.gamma.detach().cpu().double(), None)
    if update.experts:
        parts = tuple(_thin(expert) for expert in update.by_expert())
        return Thin(None, torch.cat([part.sigma for part in parts]), None, parts)
    reads, writes, sigma = svd_factors(update)
    kept = sigma > 0
    return Thin(writes[:, kept], sigma[kept], reads[kept].T / sigma[kept])


def compared(mine: Thin, theirs: Thin, generator: torch.Generator | None = None) -> Pair:
    """Inner product and principal angles of two updates of one site.

    Of stacks of experts it is the sum over experts, and the angles of each expert with the same one
    of the other adapter.

    Args:
        mine, theirs: the two.
        generator: with one, `theirs` is turned into random directions first.
    """
    if mine.parts:
        return _compared_experts(mine, theirs, generator)
    nothing = mine.sigma.new_zeros(0)
    if mine.U is None or mine.V is None or theirs.U is None or theirs.V is None:
        # Norms: Δγ alone, of which there is no random direction.
        inner = math.nan
        if mine.U is None and theirs.U is None and generator is None:
            inner = float(mine.sigma @ theirs.sigma)
        return Pair(inner, nothing, nothing)
    if generator is None:
        read = mine.V.T @ theirs.V
        write = mine.U.T @ theirs.U
    else:
        read = _with_random_frame(mine.V, theirs.V.shape[1], generator)
        write = _with_random_frame(mine.U, theirs.U.shape[1], generator)
    inner = float(torch.einsum("i,j,ij,ij->", mine.sigma, theirs.sigma, read, write))
    return Pair(inner, _cosines(read), _cosines(write))


def _compared_experts(mine: Thin, theirs: Thin, generator: torch.Generator | None) -> Pair:
    """The sum over experts, and the angles of each expert with the same one."""
    pairs = [
        compared(own, other, generator) for own, other in zip(mine.parts, theirs.parts, strict=True)
    ]
    read = torch.cat([pair.read for pair in pairs]).sort(descending=True).values
    write = torch.cat([pair.write for pair in pairs]).sort(descending=True).values
    return Pair(math.fsum(pair.inner for pair in pairs), read, write)


def _with_random_frame(
    frame: Float[Tensor, "d few"], width: int, generator: torch.Generator
) -> Float[Tensor, "few width"]:
    """The products of a frame with a uniformly random one of so many vectors."""
    return orthonormal(len(frame), width, generator)[: frame.shape[1]]


def _cosines(product: Float[Tensor, "few few2"]) -> Float[Tensor, " angle"]:
    """The singular values of the product of two frames."""
    if not product.numel():
        return product.new_zeros(0)
    return torch.linalg.svdvals(product).clamp(max=1.0)
