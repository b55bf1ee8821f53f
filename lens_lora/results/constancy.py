"""How much of a vector that changes from token to token is one constant vector, on held-out texts.

    share = 1 − Σ_i Σ_t∈i ‖x_t − μ_{−i}‖² / Σ_t ‖x_t‖²,    μ_{−i} the mean over the other texts

Sums of each text are enough: Σ_t∈i ‖x_t − μ‖² = q_i − 2 s_i·μ + n_i ‖μ‖². Over the same tokens as
the mean, the share would be inflated by about one over their number; it is negative where
other texts' mean is worse than none.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["held_out_share"]


def held_out_share(
    sums: Float[Tensor, "text *more d"],
    squares: Float[Tensor, "text *more"],
    counts: Int[Tensor, "text"],
) -> Float[Tensor, "*more"]:
    """The share, NaN where all vectors are zero or there is one text.

    Args:
        sums: s_i = Σ_t x_t of each text, in coordinates whose inner product is the usual one.
        squares: q_i = Σ_t ‖x_t‖² of each text.
        counts: n_i, the tokens of each text.
    """
    kept = counts > 0
    sums, squares, counts = sums.double()[kept], squares.double()[kept], counts[kept]
    n = counts.to(sums).view(-1, *[1] * (squares.ndim - 1))
    others = (n.sum(0) - n)[..., None]
    mean = (sums.sum(0) - sums) / others
    apart = squares - 2 * (sums * mean).sum(-1) + n * mean.square().sum(-1)
    return 1 - apart.sum(0) / squares.sum(0)
