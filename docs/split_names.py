"""Docstrings that name several things at once, 'doc, pre: …', as one entry for each."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_SEVERAL = re.compile(r"^ {4}(\w+(?:, \w+)+):(.*(?:\n {5,}.*)*)", re.MULTILINE)


class SplitNames(Extension):
    """Parsers of docstrings take 'base, adapted: …' for one thing of a strange name."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite a docstring before it is parsed."""
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = split_names(obj.docstring.value)


def split_names(docstring: str) -> str:
    """Each name of an entry as an entry with the same text."""
    return _SEVERAL.sub(_entries, docstring)


def _entries(several: re.Match[str]) -> str:
    return "\n".join(f"    {name}:{several[2]}" for name in several[1].split(", "))
