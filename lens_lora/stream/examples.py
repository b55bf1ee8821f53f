"""The strongest examples of a direction among tokens, and how its values are spread over them."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lens_lora.arguments import one_entry, whole
from lens_lora.core import Positions
from lens_lora.errors import ArgumentError

Sign = Literal[1, -1]

# The quantiles in a table of spreads.
_QUARTERS = {"least": 0.0, "lower": 0.25, "median": 0.5, "upper": 0.75, "largest": 1.0}


def spread_of(values: NDArray[np.floating]) -> dict[str, float]:
    """The mean, root mean square and quarters of one direction's values over tokens.

    Args:
        values: one for each token, of which there is at least one.
    """
    spread = {
        "mean": float(values.mean()),
        "rms": float(np.sqrt(np.square(values).mean())),
    }
    quarters = np.quantile(values, list(_QUARTERS.values())).tolist()
    return spread | dict(zip(_QUARTERS, quarters, strict=True))


def strongest(values: NDArray[np.floating], sign: int, k: int) -> NDArray[np.intp]:
    """Indices of the k values of this sign of largest magnitude, the largest first.

    Args:
        values: one for each token; NaN counts as 0.
        sign: 1 or −1.
        k: the largest number of indices.
    """
    size_of_sign = np.nan_to_num(values * sign, nan=0.0)
    order = np.argsort(-size_of_sign, kind="stable")[:k]
    return order[size_of_sign[order] > 0]


def require_some(positions: Positions, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Refuse positions at which no token is chosen.

    Raises:
        ArgumentError: no token is chosen.
    """
    if not chosen.any():
        raise ArgumentError(
            f"positions={positions!r}: every token there is a sink, or there is none",
            remedy="ask for other positions, or pass sinks=True.",
        )
    return chosen


def require_sign(sign: int) -> int:
    """The sign, checked.

    Raises:
        ArgumentError: anything but 1 and −1.
    """
    if one_entry(sign) not in (1, -1) or isinstance(sign, bool):
        raise ArgumentError(f"sign={sign!r}: expected 1 or -1.")
    return int(sign)


def require_ranks(rank: int | None, count: int) -> list[int]:
    """Check a rank that a caller asks for, and return it in a list; without one, return all.

    Args:
        rank: an index; None for all.
        count: how many ranks the site has.

    Raises:
        ArgumentError: no such rank.
    """
    if rank is None:
        return list(range(count))
    index = whole("rank", rank)
    if not 0 <= index < count:
        raise ArgumentError(f"rank {index}: the site has ranks 0 to {count - 1}.")
    return [index]
