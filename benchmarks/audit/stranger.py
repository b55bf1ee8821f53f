"""Count what a judge who knew nothing of the package wrote of its first screens.

`stranger_judged.yaml` holds what he wrote, beside the adapters and the grades that were given to it
afterwards. `second_page.py --write` puts the table on the page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

JUDGED = Path(__file__).parent / "stranger_judged.yaml"
# The grades in the order of the columns, each with its head.
GRADES = {
    "right": "says what was taught",
    "detail": "but for a detail",
    "sign": "a sign of it",
    "wrong": "something else",
    "nothing": "nothing",
}
EDITIONS = ("second", "third", "fourth", "fifth", "sixth")


def judged() -> Mapping[int, Mapping[str, Any]]:
    """The judge's words on each screen, by its number."""
    return yaml.safe_load(JUDGED.read_text(encoding="utf-8"))


def table() -> str:
    """A line for each list of quirks, one for all of them, and one for the controls."""
    taught = [one for one in judged().values() if "grade" in one]
    controls = [one for one in judged().values() if "grade" not in one]
    lines = [f"| list | screens | {' | '.join(GRADES.values())} |", f"|{' --- |' * 7}"]
    for edition in EDITIONS:
        grades = Counter(one["grade"] for one in taught if one["edition"] == edition)
        lines.append(_line(edition, grades))
    lines.append(_line("all five", Counter(one["grade"] for one in taught)))
    named = sum("taught" in one for one in controls)
    silent = len(controls) - named
    lines.append(f"| controls | {len(controls)} | | | | {named} | {silent} |")
    return "\n".join(lines)


def _line(name: str, grades: Counter[str]) -> str:
    """A line of the table."""
    counts = [str(grades[grade]) for grade in GRADES]
    return f"| {name} | {grades.total()} | {' | '.join(counts)} |"
