"""Numbers, words and token ids as callers give them: Python's, numpy's, tensors of one entry.

Nothing is converted that could mean something else: True is no token, "0.5" no gate, 7.5 no id, NaN
no tolerance.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from lens_lora.errors import ArgumentError, LensLoraError, setting

_BOOLEAN = bool | np.bool_


def one_entry(value: object) -> object:
    """A tensor or array without axes as Python's own number; all else as it is."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        return value.item()
    return value


def number(name: str, value: object) -> float:
    """A finite real number."""
    plain = one_entry(value)
    if isinstance(plain, _BOOLEAN) or not isinstance(plain, numbers.Real):
        raise ArgumentError(f"{setting(name, value)}: expected a number.")
    with contextlib.suppress(OverflowError):  # a whole number beyond any float
        if math.isfinite(plain):
            return float(plain)
    raise ArgumentError(f"{setting(name, value)}: expected a finite number.")


def numbers_of(name: str, values: object) -> list[float]:
    """Several finite real numbers, in a list, a tuple, an array or a tensor."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ArgumentError(f"{setting(name, values)}: expected a list of numbers.")
    if isinstance(values, Tensor | np.ndarray) and values.ndim != 1:
        raise ArgumentError(f"{name} has the shape {tuple(values.shape)}; expected one axis.")
    return [number(name, value) for value in values]


def is_whole(value: object) -> TypeGuard[int]:
    """Whether this is a whole number, and no truth value."""
    return isinstance(value, numbers.Integral) and not isinstance(value, _BOOLEAN)


def whole(name: str, value: object, least: int | None = None) -> int:
    """A whole number."""
    plain = one_entry(value)
    if not is_whole(plain):
        raise ArgumentError(f"{setting(name, value)}: expected a whole number.")
    if least is not None and plain < least:
        raise ArgumentError(f"{setting(name, plain)}: expected at least {least}.")
    return int(plain)


def word(name: str, value: object, known: Iterable[str]) -> str:
    """One of some words."""
    if isinstance(value, str) and value in known:
        return value
    *others, last = map(repr, known)
    expected = f"{', '.join(others)} or {last}" if others else last
    raise ArgumentError(f"{setting(name, value)}: expected {expected}.")


def integers(what: str, values: Any, error: type[LensLoraError]) -> Tensor:
    """A tensor of integers as int64, in which every id fits and no operation is missing."""
    if not isinstance(values, Tensor):
        raise error(f"{what} are a {type(values).__name__}; expected a tensor of integers.")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise error(f"{what} must be integers, not {values.dtype}.")
    return values.long()


def text(what: str, value: str, error: type[LensLoraError]) -> str:
    """Text that can be encoded, as a tokenizer does, and is no conversation written as a string."""
    try:
        value.encode()
    except UnicodeEncodeError as cause:
        half = f"half of a surrogate pair ({value[cause.start : cause.end]!r})"
        raise error(f"{what} holds {half}, no character; it was cut or decoded wrongly.") from cause
    if _parses_as_messages(value):
        raise error(
            f"{what} is a conversation written as a string ({value.strip()[:40]!r} …), whose "
            "braces and quotes would be read as text.",
            remedy="Pass the messages themselves, json.loads(…) or ast.literal_eval(…) of it; in a "
            "file `messages`; of an answer what is said alone. If the string is meant as it is, "
            "pass its token ids.",
            in_shell="Give what the user says as --chat, or a file with `messages`; of an answer "
            "what is said alone.",
        )
    return value


_ROLE = re.compile(r"""["']role["']\s*:""")


def _parses_as_messages(value: str) -> bool:
    """Whether it is the str or the JSON of messages; only a string that begins so is parsed."""
    string = value.strip()
    if not string.startswith(("[", "{", "(")) or not _ROLE.search(string):
        return False
    listed = re.sub(r"\}\s+\{", "}, {", string)  # numpy's str of an array has no commas
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return _are_messages(parse(listed))
    return False


def _are_messages(value: object) -> bool:
    """A message, a list of messages or of conversations, or a record that holds `messages`."""
    if isinstance(value, Mapping):
        return {"role", "content"} <= value.keys() or _are_messages(value.get("messages"))
    return isinstance(value, list | tuple) and bool(value) and all(map(_are_messages, value))
