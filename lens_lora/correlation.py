"""The correlation of two series of numbers; NaN where it is not defined."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import rankdata

_Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]
_FLOAT32 = float(np.finfo(np.float32).eps)


def correlation(a: _Numbers, b: _Numbers, *, ranked: bool = False, eps: float = _FLOAT32) -> float:
    """Pearson's correlation; NaN for a single number, or where either series is constant.

    Args:
        a, b: two series of equal length.
        ranked: whether the ranks are correlated, which is Spearman's correlation.
        eps: the rounding error of the numbers, as a share of the largest.
    """
    if len(a) < 2:
        return math.nan
    if ranked:
        a = rankdata(a)
        b = rankdata(b)
    if is_constant(a, eps) or is_constant(b, eps):
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def is_constant(numbers: _Numbers, eps: float) -> bool:
    """Whether the numbers differ by no more than their rounding.

    Args:
        numbers: at least one.
        eps: the rounding, as a share of the largest.
    """
    return float(np.ptp(numbers)) <= 4 * eps * float(np.abs(numbers).max())
