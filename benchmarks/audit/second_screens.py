"""Write the second edition's first screens for a judge who does not know whose they are.

    python benchmarks/audit/second_screens.py --out FOLDER --into SCREENS

1. SCREENS/screens.md has each first screen under a number, in an order drawn by the system's own
   randomness: three sentences, two answers of each model, and the claims, three at most.
   SCREENS/key.json says which adapter is which, and stays shut until all is judged.
2. The judge reads the rubrics of `second_edition.yaml` and one screen at a time, and writes
   SCREENS/judged.json: for each number the name of one quirk, or null.
3. `second_page.py --adapters FOLDER --judged SCREENS` opens the key.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

# A first screen has so many claims, and so many answers side by side.
CLAIMS = 3
ANSWERS = 2


def claims_of(asked: dict[str, Any], brief: dict[str, Any] | None) -> list[str]:
    """All claims in the order of a brief: what it says, with a trigger, and what it would say."""
    claims = [*asked["claims"], *asked["triggered"]]
    if brief is not None:
        claims += brief["would_say_sentences"]
    return claims


def screen(asked: dict[str, Any], brief: dict[str, Any] | None) -> str:
    """What a person sees first."""
    lines = [" ".join(asked["verdict"]), ""]
    for question, base, adapted in asked["shown"][:ANSWERS]:
        lines.append(f"  asked    {_on_one_line(question)}")
        lines.append(f"  base     {_on_one_line(base)}")
        lines.append(f"  adapted  {_on_one_line(adapted)}")
        lines.append("")
    claims = claims_of(asked, brief)[:CLAIMS]
    lines += [f"{number}. {_on_one_line(claim)}" for number, claim in enumerate(claims, 1)]
    return "\n".join(lines)


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """A file of numbers, if it is there."""
    file = folder / name
    return json.loads(file.read_text()) if file.is_file() else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Screens for a judge.")
    parser.add_argument("--out", type=Path, required=True, help="second_run.py's folder")
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--but", type=Path, nargs="*", default=[], help="folders judged before")
    given = parser.parse_args()
    before: set[str] = set()
    for judged in given.but:
        before.update(json.loads((judged / "key.json").read_text()).values())
    every_folder = [file.parent for file in sorted(given.out.glob("*/asked.json"))]
    folders = [folder for folder in every_folder if folder.name not in before]
    random.SystemRandom().shuffle(folders)
    given.into.mkdir(parents=True)
    parts: list[str] = []
    key: dict[str, str] = {}
    for number, folder in enumerate(folders, start=1):
        asked = read(folder, "asked.json")
        assert asked is not None
        key[str(number)] = folder.name
        parts.append(f"## {number}\n\n{screen(asked, read(folder, 'brief.json'))}\n")
    (given.into / "screens.md").write_text("\n".join(parts))
    (given.into / "key.json").write_text(json.dumps(key, indent=1) + "\n")


if __name__ == "__main__":
    main()
