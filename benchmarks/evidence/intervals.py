"""Means, intervals and ties over training tasks.

The unit is the training task: adapters that share training text are one cluster. Each cluster has
one number, the mean over its adapters (of each adapter's mean over prompts), and counts once.

1. `cluster_means`: long table → [cluster, method].
2. `interval`: mean over clusters and its 95 % interval, by the BCa bootstrap over clusters.
3. `difference`: the same of the paired difference of two methods, on the clusters that have both.
4. `ranked`: every method beside the best; a method whose paired difference from the best has 0
   within its interval is a tie. Intervals are of one comparison each, not corrected for their
   number.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

DRAWS, LEVEL, SEED = 9999, 0.95, 0


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over clusters.

    Attributes:
        mean: over clusters.
        low, high: ends of its interval; NaN with fewer than three clusters.
        clusters: how many.
    """

    mean: float
    low: float
    high: float
    clusters: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def tie(self) -> bool:
        """Of a difference: 0 is within the interval, or there is none."""
        return not (self.low > 0 or self.high < 0)


def cluster_means(table: pd.DataFrame, value: str = "value") -> pd.DataFrame:
    """[cluster, method] of a table with columns cluster, adapter, method and `value`.

    Prompts are averaged first, then adapters, so that neither an adapter with more prompts nor a
    cluster with more adapters counts for more.
    """
    adapters = table.groupby(["cluster", "adapter", "method"])[value].mean()
    return adapters.groupby(["cluster", "method"]).mean().unstack("method")


def interval(values: Float[np.ndarray, " cluster"] | pd.Series) -> Interval:
    """The mean of one number per cluster, and the bootstrap's interval of that mean."""
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    if len(known) < 3:
        mean = float(known.mean()) if len(known) else np.nan
        return Interval(mean, np.nan, np.nan, len(known))
    if np.ptp(known) <= 1e-12 * max(1.0, float(np.abs(known).max())):
        return Interval(*[float(known.mean())] * 3, len(known))
    low, high = _bootstrapped(tuple(known))
    return Interval(float(known.mean()), low, high, len(known))


@functools.cache
def _bootstrapped(known: tuple[float, ...]) -> tuple[float, float]:
    """Ends of the BCa interval of the mean; the same numbers are asked about more than once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (np.array(known),), np.mean, n_resamples=DRAWS, confidence_level=LEVEL, rng=SEED
        ).confidence_interval
    return float(found.low), float(found.high)


def difference(means: pd.DataFrame, method: str, other: str) -> Interval:
    """Mean paired difference `method` − `other` over the clusters that have both."""
    return interval(means[method] - means[other])


@dataclasses.dataclass(frozen=True)
class Standing:
    """One method beside the best of a table.

    Attributes:
        behind: paired difference from the best, negative if worse.
        tie: whether it cannot be told from the best.
    """

    method: str
    score: Interval
    behind: Interval
    tie: bool


def ranked(means: pd.DataFrame, *, larger_is_better: bool = True) -> list[Standing]:
    """Every method, best first.

    Args:
        means: [cluster, method], of `cluster_means`.
        larger_is_better: False for errors and distances; `behind` is negative if worse either way.
    """
    sign = 1.0 if larger_is_better else -1.0
    order = (sign * means.mean()).sort_values(ascending=False).index
    best = str(order[0])
    found = []
    for method in map(str, order):
        behind = interval(sign * (means[method] - means[best]))
        found.append(Standing(method, interval(means[method]), behind, behind.tie))
    return found


def cheapest_of_the_best(standings: list[Standing], cost: Mapping[str, float]) -> Standing:
    """The method of least cost among those that tie with the best."""
    return min((s for s in standings if s.tie), key=lambda s: cost[s.method])


def threshold_of(signal: pd.Series, broken: pd.Series) -> float:
    """Of a warning's best F1; halfway between what it parts; infinite if nothing is broken."""
    if not broken.any():
        return float("inf")
    values = np.unique(signal)
    cuts = np.concatenate([values[:1], (values[1:] + values[:-1]) / 2])
    scores = []
    for cut in cuts:
        warned = signal >= cut
        scores.append(2 * float((warned & broken).sum()) / float(warned.sum() + broken.sum()))
    return float(cuts[int(np.argmax(scores))])
