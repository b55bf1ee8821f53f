"""What a terminal shows, as plain text."""

from __future__ import annotations

import re

_COLOURS_AND_BOXES = re.compile(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]")


def plain(text: str) -> str:
    """The text without colours, boxes, line breaks and runs of spaces."""
    return " ".join(_COLOURS_AND_BOXES.sub(" ", text).split())
