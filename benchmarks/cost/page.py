"""Put what `python -m benchmarks.cost` printed into benchmarks/RESULTS.md and docs/performance.md.

docs/costs.json holds the output of each command, by transformer-lens version. In RESULTS.md it is
put between the marks that name the command. The short table of performance.md is taken from one
command.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TypedDict

ROOT = Path(__file__).parents[2]
PRINTED = ROOT / "docs" / "costs.json"
PAGE = ROOT / "benchmarks" / "RESULTS.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
# The commands whose rows the short table has, and the one at half the rate beside it.
SHORT = ("3.9 · --works derivatives", "3.9 · --works analyses")
SLOWER = ("3.9 · --works derivatives --half-rate",)
# The rows that it keeps, and their names there.
SHOWN = {
    "one readout, all sites": "one readout, every module: the derivative alone",
    "first_order, with its exact shift": "… with the exact shift",
    "16 tokens, all sites": "sixteen tokens, every module",
    "joint whole-vocabulary shift": "the whole vocabulary, all modules together",
    "every site's whole-vocabulary shift": "the whole vocabulary, every module",
    "exact add-one effects of all sites": "real interventions: every module added, one at a time",
    "H between all pairs of layers": "H between all pairs of layers",
    "path_attribution": "the integral along the path, with its error",
    "fact_margin": "the fact margin: path, flip and noise floors",
    "kl_shares": "the KL, shared out over every module",
    "edges of 61 readers": "every edge between modules and blocks",
}
LENGTHS = ("8 tokens", "64 tokens")
_BLOCK = re.compile(r"(<!-- cost: ([^\n]+) -->\n).*?(<!-- end of cost -->)", re.DOTALL)
_SHORT = re.compile(r"(<!-- short costs -->\n).*?(<!-- end of short costs -->)", re.DOTALL)


class Printed(TypedDict):
    """The output of a command, and the day on which it ran."""

    day: str
    body: str


def key_of(line: str, arguments: str) -> str:
    """The name of a command: its transformer-lens version, and its arguments."""
    return f"{'.'.join(line.split('.')[:2])} · {arguments}"


def read() -> dict[str, Printed]:
    """Every command's output so far."""
    if not PRINTED.exists():
        return {}
    return json.loads(PRINTED.read_text(encoding="utf-8"))


def add(key: str, printed: Printed) -> None:
    """Put what a command printed in the place of what it printed before; render both documents.

    Args:
        key: of the command, for which RESULTS.md has marks.
        printed: its output.

    Raises:
        SystemExit: RESULTS.md has no marks for it.
    """
    named = [found[2] for found in _BLOCK.finditer(PAGE.read_text(encoding="utf-8"))]
    if key not in named:
        raise SystemExit(f"{PAGE.name} has no marks for {key!r}, only for {named}")
    held = {**read(), key: printed}
    every = {name: held[name] for name in named if name in held}
    PRINTED.write_text(json.dumps(every, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    write(every)


def write(every: dict[str, Printed]) -> None:
    """Render both documents.

    Args:
        every: what each command printed.
    """
    for path, render in ((PAGE, page), (PERFORMANCE, performance)):
        text = path.read_text(encoding="utf-8")
        path.write_text(render(text, every), encoding="utf-8")


def page(text: str, every: dict[str, Printed]) -> str:
    """The text of RESULTS.md, with each block as its command printed it."""
    return _BLOCK.sub(lambda found: f"{found[1]}{_block(found[2], every)}\n{found[3]}", text)


def _block(key: str, every: dict[str, Printed]) -> str:
    """A command and what it printed."""
    if key not in every:
        return "Not run."
    line, arguments = key.split(" · ")
    printed = every[key]
    command = f"    python -m benchmarks.cost {arguments}"
    head = f"On {printed['day']}, transformer-lens {line}, "
    return f"{command}\n\n{head}{printed['body'].strip()}"


def performance(text: str, every: dict[str, Printed]) -> str:
    """The text of docs/performance.md, with its short table once each command has run."""
    if not {*SHORT, *SLOWER} <= set(every):
        return text
    table = _short_table(every)
    return _SHORT.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def _short_table(every: dict[str, Printed]) -> str:
    """The rows of `SHOWN` under their names there, at both rates; analyses at the higher one."""
    columns: list[dict[str, str]] = []
    heads: list[str] = []
    for keys in (SHORT, SLOWER):
        bodies = [every[key]["body"] for key in keys]
        rate = _rate_of(bodies[0])
        for length in LENGTHS:
            heads.append(f"{length}, {rate}")
            columns.append(_column(bodies, length))
    lines = [f"| | {' | '.join(heads)} |", f"|{' --- |' * (1 + len(heads))}"]
    for work, name in SHOWN.items():
        cells = [column.get(work, "") for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rate_of(body: str) -> str:
    """The rate of products that the first line of an output states."""
    found = re.search(r"matmul peak (\d+ GFLOP/s)", body)
    assert found, "every output begins with the rate"
    return found[1]


def _column(bodies: list[str], length: str) -> dict[str, str]:
    """The cells of one length by row, from the tables of several outputs."""
    cells: dict[str, str] = {}
    for body in bodies:
        place: int | None = None
        for line in body.splitlines():
            work, *row = (cell.strip() for cell in line.strip("| ").split(" | "))
            if work == "work":
                place = row.index(length) if length in row else None
            elif place is not None and len(row) > place:
                cells.setdefault(work, row[place])
    return cells
