"""What `benchmarks/cost.py` printed, as it stands in benchmarks/RESULTS.md and docs/performance.md.

docs/costs.json holds the output of each command and transformer-lens line. It is put between the
marks of RESULTS.md that name them; the short table of performance.md is taken from one of them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TypedDict

ROOT = Path(__file__).parents[1]
HELD, PAGE, PERFORMANCE = (
    ROOT / "docs" / "costs.json",
    Path(__file__).parent / "RESULTS.md",
    ROOT / "docs" / "performance.md",
)
SHORT = "3.9 · --class TransformerBridge --batch 1"
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
    """What a command printed, and when."""

    day: str
    body: str


def key_of(line: str, arguments: str) -> str:
    """Of a transformer-lens version and the command's arguments."""
    return f"{'.'.join(line.split('.')[:2])} · {arguments}"


def read() -> dict[str, Printed]:
    """Every command's output so far."""
    return json.loads(HELD.read_text(encoding="utf-8")) if HELD.exists() else {}


def add(key: str, printed: Printed) -> None:
    """Put what a command printed in the place of what it printed before; render both documents."""
    held = {**read(), key: printed}
    HELD.write_text(json.dumps(held, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    for path, made in ((PAGE, page), (PERFORMANCE, performance)):
        path.write_text(made(path.read_text(encoding="utf-8"), held), encoding="utf-8")


def page(text: str, held: dict[str, Printed]) -> str:
    """RESULTS.md, with each block as its command printed it."""
    return _BLOCK.sub(lambda found: f"{found[1]}{_block(found[2], held)}\n{found[3]}", text)


def _block(key: str, held: dict[str, Printed]) -> str:
    if key not in held:
        return "Not run."
    line, arguments = key.split(" · ")
    one = held[key]
    head = (
        f"    python benchmarks/cost.py {arguments}\n\nOn {one['day']}, transformer-lens {line}, "
    )
    return f"{head}{one['body'].strip()}"


def performance(text: str, held: dict[str, Printed]) -> str:
    """docs/performance.md, with its short table."""
    return _SHORT.sub(lambda found: f"{found[1]}{_short(held[SHORT]['body'])}\n{found[2]}", text)


def _short(body: str) -> str:
    rows = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in body.splitlines()]
    head = next(row for row in rows if row[0] == "work")
    cells = {row[0]: [row[head.index(size)] for size in SIZES] for row in rows if row[0] in SHOWN}
    lines = [["", *(f"{size.split()[-1]} tokens" for size in SIZES)], ["---"] * 3]
    lines += [[name, *cells[work]] for work, name in SHOWN.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("|  |", "| |")
