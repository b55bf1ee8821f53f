"""Where estimates break as adapters grow violent, and whether that can be known beforehand.

A *case* is one adapter on one kind of prompt. An estimate is broken there if its rank correlation
with the truth is below `BROKEN`. Strength is ‖ΔW‖ / ‖W‖ over the adapted modules.

1. `curve`: the median correlation of each estimate in bins of strength that hold as many adapters.
2. `confusion`: for each signal that costs no intervention, a threshold that some tasks choose, and
   how often it is right and wrong on others (`warned.py` measures both).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd

from benchmarks.evidence.intervals import Summary, cluster_means, summary, threshold_of

BROKEN = 0.9
BINS = 4


def binned(cases: pd.DataFrame, bins: int = BINS) -> pd.Series:
    """The bin of strength of each case, 0 the gentlest; bins hold about as many adapters each."""
    strengths = cases.groupby("adapter")["strength"].first()
    order = strengths.rank(method="first") - 1
    bin_of = (order * bins // len(strengths)).astype(int)
    return cases["adapter"].map(bin_of)


def curve(cases: pd.DataFrame, bins: int = BINS) -> dict[str, list[tuple[float, Summary]]]:
    """Per method: for each bin, its median strength and the correlation over clusters."""
    found: dict[str, list[tuple[float, Summary]]] = {}
    of_bin = binned(cases, bins)
    for method, rows in cases.groupby("method", sort=False):
        points = []
        for _, inside in rows.groupby(of_bin.loc[rows.index]):
            means = cluster_means(inside, "agreement")
            strength = float(inside.groupby("adapter")["strength"].first().median())
            points.append((strength, summary(means[str(method)])))
        found[str(method)] = points
    return found


def warned_cases(warned: dict[str, Any], question: str) -> pd.DataFrame:
    """One row per adapter and kind of prompt: its signals, and whether the estimate is broken."""
    rows = []
    for name, one in warned.items():
        for kind in one["kinds"].values():
            case = {
                "adapter": name,
                "confirms": one["confirms"],
                "broken": kind["agreement"][question] < BROKEN,
            }
            rows.append({**case, **kind["signals"]})
    return pd.DataFrame(rows)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts of cases, by whether they were warned of and whether they are broken.

    Attributes:
        hit: both.
        false, missed: the one, or the other, alone.
        silent: neither.
    """

    hit: int
    false: int
    missed: int
    silent: int

    @property
    def f1(self) -> float:
        """2 hits / (2 hits + false alarms + missed), and 0 where nothing is broken or warned of."""
        known = 2 * self.hit + self.false + self.missed
        if not known:
            return 0.0
        return 2 * self.hit / known


def confusion(cases: pd.DataFrame, signal: str) -> tuple[float, Counts, Counts]:
    """The threshold that tasks choose, with its counts on them, and on tasks that chose nothing."""
    known = cases.dropna(subset=[signal])
    is_confirming = known["confirms"].astype(bool)
    choosing = known[~is_confirming]
    confirming = known[is_confirming]
    threshold = threshold_of(choosing[signal], choosing["broken"])
    on_choosing = _counts(choosing, signal, threshold)
    on_confirming = _counts(confirming, signal, threshold)
    return threshold, on_choosing, on_confirming


def _counts(cases: pd.DataFrame, signal: str, threshold: float) -> Counts:
    warned = cases[signal] >= threshold
    broken = cases["broken"]
    return Counts(
        hit=int((warned & broken).sum()),
        false=int((warned & ~broken).sum()),
        missed=int((~warned & broken).sum()),
        silent=int((~warned & ~broken).sum()),
    )
