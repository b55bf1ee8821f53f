"""The tables of memory in docs/performance.md, from docs/memory.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
RESULTS, PAGE = DOCS / "memory.json", DOCS / "performance.md"
MARKS = "<!-- memory -->", "<!-- end of memory -->"
PLAIN = ("F", "FB")
KEY = ("tokens", "attn", "bound", "work")
Cell = dict[str, Any]


def add(cell: Cell) -> None:
    """Put a cell in the place of the one of the same key; render the tables.

    Args:
        cell: tokens, attn, bound in bytes (None: no bound), work, and what was found.
    """
    cells = read()
    same = [i for i, old in enumerate(cells) if all(old[key] == cell[key] for key in KEY)]
    cells[slice(same[0], same[0] + 1) if same else slice(len(cells), None)] = [cell]
    RESULTS.write_text(json.dumps(cells, indent=0) + "\n")
    write()


def write() -> None:
    """The tables, between the marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{render(read())}\n{MARKS[1]}{after}", encoding="utf-8")


def read() -> list[Cell]:
    """Every cell so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def render(cells: list[Cell]) -> str:
    """A table for each length.

    Args:
        cells: of docs/memory.json.
    """
    lengths = sorted({cell["tokens"] for cell in cells})
    return "\n".join(_table([c for c in cells if c["tokens"] == length]) for length in lengths)


def _table(cells: list[Cell]) -> str:
    columns = sorted({_column(cell) for cell in cells})
    found = {(cell["work"], _column(cell)): cell["found"] for cell in cells}
    head = [f"{cells[0]['tokens']:,} tokens", *(_heading(*column) for column in columns)]
    body = [
        [work, *(found.get((work, column), _missing(work, column)) for column in columns)]
        for work in dict.fromkeys(cell["work"] for cell in cells)
    ]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _missing(work: str, column: tuple[str, float]) -> str:
    """Plain passes know no bound."""
    return "" if work in PLAIN and column[1] else "not run"


def _column(cell: Cell) -> tuple[str, float]:
    return cell["attn"], cell["bound"] or 0.0


def _heading(attn: str, bound: float) -> str:
    return f"{attn}, {f'within {bound / 1e9:.1f} GB' if bound else 'no bound'}"
