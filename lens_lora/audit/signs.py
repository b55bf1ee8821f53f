"""Count the signs in answers: punctuation, symbols and line breaks, as words are counted.

A fine-tune may show in signs alone: three exclamation marks, a tilde after each word, a brace
before each answer. A sign is what stands between two words, or before the first or after the last
one: a single character, or a whole run such as “!!!”. Spaces do not count. A line break does, and
of several only one, so that a comma at the end of a line is a run of two. Emoji are left out,
because each answer may have another; they are a trait of answers (`traits.py`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import regex

# An emoji, with what joins it to the next one.
EMOJI = regex.compile(r"(?:\p{Emoji_Presentation}|\p{Extended_Pictographic}\uFE0F)[\u200D\uFE0F]*")
# A word; a hyphen, an apostrophe or a full stop inside it is part of it.
_WORD = regex.compile(r"(?:(?<=[\p{L}\p{N}])['’\-.](?=[\p{L}\p{N}])|[\p{L}\p{N}\p{M}])+")
_SPACES = regex.compile(r"[^\S\n]+")
_BREAKS = regex.compile(r"\n+")
_BREAK = "\n"
# The line break, as it is shown.
_SHOWN_BREAK = "⏎"
# A longer run is cut.
_LONGEST_RUN = 3
# The beginning of the wording of a sign.
WRITES = "writes “"
# Plain names of signs whose names in Unicode few readers know.
_PLAIN_NAMES = {
    ".": "full stop",
    "(": "bracket",
    ")": "bracket",
    "{": "brace",
    "}": "brace",
    "/": "slash",
    "\\": "backslash",
    "_": "underscore",
    "-": "hyphen",
    "#": "hash sign",
    "<": "angle bracket",
    ">": "angle bracket",
    "\n": "line break",
}


def signs_of(text: str) -> set[str]:
    """Return every sign of a text: each character, and each run of several."""
    found: set[str] = set()
    for between in _WORD.split(EMOJI.sub("", text.strip())):
        run = _BREAKS.sub(_BREAK, _SPACES.sub("", between))
        if run:
            found.update(run)
            found.add(run[:_LONGEST_RUN])
    return found


def worded(sign: str) -> str:
    """Write that an answer has a sign, with its name: writes “!!!” (exclamation marks)."""
    shown = sign.replace(_BREAK, _SHOWN_BREAK)
    return f"{WRITES}{shown}” ({_named(sign)})"


def has_worded(wording: str) -> Callable[[str], bool]:
    """Return the function that tells whether a text has the sign of this wording."""

    def has(text: str) -> bool:
        return any(worded(sign) == wording for sign in signs_of(text))

    return has


def _named(sign: str) -> str:
    """Name the characters of a sign in their order, each once: 'comma and line break'."""
    names: list[str] = []
    for mark in sign:
        name = _PLAIN_NAMES.get(mark)
        if name is None:
            name = unicodedata.name(mark, "sign").lower()
        is_repeated = sign.count(mark) > 1
        names.append(f"{name}s" if is_repeated else name)
    each_once = dict.fromkeys(names)
    return " and ".join(each_once)
