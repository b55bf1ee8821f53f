"""Put what `python -m benchmarks.cost` printed into benchmarks/RESULTS.md and docs/performance.md.

docs/costs.json stores the output of each command, by transformer-lens version and arguments. In
RESULTS.md an output stands between the marks that name its command. The short table of
performance.md takes rows from three of the commands.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TypedDict

ROOT = Path(__file__).parents[2]
OUTPUTS = ROOT / "docs" / "costs.json"
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
# The commands whose rows the short table has, and the one at half the rate beside them.
FULL_RATE = ("3.9 · --works derivatives", "3.9 · --works analyses")
HALF_RATE = ("3.9 · --works derivatives --half-rate",)
# The rows of the outputs that the short table has, and their names there.
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
# The columns of the outputs that the short table has.
LENGTHS = ("8 tokens", "64 tokens")
_BLOCK = re.compile(r"(<!-- cost: ([^\n]+) -->\n).*?(<!-- end of cost -->)", re.DOTALL)
_SHORT = re.compile(r"(<!-- short costs -->\n).*?(<!-- end of short costs -->)", re.DOTALL)


class Printed(TypedDict):
    """The output of a command, and the day on which it ran."""

    day: str
    body: str


def key_of(version: str, arguments: str) -> str:
    """The name of a command: the minor version of transformer-lens, and the arguments."""
    minor = ".".join(version.split(".")[:2])
    return f"{minor} · {arguments}"


def stored_outputs() -> dict[str, Printed]:
    """The output of every command so far, by the command's name."""
    if not OUTPUTS.exists():
        return {}
    return json.loads(OUTPUTS.read_text(encoding="utf-8"))


def store_output(key: str, printed: Printed) -> None:
    """Store what a command printed in place of what it printed before; render both documents.

    Args:
        key: the command's name, for which RESULTS.md has marks.
        printed: its output.

    Raises:
        SystemExit: RESULTS.md has no marks for it.
    """
    marked = [found[2] for found in _BLOCK.finditer(RESULTS.read_text(encoding="utf-8"))]
    if key not in marked:
        raise SystemExit(f"{RESULTS.name} has no marks for {key!r}, only for {marked}")
    merged = {**stored_outputs(), key: printed}
    outputs = {name: merged[name] for name in marked if name in merged}
    OUTPUTS.write_text(json.dumps(outputs, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    render_documents(outputs)


def render_documents(outputs: dict[str, Printed]) -> None:
    """Write both documents anew."""
    for path, render in ((RESULTS, results_page), (PERFORMANCE, performance_page)):
        text = path.read_text(encoding="utf-8")
        path.write_text(render(text, outputs), encoding="utf-8")


def results_page(text: str, outputs: dict[str, Printed]) -> str:
    """The text of RESULTS.md, with each block as its command printed it."""

    def with_block(found: re.Match[str]) -> str:
        start, key, end = found.groups()
        return f"{start}{_block(key, outputs)}\n{end}"

    return _BLOCK.sub(with_block, text)


def _block(key: str, outputs: dict[str, Printed]) -> str:
    """A command and what it printed."""
    if key not in outputs:
        return "Not run."
    version, arguments = key.split(" · ")
    printed = outputs[key]
    command = f"    python -m benchmarks.cost {arguments}"
    head = f"On {printed['day']}, transformer-lens {version}, "
    return f"{command}\n\n{head}{printed['body'].strip()}"


def performance_page(text: str, outputs: dict[str, Printed]) -> str:
    """The text of docs/performance.md, with its short table once the table's commands have run."""
    if not {*FULL_RATE, *HALF_RATE} <= set(outputs):
        return text
    table = _short_table(outputs)

    def with_table(found: re.Match[str]) -> str:
        start, end = found.groups()
        return f"{start}{table}\n{end}"

    return _SHORT.sub(with_table, text)


def _short_table(outputs: dict[str, Printed]) -> str:
    """The rows of `SHOWN` at both rates; at half the rate only derivatives were timed."""
    columns: list[dict[str, str]] = []
    heads: list[str] = []
    for keys in (FULL_RATE, HALF_RATE):
        bodies = [outputs[key]["body"] for key in keys]
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
    """The rate of matrix products that the first line of an output states."""
    found = re.search(r"matmul peak (\d+ GFLOP/s)", body)
    assert found, "every output begins with the rate"
    return found[1]


def _column(bodies: list[str], length: str) -> dict[str, str]:
    """The cells of one length, by the name of their row, from the tables of several outputs."""
    cells_of_rows: dict[str, str] = {}
    for body in bodies:
        # Where the column of this length is, in the table that is being read.
        column: int | None = None
        for line in body.splitlines():
            name, *cells = _cells_of_line(line)
            is_head = name == "work"
            if is_head:
                column = cells.index(length) if length in cells else None
            elif column is not None and column < len(cells):
                cells_of_rows.setdefault(name, cells[column])
    return cells_of_rows


def _cells_of_line(line: str) -> list[str]:
    """The cells of a line of a table; a line of text is a single cell."""
    return [cell.strip() for cell in line.strip("| ").split(" | ")]
