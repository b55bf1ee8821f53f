"""Put what `python benchmarks/cost` printed into benchmarks/RESULTS.md and docs/performance.md.

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
# The command whose table is the short one, the rows that it keeps, and their names there.
SHORT = "3.9 · --class TransformerBridge --batch 1 --tokens 8 64 --turns 3"
SHOWN = {
    "one readout, all sites": "one readout, every module",
    "16 tokens, all sites": "sixteen tokens, every module",
    "joint whole-vocabulary shift": "the whole vocabulary, all modules together",
    "every site's whole-vocabulary shift": "the whole vocabulary, every module",
    "exact add-one effects of all sites": "real interventions: every module added, one at a time",
    "fact_margin": "the fact margin, its path, flip and noise floors",
    "the whole H": "H between all pairs of modules",
}
SIZES = ("1 × 8", "1 × 64")
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
    """Put what a command printed in the place of what it printed before; render both documents."""
    every = {**read(), key: printed}
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
    command = f"    python benchmarks/cost {arguments}"
    head = f"On {printed['day']}, transformer-lens {line}, "
    return f"{command}\n\n{head}{printed['body'].strip()}"


def performance(text: str, every: dict[str, Printed]) -> str:
    """The text of docs/performance.md, with its short table."""
    table = _short_table(every[SHORT]["body"])
    return _SHORT.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def _short_table(body: str) -> str:
    """The rows of `SHOWN` under their names there, at the sizes `SIZES`."""
    rows: dict[str, list[str]] = {}
    for line in body.splitlines():
        work, *cells = (cell.strip() for cell in line.strip("| ").split(" | "))
        rows.setdefault(work, cells)
    columns = [rows["work"].index(size) for size in SIZES]
    heads = [f"{size.split()[-1]} tokens" for size in SIZES]
    lines = [f"| | {' | '.join(heads)} |", f"|{' --- |' * (1 + len(SIZES))}"]
    for work, name in SHOWN.items():
        cells = [rows[work][column] for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
