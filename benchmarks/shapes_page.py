"""docs/shapes.md from docs/shapes.json: the rows that `benchmarks/shapes.py` measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
RESULTS, PAGE = DOCS / "shapes.json", DOCS / "shapes.md"
KEY = ("machine", "dtype", "shape", "rank")
Row = dict[str, Any]
INTRODUCTION = """# Cost by size of model

Random weights in the shapes of known models, with a random LoRA on every linear module of the blocks, on a
TransformerBridge. Times are in F, one plain forward pass of the same tokens with all positions unembedded. Peaks are
memory beyond the weights, the adapter and the lens, in MiB. FB is a plain forward and backward pass of the base, for
comparison. The prompt has 64 tokens; the response 512 more, and its F is a pass of all 576. Each cell was run once.

    python benchmarks/shapes.py Qwen2.5-0.5B --ranks 1 16 64 --write
    python benchmarks/shapes.py Qwen2.5-7B Qwen2.5-14B --device cuda --dtype bfloat16 --write
"""


def add(row: Row) -> None:
    """Put a row in the place of one of the same machine, dtype, shape and rank; render the page.

    Args:
        row: as `shapes.py` makes it.
    """
    rows = [old for old in read() if any(old[k] != row[k] for k in KEY)]
    RESULTS.write_text(json.dumps([*rows, _rounded(row)], indent=1) + "\n")
    PAGE.write_text(render(read()))


def read() -> list[Row]:
    """Every row so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(held) for key, held in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def render(rows: list[Row]) -> str:
    """The page: a table for each machine and dtype, and what was not run.

    Args:
        rows: of docs/shapes.json.
    """
    parts = [INTRODUCTION]
    for where in dict.fromkeys((row["machine"], row["dtype"]) for row in rows):
        here = [row for row in rows if (row["machine"], row["dtype"]) == where]
        parts += [f"## {where[1]} on {where[0]}\n", _table(here)]
    return "\n".join([*parts, not_run(rows)])


def _table(rows: list[Row]) -> str:
    works = list(dict.fromkeys(work for row in rows for work in row["cells"]))
    head = ["model", "weights, MiB", "rank", *works]
    order = sorted(rows, key=lambda row: (row["weights"], row["rank"]))
    body = [
        [row["shape"], f"{row['weights']:.0f}", str(row["rank"]), *_cells(row, works)]
        for row in order
    ]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines]) + "\n"


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


def not_run(rows: list[Row]) -> str:
    """Which shapes and devices no row is of.

    Args:
        rows: of docs/shapes.json.
    """
    from shapes import SHAPES  # noqa: PLC0415

    seen = {row["shape"] for row in rows}
    missing = ", ".join(shape for shape in SHAPES if shape not in seen)
    said = [f"Not run: {missing}."] if missing else []
    if all(row["machine"].startswith("CPU") for row in rows):
        said.append("Nothing was run on a GPU, as none was at hand; the second line above does it.")
    return "## What was not run\n\n" + " ".join(said or ["Nothing."]) + "\n"
