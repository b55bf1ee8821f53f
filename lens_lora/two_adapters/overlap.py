"""The angles between the weight changes of two adapters, whatever their factors.

With ΔW = UΣVᵀ and ΔW′ = U′Σ′V′ᵀ,

    cos = ⟨ΔW, ΔW′⟩ / (‖ΔW‖ ‖ΔW′‖),    ⟨ΔW, ΔW′⟩ = Σ_ij σ_i σ′_j (VᵀV′)_ij (UᵀU′)_ij

and the cosines of the principal angles are the singular values of VᵀV′ (of what is read) and of
UᵀU′ (of what is written). A rotation (GA, BG⁻¹) of the factors changes none of these.

The null scale is the same with U′ and V′ replaced by uniformly random frames, and Σ′ kept.

Every change at a site is of one of three kinds:

    MatrixChange    a matrix ΔW, with singular values and directions
    NormChange      Δγ of a norm: two of them have a cosine, but no angles
    StackChange     a matrix for each expert of a stack; experts share no space

Changes of different kinds, and those of stacks with different numbers of experts, are in different
spaces. They have no inner product, and are refused.

Changes of bias are left out. Nothing here runs the model.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core import LoraLens, SiteUpdate
from lens_lora.errors import AdapterError
from lens_lora.formats.arithmetic import orthonormal


@dataclasses.dataclass(frozen=True, eq=False)
class MatrixChange:
    """The thin SVD ΔW = UΣVᵀ of a matrix in float64, with the directions of σ > 0 alone.

    Attributes:
        U: the directions that are written.
        sigma: the singular values, the largest first.
        V: the directions that are read.
    """

    U: Float[Tensor, "out few"]
    sigma: Float[Tensor, " few"]
    V: Float[Tensor, "in few"]

    def __str__(self) -> str:
        return "a matrix"


@dataclasses.dataclass(frozen=True, eq=False)
class NormChange:
    """The change of a norm's scale in float64.

    Attributes:
        gamma: Δγ.
    """

    gamma: Float[Tensor, " width"]

    @property
    def sigma(self) -> Float[Tensor, " width"]:
        """The singular values of diag(Δγ), in the order of its entries."""
        return self.gamma.abs()

    def __str__(self) -> str:
        return "a norm"


@dataclasses.dataclass(frozen=True, eq=False)
class StackChange:
    """The changes of the matrices of a stack of experts.

    Attributes:
        experts: the change of each expert.
    """

    experts: tuple[MatrixChange, ...]

    @property
    def sigma(self) -> Float[Tensor, " few"]:
        """The singular values of each expert, one expert after another."""
        return torch.cat([expert.sigma for expert in self.experts])

    def __str__(self) -> str:
        return f"a stack of {len(self.experts)} experts"


# What an adapter changes at one site. For each kind, ‖ΔW‖² = Σ_i σ_i².
SiteChange = MatrixChange | NormChange | StackChange


class Overlap(NamedTuple):
    """The angles between two updates of one site.

    Attributes:
        inner: ⟨ΔW, ΔW′⟩.
        read: cosines of the principal angles of what is read, the largest first; empty for a norm.
        write: the same of what is written.
    """

    inner: float
    read: Float[Tensor, " angle"]
    write: Float[Tensor, " angle"]


def changes_of_sites(lens: LoraLens) -> dict[str, SiteChange]:
    """The change of each site, by site name.

    Args:
        lens: the adapter over the model.
    """
    by_site: dict[str, SiteChange] = {}
    for site, site_update in zip(lens.sites, lens.updates, strict=True):
        by_site[site.name] = _change_of(site_update)
    return by_site


def _change_of(site_update: SiteUpdate) -> SiteChange:
    norm = site_update.norm
    if norm is not None:
        return NormChange(norm.gamma.detach().cpu().double())
    update = site_update.linear
    if not update.experts:
        return _matrix_change(site_update)
    of_experts: list[MatrixChange] = []
    for expert in update.by_expert():
        of_expert = dataclasses.replace(site_update, update=expert)
        of_experts.append(_matrix_change(of_expert))
    return StackChange(tuple(of_experts))


def _matrix_change(site_update: SiteUpdate) -> MatrixChange:
    reads, writes, sigma = site_update.svd()
    is_positive = sigma > 0
    positive = sigma[is_positive]
    U = writes[:, is_positive]
    V = reads[is_positive].T / positive
    return MatrixChange(U, positive, V)


def overlap_of(
    mine: SiteChange, theirs: SiteChange, generator: torch.Generator | None = None
) -> Overlap:
    """Inner product and principal angles of two updates of one site.

    For stacks of experts the inner product is the sum over experts, and the angles are those
    between each expert and the same expert of the other adapter.

    Args:
        mine: what one adapter changes at the site.
        theirs: what the other one changes there.
        generator: if it is given, `theirs` keeps Σ′ and gets random U′ and V′. The inner product of
            norms is then NaN, as Δγ has no directions.

    Raises:
        AdapterError: the two are in different spaces, whichever comes first: they are of different
            kinds, or stacks with different numbers of experts.
    """
    match mine, theirs:
        case MatrixChange(), MatrixChange():
            return _overlap_of_matrices(mine, theirs, generator)
        case NormChange(), NormChange():
            return _overlap_of_norms(mine, theirs, generator)
        case StackChange(), StackChange() if len(mine.experts) == len(theirs.experts):
            return _overlap_of_stacks(mine, theirs, generator)
        case _:
            fact = f"the changes are of {mine} and of {theirs}"
            raise AdapterError(f"{fact}, so they are in different spaces and have no cosine.")


def _overlap_of_matrices(
    mine: MatrixChange, theirs: MatrixChange, generator: torch.Generator | None
) -> Overlap:
    if generator is None:
        read = mine.V.T @ theirs.V
        write = mine.U.T @ theirs.U
    else:
        read = _with_random_frame(mine.V, theirs.V.shape[1], generator)
        write = _with_random_frame(mine.U, theirs.U.shape[1], generator)
    inner = float(torch.einsum("i,j,ij,ij->", mine.sigma, theirs.sigma, read, write))
    return Overlap(inner, _cosines(read), _cosines(write))


def _overlap_of_norms(
    mine: NormChange, theirs: NormChange, generator: torch.Generator | None
) -> Overlap:
    inner = math.nan
    if generator is None:
        inner = float(mine.gamma @ theirs.gamma)
    no_angles = mine.gamma.new_zeros(0)
    return Overlap(inner, no_angles, no_angles)


def _overlap_of_stacks(
    mine: StackChange, theirs: StackChange, generator: torch.Generator | None
) -> Overlap:
    overlaps = [
        _overlap_of_matrices(expert, same_expert, generator)
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
