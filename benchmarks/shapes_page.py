"""The tables by size of model in docs/performance.md, from docs/shapes.json (`shapes.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from marks import put_in

DOCS = Path(__file__).parent.parent / "docs"
RESULTS, PAGE = DOCS / "shapes.json", DOCS / "performance.md"
KEY = ("machine", "dtype", "shape", "rank")
Row = dict[str, Any]


def add(row: Row) -> None:
    """Join cells to those of the same machine, dtype, shape and rank; render the page.

    Args:
        row: as `shapes.py` makes it.
    """
    held, others, cells = read(), [], row["cells"]
    for old in held["rows"]:
        if all(old[k] == row[k] for k in KEY):
            cells = {**old["cells"], **cells}
        else:
            others.append(old)
    _write({**held, "rows": [*others, _rounded({**row, "cells": cells})]})


def add_sizes(sizes: list[Row]) -> None:
    """What the weights take.

    Args:
        sizes: of every shape.
    """
    _write({**read(), "sizes": [_rounded(size) for size in sizes]})


def _write(held: dict[str, list[Row]]) -> None:
    RESULTS.write_text(json.dumps(held, indent=1) + "\n")
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), held), encoding="utf-8")


def read() -> dict[str, list[Row]]:
    """Every row so far, and the sizes."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"sizes": [], "rows": []}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(held) for key, held in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def render(text: str, held: dict[str, list[Row]]) -> str:
    """The page with its tables put in: sizes, one for each machine and dtype, and what was not run.

    Args:
        text: the page.
        held: docs/shapes.json.
    """
    rows, parts = held["rows"], []
    for where in dict.fromkeys((row["machine"], row["dtype"]) for row in rows):
        here = [row for row in rows if (row["machine"], row["dtype"]) == where]
        parts += [f"**{where[1]} on {where[0]}**\n", _table(here)]
    parts.append(not_run(rows, [size["shape"] for size in held["sizes"]]))
    return put_in(text, {"sizes": sizes_table(held["sizes"]), "shapes": "\n".join(parts)})


def sizes_table(sizes: list[Row]) -> str:
    """Weights and factors, counted.

    Args:
        sizes: of docs/shapes.json.
    """
    head = ["model", "sites", "float32, GiB", "bfloat16, GiB", "4 bit, GiB", "LoRA of rank 16, MiB"]
    keys = ("float32", "bfloat16", "4 bit", "rank 16")
    body = [[s["shape"], str(s["sites"]), *(f"{s[key]:.3g}" for key in keys)] for s in sizes]
    return _lines(head, body)


def _table(rows: list[Row]) -> str:
    works = list(dict.fromkeys(work for row in rows for work in row["cells"]))
    head = ["model", "weights, MiB", "rank", *works]
    order = sorted(rows, key=lambda row: (row["weights"], row["rank"]))
    body = [
        [row["shape"], f"{row['weights']:.0f}", str(row["rank"]), *_cells(row, works)]
        for row in order
    ]
    return _lines(head, body)


def _lines(head: list[str], body: list[list[str]]) -> str:
    every = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in every) + "\n"


def _cells(row: Row, works: list[str]) -> list[str]:
    return [_cell(row["cells"][work]) if work in row["cells"] else "not run" for work in works]


def _cell(cell: dict[str, float]) -> str:
    return f"{cell['F']:.1f} F, {cell['MiB']:.0f}"


def line(row: Row) -> str:
    """A row in words, for the terminal.

    Args:
        row: as `shapes.py` makes it.
    """
    cells = "; ".join(f"{work} {_cell(cell)} MiB" for work, cell in row["cells"].items())
    return f"{row['shape']}, rank {row['rank']}, {row['dtype']}: {cells}"


def not_run(rows: list[Row], shapes: list[str]) -> str:
    """Which shapes and devices no row is of.

    Args:
        rows: of docs/shapes.json.
        shapes: every shape.
    """
    seen = {row["shape"] for row in rows}
    missing = ", ".join(shape for shape in shapes if shape not in seen)
    said = [f"Not run: {missing}."] if missing else []
    if all(row["machine"].startswith("CPU") for row in rows):
        said.append("Nothing was run on a GPU; the second command does it.")
    return " ".join(said) + "\n"
