"""The tables of docs/precision.md: the rows that `benchmarks/precision.py` measured.

docs/precision.json holds those of the analyses, docs/floors.json those of noise floors. Each table
stands between two marks, and what is said about it is written by hand.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from marks import put_in

DOCS = Path(__file__).parent.parent / "docs"
RESULTS, PAGE = DOCS / "precision.json", DOCS / "precision.md"
FLOORS = DOCS / "floors.json"
REAL = "SmolLM2-135M"
TRUSTED = 0.95
KEY = ("model", "dtype", "analysis")
Row = dict[str, Any]


def add(row: Row, path: Path = RESULTS) -> None:
    """Put a row in the place of the same model, dtype and analysis; render the page.

    Args:
        row: as `precision.py` makes it.
        path: the file of such rows.
    """
    others = [old for old in read(path) if any(old.get(k) != row.get(k) for k in KEY)]
    path.write_text(json.dumps([*others, _rounded(row)], indent=0) + "\n")
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), read()), encoding="utf-8")


def read(path: Path = RESULTS) -> list[Row]:
    """Every row so far.

    Args:
        path: the file of rows.
    """
    return json.loads(path.read_text()) if path.exists() else []


def _rounded(row: Row) -> Row:
    def short(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return None if math.isnan(value) else float(f"{value:.3g}")

    return {key: short(value) for key, value in row.items()}


def render(text: str, rows: list[Row]) -> str:
    """The page with its tables put in.

    Args:
        text: the page.
        rows: of docs/precision.json.
    """
    tiny = [row for row in rows if row["model"] != REAL]
    order = list(dict.fromkeys(row["analysis"] for row in tiny))
    real = [row for row in rows if row["model"] == REAL]
    real.sort(key=lambda row: order.index(row["analysis"]) if row["analysis"] in order else -1)
    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in real):
        lines = [_real(row) for row in real if row["dtype"] == dtype]
        parts += [f"### {REAL} in {dtype}\n", _table(REAL_HEAD, lines)]
    families = ", ".join(dict.fromkeys(row["model"] for row in tiny))
    lines = [_tiny(name, [row for row in tiny if row["analysis"] == name]) for name in order]
    missing = [name for name in order if name not in {row["analysis"] for row in real}]
    if missing:
        parts.append(f"Not run on {REAL}: {'; '.join(missing)}.\n")
    parts += [f"### Tiny models: {families}\n", _table(TINY_HEAD, lines)]
    tables = {
        "which to trust": _advice(real),
        "floors": _floors(read(FLOORS)),
        "errors": "\n".join(parts),
    }
    return put_in(text, tables)


def _floors(rows: list[Row]) -> str:
    """A row for each model and dtype, and one for all of a dtype."""
    lines = [_floor_line(row["model"], [row]) for row in rows]
    for kind in dict.fromkeys((row["dtype"], row["analysis"]) for row in rows):
        same = [row for row in rows if (row["dtype"], row["analysis"]) == kind]
        lines.append(_floor_line("**all**", same))
    return _table(FLOORS_HEAD, lines)


FLOORS_HEAD = ["model", "dtype", "readouts", "shifts", "rms of error / floor", "beyond 3 floors"]


def _floor_line(model: str, rows: list[Row]) -> list[str]:
    count, beyond = (sum(row[key] for row in rows) for key in ("shifts", "beyond"))
    rms = math.sqrt(sum(row["shifts"] * row["rms"] ** 2 for row in rows) / count)
    kind = rows[0]["dtype"], rows[0]["analysis"]
    return [model, *kind, str(count), f"{rms:.2f}", f"{beyond} ({100 * beyond / count:.1f} %)"]


def _advice(real: list[Row]) -> str:
    """A row for each analysis, a column for each dtype."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in real))
    held = {(row["analysis"], row["dtype"]): _trust(row) for row in real}
    names = dict.fromkeys(row["analysis"] for row in real)
    lines = [[name, *(held.get((name, dtype), "not run") for dtype in dtypes)] for name in names]
    return _table(["analysis", *dtypes], lines)


def _trust(row: Row) -> str:
    if row["clear"] is None:
        return "trust" if (row["spearman"] or 0.0) >= TRUSTED else "rerun in float32"
    if row["clear"] >= TRUSTED:
        return "trust"
    return f"the {row['clear']:.0%} beyond 3 floors" if row["clear"] else "rerun in float32"


REAL_HEAD = [
    "analysis",
    "error",
    "Spearman",
    "error / floor",
    "beyond 3 floors",
    "… Spearman",
    "it says",
]
TINY_HEAD = ["analysis", "error, bfloat16", "error, float16", "error / floor, lowest to highest"]


def _real(row: Row) -> list[str]:
    spearman, ratio, among = (_number(row[key]) for key in ("spearman", "ratio", "spearman_clear"))
    clear = "" if row["clear"] is None or not spearman else f"{row['clear']:.0%}"
    return [row["analysis"], _percent(row["error"]), spearman, ratio, clear, among, row["says"]]


def _tiny(name: str, rows: list[Row]) -> list[str]:
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    worst = [
        max((row["error"] for row in rows if row["dtype"] == dtype), default=None)
        for dtype in ("bfloat16", "float16")
    ]
    spread = f"{min(ratios):.2g} to {max(ratios):.2g}" if ratios else ""
    return [name, *map(_percent, worst), spread]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2g} %" if value < 1 else f"{100 * value:.0f} %"


def _table(head: list[str], lines: list[list[str]]) -> str:
    every = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every) + "\n"
