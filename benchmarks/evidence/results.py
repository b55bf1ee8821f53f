"""Stored results: one file an adapter, packed into docs/faithfulness.json, read as data frames.

`pack` keeps what the page needs of `measure.py`'s files (of agreement on other prompts, the main
methods' rank correlations). Scores are nested, question → metric → method → kind of prompt, as
most of the file is theirs. What is packed joins what is stored, so hours of measuring may be spread
over days and machines.

The slopes of SmolLM2's adapters were measured later than the rest, on adapters that were trained
again. One of these, kyoto-violent-qv, came out with other rank correlations, so it has no slopes.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

import lens_lora as ll
from benchmarks.evidence.tables import CALLED, MAIN

DOCS = Path(__file__).parents[2] / "docs"
NUMBERS = DOCS / "faithfulness.json"
PAGE = DOCS / "faithfulness_data.md"
KEPT_FIELDS = ("cluster", "kind", "rank", "targets", "lr", "steps", "dora", "rslora", "sites")
CEILING = {"trained": "best_subset", "paraphrase": "best_subset/paraphrase"}
RULES = ("path/2", "path/4", "path/8")
TOL = inspect.signature(ll.path_attribution).parameters["tol"].default
Numbers = dict[str, Any]


def pack(folder: Path) -> Numbers:
    """All results of a folder, as they are stored in the docs."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise SystemExit(f"no results in {folder}: run benchmarks/evidence/measure.py first")
    found = [json.loads(file.read_text()) for file in files]
    return {"adapters": {one["name"]: _adapter(one) for one in found}}


def joined(stored: Numbers, packed: Numbers) -> Numbers:
    """The stored numbers, with the packed adapters added, or put in place of their older ones."""
    return {**stored, "adapters": {**stored["adapters"], **packed["adapters"]}}


def _adapter(one: dict[str, Any]) -> dict[str, Any]:
    """One adapter's numbers in the order in which they are stored."""
    costs = {}
    for method, cost in one["costs"].items():
        costs[method] = {"passes": rounded(cost["passes"]), "time": rounded(cost["time"])}
    signals = {}
    for kind, values in one["signals"].items():
        signals[kind] = {name: rounded(value) for name, value in values.items()}
    kept: dict[str, Any] = {"base": Path(one["base"]).name}
    if one.get("lean"):
        kept["lean"] = True
    for field in KEPT_FIELDS:
        kept[field] = one[field]
    kept["ends"] = {kind: _ends(question) for kind, question in one["questions"].items()}
    kept["signals"] = signals
    kept["ceilings"] = one["ceilings"]
    kept["left_out"] = one["left_out"]
    kept["versions"] = one["versions"]
    kept["costs"] = costs
    kept["scores"] = _nested(one["scores"])
    return kept


def _ends(question: dict[str, Any]) -> list[list[float]]:
    """[base, adapted] of each prompt."""
    pairs = zip(question["base"], question["adapted"], strict=True)
    return [[round(base, 2), round(adapted, 2)] for base, adapted in pairs]


