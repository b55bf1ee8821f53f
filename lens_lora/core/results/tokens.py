"""Tokens of texts and of the vocabulary: which are meant, which come first, what they share.

1. Of a text: which tokens a mean is over, and the strongest examples of a direction among them.
2. Of the vocabulary: ranked by one number each.
3. How much of a vector that changes from token to token is one constant vector, on held-out texts:

       share = 1 − Σ_i Σ_t∈i ‖x_t − μ_{−i}‖² / Σ_t ‖x_t‖²,    μ_{−i} the mean over the other texts

   Sums of each text are enough: Σ_t∈i ‖x_t − μ‖² = q_i − 2 s_i·μ + n_i ‖μ‖². Over the same tokens
   as the mean, the share would be inflated by about one over their number; it is negative where
   the other texts' mean is worse than none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lens_lora.arguments import one_entry, whole
from lens_lora.core.readout.positions import Positions as Positions
from lens_lora.core.readout.positions import chosen_positions as chosen_positions
from lens_lora.errors import ArgumentError

Sign = Literal[1, -1]


def context_of(tokens: Sequence[str], at: int, width: int) -> str:
    """The token at this position in ⟦ ⟧, with `width` tokens on either side."""
    before, after = tokens[max(at - width, 0) : at], tokens[at + 1 : at + 1 + width]
    return f"{''.join(before)}⟦{tokens[at]}⟧{''.join(after)}"


_QUARTERS = {"least": 0.0, "lower": 0.25, "median": 0.5, "upper": 0.75, "largest": 1.0}


def spread_of(values: NDArray[np.floating]) -> dict[str, float]:
    """How one direction's values are spread over tokens, of which there is at least one."""
    quarters = np.quantile(values, list(_QUARTERS.values())).tolist()
    sizes = {"mean": float(values.mean()), "rms": float(np.sqrt(np.square(values).mean()))}
    return sizes | dict(zip(_QUARTERS, quarters, strict=True))


def require_some(positions: Positions, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The tokens that are meant, if there are any."""
    if not chosen.any():
        fact = "no token is there that is not a sink"
        raise ArgumentError(f"positions={positions!r}: {fact}; ask for others, or sinks=True.")
    return chosen


def require_sign(sign: int) -> int:
    """The sign, if it is one."""
    if one_entry(sign) not in (1, -1) or isinstance(sign, bool):
        raise ArgumentError(f"sign={sign!r}: expected 1 or -1.")
    return int(sign)


def require_ranks(rank: int | None, count: int) -> list[int]:
    """The rank that is asked for, or all."""
    if rank is None:
        return list(range(count))
    if not 0 <= (rank := whole("rank", rank)) < count:
        raise ArgumentError(f"rank {rank}: the site has ranks 0 to {count - 1}.")
    return [rank]


def strongest(values: NDArray[np.floating], sign: int, k: int) -> NDArray[np.intp]:
    """Indices of the k values of this sign of largest magnitude, the largest first."""
    towards = np.nan_to_num(values * sign, nan=0.0)
    order = np.argsort(-towards, kind="stable")[:k]
    return order[towards[order] > 0]


def ranked_tokens(
    values: Tensor, strings: Sequence[str], k: int, column: str, *, largest: bool = True
) -> pd.DataFrame:
    """The k tokens of largest (or least) value, of [vocab]: rank from 1, token, id, value."""
    order = values.argsort(descending=largest, stable=True)[: whole("k", k, 0)].tolist()
    ranks, tokens = range(1, len(order) + 1), [strings[i] for i in order]
    columns = {"rank": ranks, "token": tokens, "id": order, column: values[order].tolist()}
    return pd.DataFrame(columns)


def rank_of(values: Float[Tensor, " vocab"], token: int) -> int:
    """The rank of a token, 1 for the largest value; ties count against it."""
    return int((values >= values[token]).sum())


def held_out_share(
    sums: Float[Tensor, "text *more d"],
    squares: Float[Tensor, " text *more"],
    counts: Int[Tensor, " text"],
) -> Float[Tensor, "*more"]:
    """The share, NaN where all vectors are zero or there is one text."""
    kept = counts > 0
    sums, squares, counts = sums.double()[kept], squares.double()[kept], counts[kept]
    n = counts.to(sums).view(-1, *[1] * (squares.ndim - 1))
    mean = (sums.sum(0) - sums) / (n.sum(0) - n)[..., None]
    apart = squares - 2 * (sums * mean).sum(-1) + n * mean.square().sum(-1)
    return 1 - apart.sum(0) / squares.sum(0)
