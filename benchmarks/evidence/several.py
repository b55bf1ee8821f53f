"""Sets of modules chosen on one wording or several, judged on others: from docs/subsets.json.

What a set keeps of a wording is (m − m₀) / (m₁ − m₀). An adapter's number is the mean over wordings
(and over draws of random sets); adapters of one task, which share their first wording, count once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from intervals import cluster_means, summary, verdicts
from results import DOCS
from tables import FIRST, HALF, NAMES, PATH, markdown, number, span

NUMBERS = DOCS / "subsets.json"
SEARCH = "best_subset"
GREEDY = "greedy"
RANDOM = "random, 0"
REFERENCE = f"{SEARCH}, 4"  # what the others are compared with, fixed before anything was measured
CALLED = {SEARCH: "`ll.best_subset`", GREEDY: "greedy, by gradients", "random": "random, ten sets"}
SHOWN = [f"{method}, {given}" for method in (SEARCH, GREEDY, PATH) for given in (4, 2, 1)]
SHOWN += [f"{method}, 4" for method in (HALF, FIRST)] + [RANDOM]
Subsets = dict[str, Any]


def read() -> Subsets:
    return json.loads(NUMBERS.read_text())


def shares(row: Subsets, method: str) -> np.ndarray:
    """[wording], in the mean over the method's sets."""
    base = np.array(row["base"])
    adapted = np.array(row["adapted"])
    margins = np.array(row["methods"][method]["margins"])
    return ((margins - base) / (adapted - base)).mean(0)


def _long(numbers: Subsets) -> Iterator[dict[str, Any]]:
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
    held = cluster_means(long, "held out")[SHOWN]
    apart = held.drop(columns=REFERENCE).sub(held[REFERENCE], axis=0)
    words = verdicts(apart)
    medians = apart.median()
    head = ["method", "wordings", "held out", "worst", "at home", "worst"]
    head += ["gradients", "forward passes", f"beside {CALLED[SEARCH]} on 4"]
    told = {method: f"{medians[method]:+.3f}, {words[method]}" for method in words.index}
    rows = [[*_cells(long, method), told.get(method, "—")] for method in SHOWN]
    return {
        "table": markdown(head, rows),
        "adapters": len(numbers["adapters"]),
        "tasks": len(held),
        "compared": len(words),
        "beside": _beside(words),
        "versions": ", ".join(f"{k} {v}" for k, v in numbers["versions"].items()),
    }


def _cells(long: pd.DataFrame, method: str) -> list[str]:
    rows = long[long["method"] == method]
    name, given = method.rsplit(", ", 1)
    cells = [CALLED.get(name, NAMES.get(name, name)), given if given != "0" else "—"]
    for value in ("held out", "home"):
        tasks = rows.groupby("cluster")[value].mean()
        cells += [span(summary(tasks)), number(rows[value].min())]
    return cells + [f"{rows[of].median():.0f}" for of in ("gradients", "forwards")]


def _beside(words: pd.Series) -> str:
    """The verdicts in a sentence's end."""
    parts = []
    for verdict, told in (("worse", "is better than"), ("better", "is worse than")):
        named = [_named(method) for method in words.index[words == verdict]]
        if named:
            parts.append(f"{told} {'; '.join(named)}")
    ties = int((words == "tie").sum())
    if ties:
        parts.append(f"cannot be told from {ties} of the {len(words)} others")
    return ", and ".join(parts)


def _named(method: str) -> str:
    name, given = method.rsplit(", ", 1)
    words = CALLED.get(name, NAMES.get(name, name))
    return words if given == "0" else f"{words}, on {given}"
