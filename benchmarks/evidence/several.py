"""The table of sets of modules chosen on some wordings and judged on others (docs/subsets.json).

What a set keeps of a wording is (m − m₀) / (m₁ − m₀). An adapter's number is the mean over wordings
(and over draws of random sets); adapters of one task, which share their first wording, count once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.evidence.intervals import cluster_means, summary, verdicts
from benchmarks.evidence.results import DOCS
from benchmarks.evidence.tables import FIRST, HALF, NAMES, PATH, markdown, number, span

NUMBERS = DOCS / "subsets.json"
SEARCH = "best_subset"
GREEDY = "greedy"
RANDOM = "random, 0"
REFERENCE = f"{SEARCH}, 4"  # what the others are compared with, fixed before anything was measured
CALLED = {SEARCH: "`ll.best_subset`", GREEDY: "greedy, by gradients", "random": "random, ten sets"}
SHOWN = [
    *(f"{SEARCH}, {given}" for given in (4, 2, 1)),
    *(f"{GREEDY}, {given}" for given in (4, 2, 1)),
    *(f"{PATH}, {given}" for given in (4, 2, 1)),
    f"{HALF}, 4",
    f"{FIRST}, 4",
    RANDOM,
]
Subsets = dict[str, Any]


def read() -> Subsets:
    """All that docs/subsets.json holds."""
    return json.loads(NUMBERS.read_text())


def shares(row: Subsets, method: str) -> np.ndarray:
    """The kept share of the shift on each wording, in the mean over the method's sets."""
    base = np.array(row["base"])
    adapted = np.array(row["adapted"])
    margins = np.array(row["methods"][method]["margins"])
    return ((margins - base) / (adapted - base)).mean(0)


def _long(numbers: Subsets) -> Iterator[dict[str, Any]]:
    """One row per adapter and method: what is kept held out and at home, and what it took."""
    for name, row in numbers["adapters"].items():
        for method, found in row["methods"].items():
            kept = shares(row, method)
            given = found["wordings"] or len(kept) - len(row["held out"])
            yield {
                "cluster": row["prompts"][0],
                "adapter": name,
                "method": method,
                "held out": kept[row["held out"]].mean(),
                "home": kept[:given].mean(),
                "gradients": found["gradients"],
                "forwards": found.get("forwards", 0),
            }


def section(numbers: Subsets) -> dict[str, Any]:
    """The table, what it is of, and how the others stand beside `best_subset`."""
    long = pd.DataFrame(_long(numbers))
    held_out = cluster_means(long, "held out")[SHOWN]
    apart = held_out.drop(columns=REFERENCE).sub(held_out[REFERENCE], axis=0)
    words = verdicts(apart)
    medians = apart.median()
    head = ["method", "wordings", "held out", "worst", "at home", "worst"]
    head += ["gradients", "forward passes", f"beside {CALLED[SEARCH]} on 4"]
    rows = []
    for method in SHOWN:
        beside = "—"
        if method in words.index:
            beside = f"{medians[method]:+.3f}, {words[method]}"
        rows.append([*_cells(long, method), beside])
    return {
        "table": markdown(head, rows),
        "adapters": len(numbers["adapters"]),
        "tasks": len(held_out),
        "compared": len(words),
        "beside": _beside(words),
        "versions": ", ".join(f"{k} {v}" for k, v in numbers["versions"].items()),
    }


def _cells(long: pd.DataFrame, method: str) -> list[str]:
    """The cells of one method: its wordings, its kept shares, and the passes of its choice."""
    rows = long[long["method"] == method]
    words, given = _in_words(method)
    cells = [words, given or "—"]
    for place in ("held out", "home"):
        tasks = rows.groupby("cluster")[place].mean()
        cells += [span(summary(tasks)), number(rows[place].min())]
    for passes in ("gradients", "forwards"):
        cells.append(f"{rows[passes].median():.0f}")
    return cells


def _beside(words: pd.Series) -> str:
    """End the sentence that begins with `best_subset`: how does it compare with the others?"""
    parts = []
    for verdict, relation in (("worse", "is better than"), ("better", "is worse than")):
        named = [_named(method) for method in words.index[words == verdict]]
        if named:
            parts.append(f"{relation} {'; '.join(named)}")
    ties = int((words == "tie").sum())
    if ties:
        parts.append(f"cannot be told from {ties} of the {len(words)} others")
    return ", and ".join(parts)


def _named(method: str) -> str:
    """A method with the number of its wordings, in words."""
    words, given = _in_words(method)
    if not given:
        return words
    return f"{words}, on {given}"


def _in_words(method: str) -> tuple[str, str]:
    """The words for a method, and on how many wordings it chose; empty for random sets."""
    name, given = method.rsplit(", ", 1)
    words = CALLED.get(name, NAMES.get(name, name))
    return words, "" if given == "0" else given
