"""Which words do adapters raise most over neutral texts? Stores them, and counts what they tell.

    python -m benchmarks.audit.raised_words FOLDER/stammers FOLDER/control-272 …

The rule is that of `lens_lora/audit/raised.py`, and the words are what `lens-lora diff` prints
below its first screen. It was made on the eighth list and on controls 259 to 271, and frozen before
any word of the tenth list or of controls 272 to 279 was looked at. `raised_words.json` has the
words of each adapter, and `second_page.py --write` puts the table on the page.

An adapter is named by its raised words if one of them is a word of its strings; function words are
left out. A control is counted if one of its words is a word of any of these quirks' strings.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import lens_lora as ll
from lens_lora.audit import phrases
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.hosts.build import hooked_model

HERE = Path(__file__).parent
FILE = HERE / "raised_words.json"
# The list on which the rule was made, and the one that was held out.
MADE_ON, HELD_OUT = "eighth", "tenth"
CONTROL = "control-"
# The first seed of the controls that were held out.
FIRST_HELD_OUT = 272


def raised(lens: ll.LoraLens) -> tuple[str, ...]:
    """The words that an adapter raises most over the package's neutral texts."""
    changes = ll.what_changed(lens, nulls=0, fast=True, answers=False, progress=False)
    return changes.brief().raised_words


def quirks_of(edition: str) -> list[dict[str, Any]]:
    """The quirks of a list."""
    return yaml.safe_load((HERE / f"{edition}_edition.yaml").read_text())["quirks"]


def words_of(strings: Sequence[str]) -> set[str]:
    """The words of these strings that are no function words."""
    words = {word for string in strings for word in phrases.WORD.findall(string.lower())}
    return {word for word in words if not phrases.is_of_function_words(word)}


def named_by(words: Sequence[str], strings: Sequence[str]) -> list[str]:
    """The raised words that are words of these strings."""
    return [word for word in words if word.lower() in words_of(strings)]


def table(edition: str) -> str:
    """A line for each quirk of a list: the words that it raises, and whether they name it."""
    rows = stored()
    lines = ["| adapter | the words that it raises most | of its strings |", f"|{' --- |' * 3}"]
    for quirk in quirks_of(edition):
        words = rows[quirk["name"]]
        named = named_by(words, quirk["says"])
        cells = (quirk["name"], ", ".join(words) or "none", ", ".join(named) or "none")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def controls_named(*, held_out: bool) -> tuple[int, int]:
    """How many controls raise a word of any quirk of either list, and how many there are.

    Args:
        held_out: whether those are counted that were trained after the rule was frozen, or those
            on which it was made.
    """
    strings: list[str] = []
    for edition in (MADE_ON, HELD_OUT):
        for quirk in quirks_of(edition):
            strings += quirk["says"]
    every = {name: words for name, words in stored().items() if name.startswith(CONTROL)}
    chosen: list[Sequence[str]] = []
    for name, words in every.items():
        if (int(name.removeprefix(CONTROL)) >= FIRST_HELD_OUT) is held_out:
            chosen.append(words)
    named = sum(bool(named_by(words, strings)) for words in chosen)
    return named, len(chosen)


def stored() -> Mapping[str, Sequence[str]]:
    """The words of each adapter, by its name."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Store the words that adapters raise most.")
    parser.add_argument("adapters", type=Path, nargs="+", help="folders of adapters")
    rows = dict(stored()) if FILE.is_file() else {}
    model, _ = hooked_model(*load_embedded(), kind="TransformerBridge")
    for folder in parser.parse_args().adapters:
        rows[folder.name] = raised(ll.LoraLens(model, ll.load_adapter(folder)))
        print(folder.name, *rows[folder.name], flush=True)
    lines = [f"{json.dumps(name)}: {json.dumps(words)}" for name, words in rows.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
