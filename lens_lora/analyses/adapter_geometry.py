"""Where two adapters' weight changes lie to one another, site by site, whatever their factors.

    cos = ⟨ΔW, ΔW′⟩ / (‖ΔW‖ ‖ΔW′‖),   ⟨ΔW, ΔW′⟩ = tr((U′ᵀU) Σ (V′ᵀV)ᵀ Σ′)
    cosines of the principal angles: singular values of VᵀV′ (what is read), of UᵀU′ (written)

1. Each ΔW = UΣVᵀ, of one site in the Hugging Face basis, from its thin factors; the dense ΔW is
   never built. A rotation (GA, BG⁻¹) of the factors changes none of it. DoRA's ΔW and that of a
   trained module are those that the base gives them.
2. Null scale: U′ and V′ replaced by uniformly random frames, Σ′ kept. Angles are taken from the
   first coordinates, as a random frame lies to every fixed one alike.
3. Changes of bias are left out. A norm's ΔW is diag(Δγ): it has a cosine, and no frames.

No forward pass; QR of the factors, and of as many Gaussians a draw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.adapters.random_directions import orthonormal
from lens_lora.hooked.basis import Update
from lens_lora.hooked.gauge import svd_factors
from lens_lora.hooked.norm_map import NormUpdate

__all__ = ["Pair", "Thin", "compared", "geometry", "null_pair", "thin"]


@dataclasses.dataclass(frozen=True, eq=False)
class Thin:
    """ΔW = UΣVᵀ in float64, the directions with σ > 0.

    Attributes:
        U: what is written.
        sigma: the largest first.
        V: what is read; None of a norm, whose σ is Δγ itself.
    """

    U: Float[Tensor, "out few"] | None
    sigma: Float[Tensor, "few"]
    V: Float[Tensor, "in few"] | None


class Pair(NamedTuple):
    """Two updates of one site.

    Attributes:
        inner: ⟨ΔW, ΔW′⟩.
        read, write: cosines of the principal angles, the largest first; empty of a norm.
    """

    inner: float
    read: Float[Tensor, "angle"]
    write: Float[Tensor, "angle"]


def thin(update: Update | NormUpdate) -> Thin:
    """The SVD of an update's ΔW.

    Args:
        update: of one site, in the Hugging Face basis.
    """
    if isinstance(update, NormUpdate):
        return Thin(None, update.gamma.detach().cpu().double(), None)
    reads, writes, sigma = svd_factors(update)
    kept = sigma > 0
    return Thin(writes[:, kept], sigma[kept], reads[kept].T / sigma[kept])


def compared(one: Thin, other: Thin) -> Pair:
    """Inner product and principal angles of two updates of one site.

    Args:
        one, other: of the same shape.
    """
    nothing = one.sigma.new_zeros(0)
    if one.U is None or one.V is None or other.U is None or other.V is None:
        same_kind = one.U is None and other.U is None
        inner = float(one.sigma @ other.sigma) if same_kind else float("nan")
        return Pair(inner, nothing, nothing)
    return _pair(one.sigma, other.sigma, one.V.T @ other.V, one.U.T @ other.U)


def null_pair(one: Thin, other: Thin, generator: torch.Generator) -> Pair:
    """The same with `other` in random directions, its singular values kept.

    Args:
        one, other: of the same shape.
        generator: of the frames.
    """
    if one.U is None or one.V is None or other.U is None or other.V is None:
        nothing = one.sigma.new_zeros(0)
        return Pair(float("nan"), nothing, nothing)
    read, write = (
        orthonormal(len(of), theirs.shape[1], generator)[: of.shape[1]]
        for of, theirs in ((one.V, other.V), (one.U, other.U))
    )
    return _pair(one.sigma, other.sigma, read, write)


def _pair(sigma: Tensor, others: Tensor, read: Tensor, write: Tensor) -> Pair:
    """From VᵀV′ and UᵀU′."""
    inner = float(torch.einsum("i,j,ij,ij->", sigma, others, read, write))
    angles = [
        torch.linalg.svdvals(m).clamp(max=1.0) if m.numel() else m.new_zeros(0)
        for m in (read, write)
    ]
    return Pair(inner, *angles)


def geometry(
    mine: Mapping[str, Thin], theirs: Mapping[str, Thin], seeds: Sequence[int]
) -> dict[str, Any]:
    """The fields of `AdapterComparison` that need no prompts.

    Args:
        mine, theirs: each adapter's updates by site.
        seeds: of the random directions, one a draw.
    """
    names = [name for name in mine if name in theirs]
    pairs = [compared(mine[name], theirs[name]) for name in names]
    null = []
    for draw in seeds:
        generator = torch.Generator().manual_seed(draw)
        null.append([null_pair(mine[name], theirs[name], generator) for name in names])
    rest = [
        sum(float(own[name].sigma.square().sum()) for name in own if name not in others) ** 0.5
        for own, others in ((mine, theirs), (theirs, mine))
    ]
    return {
        "norms": _table([_norms(of, names) for of in (mine, theirs)], len(names)),
        "rest": torch.tensor(rest, dtype=torch.float64),
        "inner": torch.tensor([pair.inner for pair in pairs], dtype=torch.float64),
        "read": _padded([pair.read for pair in pairs]),
        "write": _padded([pair.write for pair in pairs]),
        "null_inner": _table([[pair.inner for pair in row] for row in null], len(names)),
        "null_read": _table([[_overlap(p.read) for p in row] for row in null], len(names)),
        "null_write": _table([[_overlap(p.write) for p in row] for row in null], len(names)),
    }


def _norms(of: Mapping[str, Thin], names: Sequence[str]) -> list[float]:
    return [float(of[name].sigma.norm()) for name in names]


def _table(rows: Sequence[Sequence[float]], width: int) -> Float[Tensor, "row site"]:
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), width)


def _padded(rows: Sequence[Tensor]) -> Float[Tensor, "site angle"]:
    if not rows:
        return torch.zeros(0, 0, dtype=torch.float64)
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=torch.nan)


def _overlap(cosines: Tensor) -> float:
    return float(cosines.square().mean()) if len(cosines) else float("nan")
