"""Where estimates break as adapters grow violent, and whether that can be known beforehand.

A *case* is one adapter on one kind of prompt. An estimate is broken there if its rank correlation
with the measured effects is below `BROKEN`. Strength is ‖ΔW‖ / ‖W‖ over the adapted modules.

1. `curve`: the mean correlation of each estimate in bins of strength that hold as many adapters.
2. `warnings_of`: for each signal that costs no intervention, precision and recall of "broken" on
   training tasks that its threshold was not chosen on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from intervals import Interval, Warnings, cluster_means, held_out_warnings, interval

BROKEN, BINS = 0.9, 4


def binned(cases: pd.DataFrame, bins: int = BINS) -> pd.Series:
    """The bin of strength of each case, 0 the gentlest; bins hold about as many adapters each."""
    strengths = cases.groupby("adapter")["strength"].first()
    order = strengths.rank(method="first") - 1
    bin_of = (order * bins // len(strengths)).astype(int)
    return cases["adapter"].map(bin_of)


def curve(cases: pd.DataFrame, bins: int = BINS) -> dict[str, list[tuple[float, Interval]]]:
    """Per method: for each bin, its median strength and the mean correlation over clusters."""
    found: dict[str, list[tuple[float, Interval]]] = {}
    of_bin = binned(cases, bins)
    for method, rows in cases.groupby("method", sort=False):
        points = []
        for _, inside in rows.groupby(of_bin.loc[rows.index]):
            means = cluster_means(inside, "agreement")
            strength = float(inside.groupby("adapter")["strength"].first().median())
            points.append((strength, interval(means[str(method)])))
        found[str(method)] = points
    return found


def warnings_of(
    cases: pd.DataFrame, method: str, signals: Sequence[str]
) -> dict[str, tuple[Warnings, float]]:
    """Per signal: how its warning fares, and the threshold chosen on every cluster (the median)."""
    rows = cases[cases["method"] == method].copy()
    rows["broken"] = rows["agreement"] < BROKEN
    found = {}
    for signal in signals:
        known = rows.dropna(subset=[signal]).reset_index(drop=True)
        judged = held_out_warnings(known, signal, "broken")
        finite = [t for t in judged.thresholds if np.isfinite(t)]
        found[signal] = (judged, float(np.median(finite)) if finite else float("nan"))
    return found
