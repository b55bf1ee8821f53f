"""The coordinates of a rank space: as training left them, or those of the SVD of ΔW.

(GA, BG⁻¹) is the same ΔW for every invertible G.

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
"""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.compat import float64_device, in_float64
from lens_lora.core.model.basis import SiteMap, Update

Gauge = Literal["svd", "trained"]
_TIE = 1e-6  # entries of U that differ by less are of one magnitude


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """From the trained coordinates of a rank space to those of the SVD, in float64.

    Attributes:
        to_svd: T, with u' = Tu.
        from_svd: M, with B' = BM.
        sigma: the singular values of sBA, the largest first.
    """

    to_svd: Float[Tensor, "rank rank"]
    from_svd: Float[Tensor, "rank rank"]
    sigma: Float[Tensor, " rank"]


def svd_turn(update: Update) -> Turn:
    """The SVD of sBA as a change of coordinates; of experts, that of each."""
    if update.experts:
        turns = [svd_turn(each) for each in update.by_expert()]
        to_svd = torch.block_diag(*[turn.to_svd for turn in turns])
        from_svd = torch.block_diag(*[turn.from_svd for turn in turns])
        return Turn(to_svd, from_svd, torch.cat([turn.sigma for turn in turns]))
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
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"], Float[Tensor, " rank"]]:
    """(ΣVᵀ, U, σ) of sBA = UΣVᵀ, in float64 on the CPU; zero where σ is."""
    turn = svd_turn(update)
    reads = turn.to_svd @ update.A.double()
    writes = update.scale * update.B.double() @ turn.from_svd.to(update.B.device)
    return reads.cpu(), writes.cpu(), turn.sigma.cpu()


def turned(site: SiteMap, turn: Turn) -> SiteMap:
    """The same δ in the coordinates of the SVD."""
    u, back = _padded(turn.to_svd, site), _padded(turn.from_svd, site)

    def product(left: Tensor | None, right: Tensor | None) -> Tensor | None:
        if left is None or right is None:
            return None
        exact = in_float64(left).to(u.device) @ in_float64(right).to(u.device)
        return exact.to(site.dtype).to(site.device)

    return dataclasses.replace(
        site,
        A=cast(Tensor, product(u, site.A)),
        sB=cast(Tensor, product(site.sB, back)),
        a0=product(site.a0, u.T),
        a0_by_head=product(site.a0_by_head, u.T),
        sB_by_head=product(site.sB_by_head, back),
        A_behind_gamma=product(turn.to_svd, site.A_behind_gamma),
    )


def _padded(matrix: Float[Tensor, "rank rank"], site: SiteMap) -> Tensor:
    """The matrix with a one for the coordinate of a change of bias, where the map has it."""
    extra = torch.eye(site.rank - len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.block_diag(matrix, extra).to(float64_device(site.device))


def _signs(U: Float[Tensor, "out few"]) -> Float[Tensor, " few"]:
    """±1 of each column, so that its entry of largest magnitude is positive; the first on ties."""
    sizes = U.abs()
    first = (sizes >= (1 - _TIE) * sizes.amax(0)).to(torch.int8).argmax(0)
    return torch.where(U.gather(0, first[None])[0] < 0, -1.0, 1.0).to(U)
