"""The constant share of a vector that changes from token to token, measured on held-out texts.

    share = 1 − Σ_i Σ_t∈i ‖x_t − μ_{−i}‖² / Σ_t ‖x_t‖²,    μ_{−i} the mean over the other texts

Sums over each text suffice, because Σ_t∈i ‖x_t − μ‖² = q_i − 2 s_i·μ + n_i ‖μ‖². With a mean over
the same tokens, the share would be too large by about one over their number. It is negative if the
mean of the other texts is a worse prediction than zero.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def held_out_share(
    sums: Float[Tensor, "text *more d"],
    squares: Float[Tensor, " text *more"],
    counts: Int[Tensor, " text"],
) -> Float[Tensor, "*more"]:
    """The constant share; NaN if all vectors are zero, or if there is only one text.

    Args:
        sums: s_i, the sum of each text's vectors.
        squares: q_i, the sum of the squared lengths of each text's vectors.
        counts: n_i, the number of each text's vectors.
    """
    has_tokens = counts > 0
    counts = counts[has_tokens]
    sums = sums.double()[has_tokens]
    squares = squares.double()[has_tokens]
    ones = [1] * (squares.ndim - 1)
    n = counts.to(sums).view(-1, *ones)
    sums_of_others = sums.sum(0) - sums
    n_of_others = n.sum(0) - n
    mean_of_others = sums_of_others / n_of_others[..., None]
    product = (sums * mean_of_others).sum(-1)
    residual = squares - 2 * product + n * mean_of_others.square().sum(-1)
    return 1 - residual.sum(0) / squares.sum(0)
