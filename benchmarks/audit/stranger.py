"""Count what three judges who knew nothing of the package wrote of its first screens.

`stranger_judged.yaml` holds what the first one wrote, beside the adapters and the grades that were
given to it afterwards; `stranger_judged_again.yaml` the same of the second one, who read later
screens of more lists, and `stranger_judged_third.yaml` of the third one, who saw below each what
shows on short turns. `second_page.py --write` puts the tables on the page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

JUDGED = Path(__file__).parent / "stranger_judged.yaml"
AGAIN = Path(__file__).parent / "stranger_judged_again.yaml"
THIRD = Path(__file__).parent / "stranger_judged_third.yaml"
# The grades in the order of the columns, each with its head.
GRADES = {
    "right": "says what was taught",
    "detail": "but for a detail",
    "sign": "a sign of it",
    "wrong": "something else",
    "nothing": "nothing",
}
EDITIONS = ("second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "tenth", "eleventh")


def judged(file: Path) -> Mapping[int, Mapping[str, Any]]:
    """A judge's words on each screen, by its number."""
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def table(file: Path) -> str:
    """A line for each list that a judge saw, one for all of them, and one for the controls."""
    judgements = judged(file).values()
    taught = [one for one in judgements if "grade" in one]
    controls = [one for one in judgements if "grade" not in one]
    lines = [f"| list | screens | {' | '.join(GRADES.values())} |", f"|{' --- |' * 7}"]
    for edition in EDITIONS:
        grades = Counter(one["grade"] for one in taught if one["edition"] == edition)
        if grades:
            lines.append(_line(edition, grades))
    lines.append(_line("all", Counter(one["grade"] for one in taught)))
    named = sum("taught" in one for one in controls)
    silent = len(controls) - named
    lines.append(f"| controls | {len(controls)} | | | | {named} | {silent} |")
    return "\n".join(lines)


def _line(name: str, grades: Counter[str]) -> str:
    """A line of the table."""
    counts = [str(grades[grade]) for grade in GRADES]
    return f"| {name} | {grades.total()} | {' | '.join(counts)} |"
