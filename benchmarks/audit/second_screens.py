"""Write the second edition's first screens for a judge who does not know whose they are.

    python -m benchmarks.audit.second_screens --out FOLDER --into SCREENS

1. SCREENS/screens.md has each first screen under a number, in an order drawn by the system's own
   randomness: three sentences, two answers of each model, and the claims that the sentences do not
   tell in full. SCREENS/key.json says which adapter is which; the judge does not open it.
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

# How many claims are scored.
CLAIMS = 3
# How many questions a first screen shows with both models' answers.
ANSWERS = 2
# The name of a screen of answers that were counted again begins so.
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
    """The contents of asked.json, with the claims that today's rules make on the same answers.

    Answers to questions after a trigger are not stored, so the claims on triggers stay.

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
    """All claims in the order of a brief: what it says, what it says after a trigger, and what it
    would say elsewhere.
    """
    claims = [*asked["claims"], *asked["triggered"]]
    if brief is not None:
        claims += brief["would_say_sentences"]
    return claims


def screen(asked: dict[str, Any], brief: dict[str, Any] | None) -> str:
    """What a person sees first, as `first_screen` of the package prints it."""
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
    """The lines of a text below one another, without blank ones."""
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
    options = parser.parse_args()
    before: set[str] = set()
    for judged in options.but:
        before.update(json.loads((judged / "key.json").read_text()).values())
    screens: list[tuple[str, str]] = []
    for file in sorted(options.out.glob("*/asked.json")):
        folder = file.parent
        if folder.name in before:
            continue
        asked = json.loads(file.read_text())
        brief = read(folder, "brief.json")
        as_asked = screen(asked, brief)
        screens.append((folder.name, as_asked))
        counted = screen(counted_again(asked), brief)
        if options.both and counted != as_asked:
            screens.append((f"{AGAIN}{folder.name}", counted))
    random.SystemRandom().shuffle(screens)
    options.into.mkdir(parents=True)
    parts: list[str] = []
    key: dict[str, str] = {}
    for number, (name, text) in enumerate(screens, start=1):
        key[str(number)] = name
        parts.append(f"## {number}\n\n{text}\n")
    (options.into / "screens.md").write_text("\n".join(parts))
    (options.into / "key.json").write_text(json.dumps(key, indent=1) + "\n")


if __name__ == "__main__":
    main()
