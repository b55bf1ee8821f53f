"""Which coordinates a site's rank space has: (GA, BG⁻¹) is the same ΔW for every invertible G.

    trained    u = Ax of the file: as training left it, so single ranks mean nothing by themselves
    svd        u = ΣVᵀx with sBA = UΣVᵀ: unique up to equal singular values

1. sBA is that of one site in the Hugging Face basis, a fused module cut to the site's own rows.
2. Its SVD comes from the thin factors: B = Q_B R_B and Aᵀ = Q_A R_A, so that only
   s R_B R_Aᵀ = U'ΣV'ᵀ, of the size of the rank, is decomposed; U = Q_B U', V = Q_A V'.
3. The entry of U's column of largest magnitude is positive, the first one on ties.
4. u' = Tu and B' = BM with T = s U'ᵀR_B and M = R_Aᵀ V'Σ⁻¹. They act in rank space, so they hold
   in the basis of the hooked model too. Directions with σ = 0 are zero in both.
   σ within the rounding of the factors' product is 0: factors that cancel have no direction.

A change of bias keeps its own last coordinate, and a norm's update is diagonal already.
No forward pass.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.arguments import word
from lens_lora.float64 import float64_device, in_float64
from lens_lora.hooked.basis import SiteMap, Update

__all__ = ["Gauge", "Turn", "gauge_of", "svd_factors", "svd_turn", "turned"]

Gauge = Literal["svd", "trained"]
_TIE = 1e-6  # entries of U that differ by less are of one magnitude


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """From the trained coordinates of a rank space to those of the SVD, in float64.

    Attributes:
        u: T with u' = Tu.
        B: M with B' = BM.
        sigma: the singular values of sBA, the largest first.
    """

    u: Float[Tensor, "rank rank"]
    B: Float[Tensor, "rank rank"]
    sigma: Float[Tensor, "rank"]


def gauge_of(gauge: Gauge) -> Gauge:
    """The gauge, if it is one.

    Args:
        gauge: as the caller gave it.

    Raises:
        ArgumentError: another word.
    """
    word("gauge", gauge, get_args(Gauge))
    return gauge


def svd_turn(update: Update) -> Turn:
    """The SVD of sBA as a change of coordinates.

    Args:
        update: of one site, in the Hugging Face basis.
    """
    A = in_float64(update.A)
    B = in_float64(update.B).to(A.device) * update.scale
    rank, few = len(A), min(len(A), len(B), A.shape[1])
    u, back, sigma = A.new_zeros(rank, rank), A.new_zeros(rank, rank), A.new_zeros(rank)
    if few:
        (writes, R_B), (_, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
        left, values, right = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
        factors = torch.linalg.matrix_norm(R_B) * torch.linalg.matrix_norm(R_A)
        rounding = max(len(B), A.shape[1]) * torch.finfo(values.dtype).eps * factors
        values = torch.where(values > rounding, values, 0.0)
        signs = _signs(writes @ left)
        left, right = left * signs, right * signs[:, None]
        present = (values > 0).to(values)
        inverse = present / torch.where(values > 0, values, 1.0)
        u[:few] = present[:, None] * (left.T @ R_B)
        back[:, :few] = (right @ R_A).T * inverse
        sigma[:few] = values
    return Turn(u, back, sigma)


def svd_factors(
    update: Update,
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"], Float[Tensor, "rank"]]:
    """(ΣVᵀ, U, σ) of sBA = UΣVᵀ, in float64 on the CPU; zero where σ is.

    Args:
        update: of one site, in the Hugging Face basis.
    """
    turn = svd_turn(update)
    reads = turn.u @ update.A.double()
    writes = update.scale * update.B.double() @ turn.B.to(update.B.device)
    return reads.cpu(), writes.cpu(), turn.sigma.cpu()


def turned(site: SiteMap, turn: Turn) -> SiteMap:
    """The same δ in the coordinates of the SVD.

    Args:
        site: a map whose rank space is that of the site.
        turn: of the site.
    """
    u, back = _with_bias(turn.u, site), _with_bias(turn.B, site)

    def wide(tensor: Tensor) -> Tensor:
        return in_float64(tensor).to(u.device)

    def back_home(tensor: Tensor) -> Tensor:
        return tensor.to(site.dtype).to(site.device)

    def of(tensor: Tensor | None, matrix: Tensor) -> Tensor | None:
        return None if tensor is None else back_home(wide(tensor) @ matrix)

    behind = site.A_behind_gamma
    return SiteMap(
        A=back_home(u @ wide(site.A)),
        B=back_home(wide(site.B) @ back),
        a0=of(site.a0, u.T),
        a0_by_head=of(site.a0_by_head, u.T),
        B_by_head=of(site.B_by_head, back),
        A_behind_gamma=None if behind is None else back_home(turn.u.to(u) @ wide(behind)),
    )


def _with_bias(matrix: Tensor, site: SiteMap) -> Tensor:
    """The matrix with a one for the coordinate of a change of bias, where the map has it."""
    extra = site.rank - len(matrix)
    one = torch.eye(extra, dtype=matrix.dtype, device=matrix.device)
    return torch.block_diag(matrix, one).to(float64_device(site.device))


def _signs(U: Float[Tensor, "out few"]) -> Float[Tensor, "few"]:
    """±1 of each column, so that its entry of largest magnitude is positive; the first on ties."""
    sizes = U.abs()
    first = (sizes >= (1 - _TIE) * sizes.amax(0)).to(torch.int8).argmax(0)
    return torch.where(U.gather(0, first[None])[0] < 0, -1.0, 1.0).to(U)
