"""How well the numbers of one prompt agree: correlation, slope, signs, the largest, sizes.

`analyses/compare.py` has the formulas.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

__all__ = ["Vector", "pearson", "statistics_of"]

Vector = np.ndarray[tuple[int], np.dtype[np.float64]]


def statistics_of(
    a: Vector, e: Vector, clear: NDArray[np.bool_], k: int, eps: float
) -> dict[str, float]:
    """The statistics of one prompt, by name; NaN where one does not exist.

    Args:
        a, e: an attribution and effects, a number a group.
        clear: which groups stand out of rounding: only their signs are compared.
        k: of the top-k overlap.
        eps: the rounding below which numbers count as constant.
    """
    same = (np.sign(a) == np.sign(e))[clear]
    return {
        "pearson": pearson(a, e, eps),
        "spearman": pearson(rankdata(a), rankdata(e), eps),
        "slope": _slope(a, e, eps),
        "sign_agreement": float(same.mean()) if len(same) else np.nan,
        "top_k_overlap": len(_top(a, k) & _top(e, k)) / k,
        "relative_error": _ratio(float(np.abs(a - e).sum()), float(np.abs(e).sum())),
        "sum_ratio": _ratio(float(a.sum()), float(e.sum())),
    }


def pearson(a: Vector, e: Vector, eps: float) -> float:
    """Pearson's correlation; NaN of numbers that are constant up to rounding.

    Args:
        a, e: of the same length.
        eps: the rounding below which numbers count as constant.
    """
    if _is_constant(a, eps) or _is_constant(e, eps):
        return np.nan
    a, e = ((x - x.mean()) / np.linalg.norm(x - x.mean()) for x in (a, e))
    return float(np.clip(a @ e, -1, 1))


def _slope(a: Vector, e: Vector, eps: float) -> float:
    if _is_constant(a, eps):
        return np.nan
    centred = a - a.mean()
    return float(centred @ (e - e.mean()) / (centred @ centred))


def _is_constant(x: Vector, eps: float) -> bool:
    return float(np.ptp(x)) <= 4 * eps * float(np.abs(x).max())


def _top(x: Vector, k: int) -> set[int]:
    return set(np.argsort(-np.abs(x), kind="stable")[:k].tolist())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else np.nan
