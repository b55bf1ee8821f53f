"""Checks of the numbers, words and token ids that callers pass.

Numbers may be Python's, numpy's, or tensors of one entry. Nothing is converted that could mean
something else: True is not a token, "0.5" not a gate, 7.5 not an id, NaN not a tolerance.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from lens_lora.errors import ArgumentError, LensLoraError, TokenError, setting
from lens_lora.guesses import meant_choice

_BOOLEAN = bool | np.bool_


def one_entry(value: object) -> object:
    """Convert a tensor or array without axes to a Python number; return anything else as it is."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        return value.item()
    return value


def number(name: str, value: object) -> float:
    """Check that a value is a finite real number.

    Args:
        name: the name of the argument, for the error.
        value: as a caller gives it.

    Raises:
        ArgumentError: anything else.
    """
    plain = one_entry(value)
    if isinstance(plain, _BOOLEAN) or not isinstance(plain, numbers.Real):
        raise ArgumentError(
            f"{setting(name, value)}: expected a number.{meant_choice(name, value, ())}"
        )
    with contextlib.suppress(OverflowError):  # a whole number beyond any float
        if math.isfinite(plain):
            return float(plain)
    raise ArgumentError(f"{setting(name, value)}: expected a finite number.")


def numbers_of(name: str, values: object) -> list[float]:
    """Check that values are finite real numbers, in a list, a tuple, an array or a tensor.

    Args:
        name: the name of the argument, for the error.
        values: as a caller gives them.

    Raises:
        ArgumentError: anything else.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ArgumentError(f"{setting(name, values)}: expected a list of numbers.")
    if isinstance(values, Tensor | np.ndarray) and values.ndim != 1:
        raise ArgumentError(f"{name} has the shape {tuple(values.shape)}; expected one axis.")
    return [number(name, value) for value in values]


def is_whole(value: object) -> TypeGuard[int]:
    """Whether this is a whole number, and not a truth value."""
    return isinstance(value, numbers.Integral) and not isinstance(value, _BOOLEAN)


def whole(name: str, value: object, least: int | None = None) -> int:
    """Check that a value is a whole number.

    Args:
        name: the name of the argument, for the error.
        value: as a caller gives it.
        least: the least that is allowed; None for no bound.

    Raises:
        ArgumentError: anything else.
    """
    plain = one_entry(value)
    if not is_whole(plain):
        raise ArgumentError(f"{setting(name, value)}: expected a whole number.")
    if least is not None and plain < least:
        raise ArgumentError(f"{setting(name, plain)}: expected at least {least}.")
    return int(plain)


def word(name: str, value: object, known: Iterable[str]) -> str:
    """Check that a value is one of some words.

    Args:
        name: the name of the argument, for the error.
        value: as a caller gives it.
        known: the words.

    Raises:
        ArgumentError: anything else.
    """
    choices = list(known)
    if isinstance(value, str) and value in choices:
        return value
    *others, last = [repr(choice) for choice in choices]
    expected = f"{', '.join(others)} or {last}" if others else last
    meant = meant_choice(name, value, choices)
    raise ArgumentError(f"{setting(name, value)}: expected {expected}.{meant}")


def integers(what: str, values: Any, error: type[LensLoraError]) -> Tensor:
    """Convert a tensor of integers to int64, which holds every id and supports every operation.

    Args:
        what: how the error message names the values.
        values: as a caller gives them.
        error: the class of the error.

    Raises:
        LensLoraError: an error of the given class, for anything but a tensor of integers.
    """
    if not isinstance(values, Tensor):
        raise error(f"{what} are a {type(values).__name__}; expected a tensor of integers.")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise error(f"{what} must be integers, not {values.dtype}.")
    return values.long()


def text(what: str, value: str, error: type[LensLoraError]) -> str:
    """Check that text can be encoded, and is not a conversation that was written as a string.

    Args:
        what: how the error message names the text.
        value: the text.
        error: the class of the error.

    Raises:
        LensLoraError: an error of the given class.
    """
    try:
        value.encode()
    except UnicodeEncodeError as cause:
        half = f"half of a surrogate pair ({value[cause.start : cause.end]!r})"
        raise error(
            f"{what} holds {half}, which is no character; it was cut or decoded wrongly."
        ) from cause
    if _parses_as_messages(value):
        raise error(
            f"{what} is a conversation written as a string ({value.strip()[:40]!r} …), whose "
            "braces and quotes would be read as text.",
            remedy="Pass the messages themselves (json.loads(…) or ast.literal_eval(…) of the "
            "string), or name them `messages` in a file; for an answer, pass only its text. If the "
            "string is meant as it is, pass its token ids.",
            in_shell="Give what the user says as --chat, or a file with `messages`; for an answer, "
            "give only its text.",
        )
    return value


_ROLE = re.compile(r"""["']role["']\s*:""")


def _parses_as_messages(value: str) -> bool:
    """Whether a string is the str or the JSON of messages; it is parsed only if it begins so."""
    string = value.strip()
    if not string.startswith(("[", "{", "(")) or not _ROLE.search(string):
        return False
    listed = re.sub(r"\}\s+\{", "}, {", string)  # numpy's str of an array has no commas
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return _are_messages(parse(listed))
    return False


def _are_messages(value: object) -> bool:
    """Whether this is a message, messages, conversations, or a record that holds `messages`."""
    if isinstance(value, Mapping):
        return {"role", "content"} <= value.keys() or _are_messages(value.get("messages"))
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(_are_messages(item) for item in value)


def one_per_prompt(noun: str, items: Any, batch: int, expected: str) -> list[Any]:
    """Check a list of one item per prompt, or repeat a single item for every prompt.

    Args:
        noun: 'token' or 'answer', for the error.
        items: as a caller gives them.
        batch: how many prompts there are.
        expected: what each item should be, for the error.

    Raises:
        TokenError: items of another kind, or another number of items.
    """
    if isinstance(items, str) or is_whole(items):
        return [items] * batch
    if isinstance(items, bytes) or not isinstance(items, Sequence):
        items_expected = f"{expected}, an id, or a list with one of them per prompt"
        raise TokenError(f"the {noun} is {items!r}; expected {items_expected}.")
    if len(items) != batch:
        raise TokenError(f"{len(items)} {noun}s for {batch} prompts; pass one, or one per prompt.")
    return list(items)