def _nested(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores by question, metric, method and kind of prompt; held out, of the main methods."""
    found: dict[str, Any] = {}
    for row in rows:
        elsewhere = row["question"].endswith("/held_out")
        if elsewhere and (row["metric"] != "spearman" or row["method"] not in MAIN):
            continue
        metrics = found.setdefault(row["question"], {})
        methods = metrics.setdefault(row["metric"], {})
        kinds = methods.setdefault(row["method"], {})
        kinds[row["prompts"]] = rounded(row["value"])
    return found


def rounded(value: Any) -> Any:
    """Four digits are more than another machine reproduces; what does not exist is null."""
    if not isinstance(value, float):
        return value
    if math.isnan(value):
        return None
    return float(f"{value:.4g}")


def write(numbers: Numbers) -> None:
    """Store all numbers in docs/faithfulness.json, with one line for each adapter."""
    parts = [f"{json.dumps(key)}: {{\n{_lines(value)}\n}}" for key, value in numbers.items()]
    NUMBERS.write_text(f"{{{', '.join(parts)}}}\n")


def _lines(entries: dict[str, Any]) -> str:
    rows = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in sorted(entries.items())]
    return ",\n".join(rows)


def read() -> Numbers:
    """All that docs/faithfulness.json holds."""
    return json.loads(NUMBERS.read_text())


def bases_of(numbers: Numbers) -> list[str]:
    """The names of the bases, that of the most adapters first."""
    bases = pd.Series([one["base"] for one in numbers["adapters"].values()])
    return list(bases.value_counts().index)


def scores_of(numbers: Numbers) -> pd.DataFrame:
    """One row per adapter, kind of prompt, question, metric and method; derived metrics too."""
    rows = []
    for name, one in numbers["adapters"].items():
        start = (name, one["cluster"], one["base"])
        for row in _flat(_as_called(one)["scores"]):
            rows.append((*start, *row))
    columns = ["adapter", "cluster", "base", "prompts", "question", "metric", "method", "value"]
    scores = pd.DataFrame(rows, columns=columns)
    return pd.concat([scores, _of_the_best(scores), _incomplete(scores)], ignore_index=True)


def _flat(scores: dict[str, Any]) -> Iterator[tuple[str, str, str, str, float]]:
    """Undo the nesting of one adapter's scores: kind of prompt, question, metric, method, value."""
    for question, metrics in scores.items():
        for metric, methods in metrics.items():
            for method, kinds in methods.items():
                for kind, value in kinds.items():
                    if value is not None:
                        yield kind, question, metric, method, value


def _of_the_best(scores: pd.DataFrame) -> pd.DataFrame:
    """Score a ranking's top fifth by the share that it keeps of what the best set found keeps."""
    kept = scores[(scores["question"] == "keep") & (scores["metric"] == "kept")]
    parts = []
    for kind, ceiling in CEILING.items():
        here = kept[kept["prompts"] == kind]
        best = here[here["method"] == ceiling].set_index("adapter")["value"]
        share = here[here["adapter"].isin(best.index[best > 0])].copy()
        share["value"] = share["value"] / share["adapter"].map(best).astype(float)
        parts.append(share.assign(metric="of the best found"))
    return pd.concat(parts)


def is_met(total: float) -> bool:
    """Whether a sum is within the tolerance of `ll.path_attribution`, to the digits stored."""
    return abs(round(total - 1, 4)) <= TOL


def _as_called(one: Numbers) -> Numbers:
    """An adapter's numbers with `ll.path_attribution`, as far as its rules were run.

    It stops at 4 nodes where their sum meets its tolerance, and else at 8. The call asks that of
    each prompt, and what is stored is the sum over a kind's, so it never stops earlier than here.
    """
    sums = one["scores"].get("sum", {}).get("sum", {})
    costs = one["costs"]
    if not {*RULES} <= {*sums}:
        return one
    four = sums["path/4"]
    eight = sums["path/8"]
    last = {}
    for kind, sum_of_eight in eight.items():
        last[kind] = four[kind] if is_met(four[kind]) else sum_of_eight
    rules_run = RULES[:2] if is_met(four["trained"]) else RULES
    rules = [costs[rule] for rule in rules_run]
    cost = {unit: sum(rule[unit] for rule in rules) for unit in rules[0]}
    scores = {**one["scores"], "sum": {"sum": {**sums, CALLED: last}}}
    return {**one, "scores": scores, "costs": {**costs, CALLED: cost}}


def _incomplete(scores: pd.DataFrame) -> pd.DataFrame:
    """How far a method's sum is from the shift: |Σ / shift − 1|."""
    sums = scores[scores["question"] == "sum"].copy()
    sums["value"] = (sums["value"] - 1).abs()
    return sums.assign(metric="incompleteness")


def costs_of(numbers: Numbers) -> pd.DataFrame:
    """The cost of each method on a prompt: passes, a backward one as two, and F by process time."""
    rows = []
    for name, one in numbers["adapters"].items():
        for method, cost in _as_called(one)["costs"].items():
            rows.append((name, one["cluster"], one["base"], method, cost["passes"], cost["time"]))
    return pd.DataFrame(rows, columns=["adapter", "cluster", "base", "method", "passes", "time"])


def cases_of(numbers: Numbers, scores: pd.DataFrame, question: str) -> pd.DataFrame:
    """One row per adapter, kind of prompt and method: its rank correlation, and all signals."""
    chosen = (scores["question"] == question) & (scores["metric"] == "spearman")
    rows = scores[chosen].rename(columns={"value": "agreement"})
    signal_rows = []
    for name, one in numbers["adapters"].items():
        for kind, values in one["signals"].items():
            signal_rows.append({"adapter": name, "prompts": kind, **values})
    signals = pd.DataFrame(signal_rows)
    for at in ("0", "1"):
        signals[f"sum_off_{at}"] = (signals[f"sum_at_{at}"] - 1).abs()
    return rows.merge(signals, on=["adapter", "prompts"])
