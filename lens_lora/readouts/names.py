"""Tokens and answers as labels write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lens_lora import arguments

__all__ = ["name_of"]

_NAMED, _LONGEST = 2, 20


def name_of(token: Any) -> str:
    """A token as labels write it: `' Lyon'`, `5`, or `[' Lyon', ' Rome', …]` of several prompts.

    Args:
        token: a string, an id, or one of these per prompt.
    """
    plain = arguments.one_entry(token)
    if arguments.is_whole(plain):
        return str(int(plain))
    if isinstance(plain, str):
        return repr(str(plain))
    items: Sequence[Any] = list(plain) if isinstance(plain, Sequence | Tensor) else ()
    names = [_short_name(item) for item in items]
    if not names or None in names:
        return "per prompt"
    shown = [*names[:_NAMED], *["…"][: len(names) - _NAMED]]
    return f"[{', '.join(map(str, shown))}]" if len(set(names)) > 1 else str(names[0])


def _short_name(item: Any) -> str | None:
    """One of several; None where it is a list of ids itself."""
    item = arguments.one_entry(item)
    if arguments.is_whole(item):
        return str(int(item))
    if not isinstance(item, str):
        return None
    return repr(item if len(item) <= _LONGEST else f"{item[:_LONGEST]}…")
