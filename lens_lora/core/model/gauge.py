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
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.compat import float64_device, in_float64
from lens_lora.core.model.basis import SiteMap, Update
from lens_lora.errors import ArgumentError

Gauge = Literal["svd", "trained"]
# Entries of U whose magnitudes differ by less, relatively, count as a tie.
_TIE = 1e-6


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
    """The SVD of sBA as a change of coordinates; for a stack of experts, the SVD of each expert."""
    if update.experts:
        turns = [svd_turn(each) for each in update.by_expert()]
        to_svd = [turn.to_svd for turn in turns]
        from_svd = [turn.from_svd for turn in turns]
        return Turn(
            to_svd=torch.block_diag(*to_svd),
            from_svd=torch.block_diag(*from_svd),
            sigma=torch.cat([turn.sigma for turn in turns]),
        )
    A = in_float64(update.A)
    B = in_float64(update.B).to(A.device) * update.scale
    out = len(B)
    width = A.shape[1]
    rank = len(A)
    to_svd = A.new_zeros(rank, rank)
    from_svd = A.new_zeros(rank, rank)
    sigma = A.new_zeros(rank)
    count = min(rank, out, width)  # how many singular values there are
    if count == 0:
        return Turn(to_svd, from_svd, sigma)

    Q_B, R_B = torch.linalg.qr(B)
    _, R_A = torch.linalg.qr(A.T)
    left, values, right = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    size = torch.linalg.matrix_norm(R_B) * torch.linalg.matrix_norm(R_A)
    rounding = max(out, width) * torch.finfo(values.dtype).eps * size
    is_present = values > rounding
    values = torch.where(is_present, values, 0.0)
    inverse = torch.where(is_present, 1 / values, 0.0)
    signs = _signs(Q_B @ left)
    left = left * signs
    right = right * signs[:, None]

    to_svd[:count] = is_present[:, None].to(values) * (left.T @ R_B)
    from_svd[:, :count] = (right @ R_A).T * inverse
    sigma[:count] = values
    return Turn(to_svd, from_svd, sigma)


def require_ranks(gauge: Gauge, axes: tuple[str, ...]) -> None:
    """Refuse a gauge where nothing is split by rank.

    Args:
        gauge: the meaning of a rank.
        axes: what values are split by.

    Raises:
        ArgumentError: a gauge other than 'trained', and no ranks.
    """
    if gauge != "trained" and "rank" not in axes:
        raise ArgumentError(
            f"gauge={gauge!r} decides what a rank is, and by={axes!r} has none; ask for by='rank' "
            "too, or leave the gauge out."
        )


def turned(site: SiteMap, turn: Turn) -> SiteMap:
    """The same δ in the coordinates of the SVD."""
    to_svd = _padded(turn.to_svd, site)
    from_svd = _padded(turn.from_svd, site)

    def product(left: Tensor, right: Tensor) -> Tensor:
        exact = in_float64(left).to(to_svd.device) @ in_float64(right).to(to_svd.device)
        return exact.to(site.dtype).to(site.device)

    changed: dict[str, Tensor] = {
        "A": product(to_svd, site.A),
        "sB": product(site.sB, from_svd),
    }
    if site.a0 is not None:
        changed["a0"] = product(site.a0, to_svd.T)
    if site.a0_by_head is not None:
        changed["a0_by_head"] = product(site.a0_by_head, to_svd.T)
    if site.sB_by_head is not None:
        changed["sB_by_head"] = product(site.sB_by_head, from_svd)
    if site.A_behind_gamma is not None:
        changed["A_behind_gamma"] = product(turn.to_svd, site.A_behind_gamma)
    return dataclasses.replace(site, **changed)


def _padded(matrix: Float[Tensor, "rank rank"], site: SiteMap) -> Tensor:
    """The matrix with a one for the coordinate of a change of bias, where the map has it."""
    extra = torch.eye(site.rank - len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.block_diag(matrix, extra).to(float64_device(site.device))


def _signs(U: Float[Tensor, "out few"]) -> Float[Tensor, " few"]:
    """The sign of each column's entry of largest magnitude, the first one on ties."""
    sizes = U.abs()
    is_largest = sizes >= (1 - _TIE) * sizes.amax(0)
    first = is_largest.to(torch.int8).argmax(0)
    entries = U.gather(0, first[None])[0]
    return torch.where(entries < 0, -1.0, 1.0).to(U)
