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

What the weights take, counted; 4 bit is NF4 with quantised scales on the blocks' linear modules,
and bfloat16 for the rest. A lens holds the factors of its adapter in float32, once in the adapter
and once in the model's basis.
"""
MEASURED = """The rest is measured: random weights in these shapes, a random LoRA on every linear
module of the blocks, a TransformerBridge with eager attention. Times are in F, one plain forward
pass of the same tokens with all positions unembedded. Beside them stands the peak in MiB of memory
beyond weights, adapter and lens. FB is a plain forward and backward pass of the base, which reads
one margin. The prompt has 64 tokens; the response 512 more, and its F is a pass of all 576. Each
cell was run once, on the CPU in processor time.

`first_order` is FB and the two exact ends, g(0) and g(1): passes that unembed one position. The
smaller the vocabulary's share of the model, the nearer these two are to 2 F.

    python benchmarks/shapes.py Gemma-3-270M Qwen2.5-0.5B --ranks 1 16 64 --write
    python benchmarks/shapes.py Qwen2.5-7B Qwen2.5-14B --device cuda --dtype bfloat16 --write
"""


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
    PAGE.write_text(render(held))


def read() -> dict[str, list[Row]]:
    """Every row so far, and the sizes."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"sizes": [], "rows": []}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(held) for key, held in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def render(held: dict[str, list[Row]]) -> str:
    """The page: sizes, a table for each machine and dtype, and what was not run.

    Args:
        held: docs/shapes.json.
    """
    rows = held["rows"]
    parts = [INTRODUCTION, sizes_table(held["sizes"]), MEASURED]
    for where in dict.fromkeys((row["machine"], row["dtype"]) for row in rows):
        here = [row for row in rows if (row["machine"], row["dtype"]) == where]
        parts += [f"## {where[1]} on {where[0]}\n", _table(here)]
    return "\n".join([*parts, not_run(rows, [size["shape"] for size in held["sizes"]])])


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
        said.append("Nothing was run on a GPU, as none was at hand; the second command does it.")
    return "## What was not run\n\n" + " ".join(said or ["Nothing."]) + "\n"
