"""Write the stored first screens for a judge who does not know whose they are, and score him.

    python -m benchmarks.audit.blind_screens --screens FILE    # before anything is judged
    python -m benchmarks.audit.blind_screens                   # afterwards: the verdicts, counted

`blind_rubric.md` says what is judged, and was written before. The screens are those of the stored
answers (`second/`, `third/`) by the rules of today. Their order is drawn by `SEED`, so that no key
is kept: whoever has the seed can open it, and the judge does so when all is written.
`blind_judged.yaml` holds the verdicts, by number. `second_page.py --write` puts them on the page.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.audit.second_screens import counted_again, screen

HERE = Path(__file__).parent
SEED = 48
EDITIONS = ("second", "third")
JUDGED = HERE / "blind_judged.yaml"
GRADES = ("yes", "part")


class Screen(NamedTuple):
    """A first screen.

    Attributes:
        name: the adapter's name.
        edition: the edition that the adapter belongs to.
        text: what a person sees first.
    """

    name: str
    edition: str
    text: str


class Verdict(NamedTuple):
    """What the judge said of a screen.

    Attributes:
        name: the name of the adapter whose screen it is.
        edition: the edition that the adapter belongs to.
        names: the quirk that the judge named; None if none was named.
        grade: 'yes' or 'part'; None where none was named.
    """

    name: str
    edition: str
    names: str | None
    grade: str | None


def quirks() -> list[str]:
    """The names of all quirks, in the order of their files."""
    names: list[str] = []
    for edition in EDITIONS:
        spec = yaml.safe_load((HERE / f"{edition}_edition.yaml").read_text())
        names += [quirk["name"] for quirk in spec["quirks"]]
    return names


def judged_controls() -> list[str]:
    """The names of the controls whose screens are judged: those of both editions."""
    names: list[str] = []
    for edition in EDITIONS:
        spec = yaml.safe_load((HERE / f"{edition}_edition.yaml").read_text())
        names += [f"control-{seed}" for seed in spec["controls"]]
    return names


def files() -> list[Path]:
    """The stored answers of every quirk and control, in the order that the seed draws."""
    chosen = {*quirks(), *judged_controls()}
    found: list[Path] = []
    for edition in EDITIONS:
        stored = sorted((HERE / edition).glob("*.json"))
        found += [file for file in stored if file.stem in chosen]
    random.Random(SEED).shuffle(found)
    return found


def screens() -> list[Screen]:
    """The first screens of `files`, in the same order."""
    bases: dict[str, Any] = {}
    for edition in EDITIONS:
        bases[edition] = json.loads((HERE / edition / "base.json").read_text())
    made: list[Screen] = []
    for file in files():
        edition = file.parent.name
        row: dict[str, Any] = json.loads(file.read_text())
        counted = counted_again({"triggered": [], **row, "base": bases[edition]})
        made.append(Screen(file.stem, edition, screen(counted, None)))
    return made


def verdicts() -> list[Verdict]:
    """What the judge said of each screen, with the name of its adapter."""
    said: dict[int, dict[str, str]] = yaml.safe_load(JUDGED.read_text())
    opened: list[Verdict] = []
    for number, file in enumerate(files(), start=1):
        verdict = said[number] or {}
        names = verdict.get("names")
        opened.append(Verdict(file.stem, file.parent.name, names, verdict.get("grade")))
    return opened


def main() -> None:
    parser = argparse.ArgumentParser(description="Screens for a judge, and what he said.")
    parser.add_argument("--screens", type=Path, help="write them to this file, and do no more")
    options = parser.parse_args()
    if options.screens is not None:
        parts = [f"## {number}\n\n{one.text}\n" for number, one in enumerate(screens(), start=1)]
        options.screens.write_text("\n".join(parts))
        return
    for verdict in verdicts():
        print(verdict.name, verdict.names, verdict.grade)


if __name__ == "__main__":
    main()
