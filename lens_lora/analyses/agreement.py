"""Statistics of agreement between numbers of the same groups, and their intervals over prompts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

__all__ = ["STATISTICS", "Vector", "intervals_of", "pearson", "statistics_of"]

_INTERVAL = (2.5, 97.5)
STATISTICS = (
    "pearson",
    "spearman",
    "slope",
    "sign_agreement",
    "top_k_overlap",
    "relative_error",
    "sum_ratio",
)

Vector = np.ndarray[tuple[int], np.dtype[np.float64]]


def statistics_of(
    a: Vector, e: Vector, clear: NDArray[np.bool_], k: int, eps: float
) -> dict[str, float]:
    """All of one prompt, by name; NaN where one does not exist.

    Args:
        a, e: the attribution's number and the effect of each group.
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


def intervals_of(
    statistics: Mapping[str, Vector], draws: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Of the mean over prompts, the same draws of prompts for every statistic.

    Args:
        statistics: by name, one number per prompt.
        draws: of prompts with replacement; 0 for no intervals.
        seed: of the draws.
    """
    batch = len(next(iter(statistics.values())))
    if batch == 1 or not draws:
        return dict.fromkeys(statistics, (np.nan, np.nan))
    drawn = np.random.default_rng(seed).integers(batch, size=(draws, batch))
    found: dict[str, tuple[float, float]] = {}
    for name, values in statistics.items():
        means = torch.from_numpy(values[drawn]).nanmean(1).numpy()
        means = means[~np.isnan(means)]
        low, high = np.percentile(means, _INTERVAL) if len(means) else (np.nan, np.nan)
        found[name] = float(low), float(high)
    return found
