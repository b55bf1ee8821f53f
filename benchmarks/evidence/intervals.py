"""Medians, intervals and verdicts over training tasks.

The unit is the training task: adapters that share training text are one cluster. Each cluster has
one number, the mean over its adapters (of each adapter's mean over prompts), and counts once.

1. `cluster_means`: long table → [cluster, method].
2. `summary`: the median over tasks, its interval, the worst task. The interval is that of order
   statistics: it covers the median of any distribution as often as the binomial says, 95.1 % with
   17 tasks and 96.9 % with 6, where it is the range. (A bootstrap of the mean covers far less where
   one task carries the mean: `resampled.py`.)
3. `verdicts`: paired differences by the exact sign-flip test of their mean, all 2ⁿ patterns of
   signs, by Holm's rule for the rows of a table. Where n tasks cannot reach `ALPHA`, no verdict.
4. `ranked`: every method beside the best, which has the largest mean, as the test is of means; a
   *tie* is what the test cannot tell from it.
5. `tied`, `choice`: the tie, and the cheapest of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

LEVEL = 0.95
ALPHA = 0.05
FEW = 6  # tasks, which never get a verdict, however few the rows
TOO_FEW = "too few tasks"
_ROUNDING = 1e-9  # of a sum: patterns of signs that should tie with the observed one do


@dataclasses.dataclass(frozen=True)
class Summary:
    """Summary of one number per task.

    Attributes:
        median: the median over tasks.
        low, high: the ends of the median's interval; NaN with fewer than six tasks.
        worst: the worst task's number.
        tasks: how many tasks have a number.
    """

    median: float
    low: float
    high: float
    worst: float
    tasks: int


def cluster_means(table: pd.DataFrame, value: str = "value") -> pd.DataFrame:
    """[cluster, method] of a table with columns cluster, adapter, method and `value`.

    Prompts are averaged first, then adapters, so that neither an adapter with more prompts nor a
    cluster with more adapters counts for more.
    """
    adapters = table.groupby(["cluster", "adapter", "method"])[value].mean()
    return adapters.groupby(["cluster", "method"]).mean().unstack("method")


def summary(
    values: Float[np.ndarray, " cluster"] | pd.Series, *, larger_is_better: bool = True
) -> Summary:
    """Summarise one number per cluster, without those that are missing."""
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    if not len(known):
        return Summary(median=np.nan, low=np.nan, high=np.nan, worst=np.nan, tasks=0)
    ends = stats.quantile_test(known, q=0, p=0.5).confidence_interval(LEVEL)
    worst = known.min() if larger_is_better else known.max()
    return Summary(
        median=float(np.median(known)),
        low=float(ends.low),
        high=float(ends.high),
        worst=float(worst),
        tasks=len(known),
    )


def sign_flip(differences: Float[np.ndarray, " task"]) -> float:
    """The p of the mean difference, if each task's difference may as well have the other sign.

    All 2ⁿ sums are a sum of the first half of the tasks and one of the second; of those, sorted, a
    search counts how many reach the observed sum. Two sides: the patterns are symmetric.
    """
    half = len(differences) // 2
    left = _signed_sums(differences[:half])
    right = _signed_sums(differences[half:])
    least = (1 - _ROUNDING) * abs(differences.sum())
    reach = len(right) - np.searchsorted(np.sort(right), least - left)
    return min(1.0, 2.0 * float(reach.sum()) / 2.0 ** len(differences))


def _signed_sums(differences: Float[np.ndarray, " task"]) -> Float[np.ndarray, " pattern"]:
    """The sum of the differences for each pattern of their signs."""
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums - difference, sums + difference])
    return sums


def holm(p: Float[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    """Correct p for the number of rows: the k-th smallest times the rows that are left."""
    order = np.argsort(p)
    corrected = np.empty_like(p)
    steps = p[order] * np.arange(len(p), 0, -1)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected


def verdicts(apart: pd.DataFrame) -> pd.Series:
    """Better, worse, tie or no verdict for each column of paired differences, positive if better.

    Args:
        apart: [cluster, row], NaN where a task lacks the row.
    """
    tasks = apart.notna().sum()
    # The least p of n tasks is 2 / 2ⁿ; Holm may multiply it by the number of rows.
    least_p = len(tasks) * 2.0 ** (1 - tasks)
    tested = tasks.index[(tasks > FEW) & (least_p < ALPHA)]
    words = pd.Series(TOO_FEW, index=apart.columns)
    p = holm(np.array([sign_flip(apart[row].dropna().to_numpy()) for row in tested]))
    side = np.where(apart[tested].mean() > 0, "better", "worse")
    words[tested] = np.where(p < ALPHA, side, "tie")
    return words


@dataclasses.dataclass(frozen=True)
class Standing:
    """One method beside the best of a table.

    Attributes:
        behind: the median paired difference from the best, negative if worse.
        verdict: best, tie, worse, or none; better of a method that was run on some tasks only.
    """

    method: str
    score: Summary
    behind: float
    verdict: str

    @property
    def tie(self) -> bool:
        """Whether it cannot be told from the best."""
        return self.verdict != "worse"


def ranked(means: pd.DataFrame, *, larger_is_better: bool = True) -> list[Standing]:
    """Every method by its median; after them those that were run on some tasks only.

    Args:
        means: [cluster, method], of `cluster_means`.
        larger_is_better: False for errors and distances; `behind` is negative if worse either way.
    """
    apart, words = _beside_best(means, larger_is_better)
    partial = means.isna().any()
    medians = means.median().sort_values(ascending=not larger_is_better, kind="stable")
    found = []
    for method in sorted(medians.index, key=lambda method: bool(partial[method])):
        standing = Standing(
            method=str(method),
            score=summary(means[method], larger_is_better=larger_is_better),
            behind=float(apart[method].median()),
            verdict=words[method],
        )
        found.append(standing)
    return found


def _beside_best(means: pd.DataFrame, larger_is_better: bool) -> tuple[pd.DataFrame, pd.Series]:
    """Paired differences from the best of those that were run on all tasks, and the verdicts."""
    signed = means if larger_is_better else -means
    best = signed.loc[:, signed.notna().all()].mean().idxmax()
    apart = signed.sub(signed[best], axis=0)
    words = verdicts(apart.drop(columns=best))
    return apart, pd.concat([words, pd.Series({best: "best"})])


def tied(means: pd.DataFrame, *, larger_is_better: bool = True) -> list[str]:
    """The best and what the test cannot tell from it, of the methods that were run on all tasks."""
    complete = means.dropna(axis=1)
    _, words = _beside_best(complete, larger_is_better)
    return [str(method) for method in words.index[words != "worse"]]


def choice(means: pd.DataFrame, cost: Mapping[str, float], *, larger_is_better: bool = True) -> str:
    """The cheapest method of the tie; of equal cost (in tenths), that of the better median."""
    sign = -1 if larger_is_better else 1

    def cost_then_median(method: str) -> tuple[float, float]:
        return round(cost[method], 1), sign * means[method].median()

    return min(tied(means, larger_is_better=larger_is_better), key=cost_then_median)


def threshold_of(signal: pd.Series, broken: pd.Series) -> float:
    """The threshold of a warning's best F1, halfway between two values of the signal.

    It is infinite if nothing is broken.
    """
    if not broken.any():
        return float("inf")
    values = np.unique(signal)
    cuts = np.concatenate([values[:1], (values[1:] + values[:-1]) / 2])
    scores = []
    for cut in cuts:
        warned = signal >= cut
        hits = float((warned & broken).sum())
        scores.append(2 * hits / float(warned.sum() + broken.sum()))
    return float(cuts[int(np.argmax(scores))])
