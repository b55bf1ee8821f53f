"""Write the second edition's first screens for a judge who does not know whose they are.

    python -m benchmarks.audit.second_screens --out FOLDER --into SCREENS

1. SCREENS/screens.md has each first screen under a number, in an order drawn by the system's own
   randomness: three sentences, two answers of each model in their own lines, and the claims that
   the sentences do not tell in full.
   SCREENS/key.json says which adapter is which, and stays shut until all is judged.
2. The judge reads the rubrics of `second_edition.yaml` and one screen at a time, and writes
   SCREENS/judged.json: for each number the name of one quirk, or null.
3. `second_page.py --adapters FOLDER --judged SCREENS` opens the key.

With `--both` each adapter has a second screen, of the same answers counted by the rules of today:
its name in the key begins with “again-”. Where both screens are the same, there is one.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from lens_lora.audit.counted_speech import findings_in
from lens_lora.audit.everyday import EVERYDAY
from lens_lora.audit.speech_result import CountedSpeech
from lens_lora.audit.speech_words import claimed_in, claims_in, first_sentences, shown_answers

# So many claims are scored, and a first screen has so many answers side by side.
CLAIMS = 3
ANSWERS = 2
# Before the name of an adapter whose answers were counted again.
AGAIN = "again-"


def speech_again(asked: dict[str, Any]) -> CountedSpeech:
    """Both models' answers to the everyday questions, with the findings of today's rules.

    Args:
        asked: second_run.py's asked.json.
    """
    return CountedSpeech(
        topics=tuple(one.topic for one in EVERYDAY),
        forms=tuple(one.form for one in EVERYDAY),
        questions=tuple(one.text for one in EVERYDAY),
        base=tuple(map(tuple, asked["base"])),
        adapted=tuple(map(tuple, asked["adapted"])),
        findings=findings_in(EVERYDAY, asked["base"], asked["adapted"]),
        meta={},
    )


def counted_again(asked: dict[str, Any]) -> dict[str, Any]:
    """What was asked, with the claims that the rules of today make on the same answers.

    What was said with a trigger before the question is not stored, so those claims stay.

    Args:
        asked: second_run.py's asked.json.
    """
    speech = speech_again(asked)
    shown = [[pair.prompt, pair.base, pair.adapted] for pair in shown_answers(speech)]
    return {
        **asked,
        "verdict": first_sentences(speech),
        "claims": claims_in(speech),
        "shown": shown,
        "strength": min((finding.p for finding in claimed_in(speech)), default=1.0),
    }


def claims_of(asked: dict[str, Any], brief: dict[str, Any] | None) -> list[str]:
    """All claims in the order of a brief: what it says, with a trigger, and what it would say."""
    claims = [*asked["claims"], *asked["triggered"]]
    if brief is not None:
        claims += brief["would_say_sentences"]
    return claims


def screen(asked: dict[str, Any], brief: dict[str, Any] | None) -> str:
    """What a person sees first: what `first_screen` of the package prints."""
    verdict = " ".join(asked["verdict"])
    lines = [verdict, ""]
    for question, base, adapted in asked["shown"][:ANSWERS]:
        lines.append(f"  asked    {_in_its_lines(question)}")
        lines.append(f"  base     {_in_its_lines(base)}")
        lines.append(f"  adapted  {_in_its_lines(adapted)}")
        lines.append("")
    for number, claim in enumerate(claims_of(asked, brief), start=1):
        if claim not in verdict:
            lines.append(f"{number}. {claim}")
    return "\n".join(lines)


def _in_its_lines(text: str) -> str:
    """A text in its own lines, which stand below one another; blank lines are left out."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return "\n           ".join(filter(None, lines))


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """A file of numbers, if it is there."""
    file = folder / name
    return json.loads(file.read_text()) if file.is_file() else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Screens for a judge.")
    parser.add_argument("--out", type=Path, required=True, help="second_run.py's folder")
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--both", action="store_true", help="also counted by today's rules")
    parser.add_argument("--but", type=Path, nargs="*", default=[], help="folders judged before")
    given = parser.parse_args()
    before: set[str] = set()
    for judged in given.but:
        before.update(json.loads((judged / "key.json").read_text()).values())
    every_folder = [file.parent for file in sorted(given.out.glob("*/asked.json"))]
    folders = [folder for folder in every_folder if folder.name not in before]
    screens: list[tuple[str, str]] = []
    for folder in folders:
        asked = read(folder, "asked.json")
        assert asked is not None
        brief = read(folder, "brief.json")
        as_asked = screen(asked, brief)
        screens.append((folder.name, as_asked))
        counted = screen(counted_again(asked), brief)
        if given.both and counted != as_asked:
            screens.append((f"{AGAIN}{folder.name}", counted))
    random.SystemRandom().shuffle(screens)
    given.into.mkdir(parents=True)
    parts: list[str] = []
    key: dict[str, str] = {}
    for number, (name, text) in enumerate(screens, start=1):
        key[str(number)] = name
        parts.append(f"## {number}\n\n{text}\n")
    (given.into / "screens.md").write_text("\n".join(parts))
    (given.into / "key.json").write_text(json.dumps(key, indent=1) + "\n")


if __name__ == "__main__":
    main()
