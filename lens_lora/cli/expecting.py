"""Read the files of `lens-lora verify`: margins to be reached, and texts to ask a server for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lens_lora.cli.files import texts_of
from lens_lora.errors import LensLoraError
from lens_lora.sweeps.records import Record, read_records

_KEYS = frozenset({"id", "prompt", "messages", "doc", "pre", "flips", "margin_at_least"})


class ExpectedMargin(NamedTuple):
    """One line of the file, with the fields of `ship.expectations.Expectation`.

    It is turned into that class once torch is imported.
    """

    where: str
    prompt: str | Sequence[Mapping[str, str]]
    doc: str
    pre: str
    flips: bool | None
    at_least: float | None


def read_expectations(file: Path) -> list[ExpectedMargin]:
    """Read a .jsonl file of expectations.

    Args:
        file: a file with one object per line, which has `prompt` or `messages`, `doc` and `pre`,
            and may have `flips` or `margin_at_least`.

    Raises:
        LensLoraError: a line is not an expectation; the message gives its number.
    """
    if file.suffix.lower() != ".jsonl":
        raise LensLoraError(f"{file}: expected a file that ends in .jsonl.")
    lines = [line for line in file.read_bytes().split(b"\n") if line.strip()]
    expectations: list[ExpectedMargin] = []
    for record, line in zip(read_records(file), lines, strict=True):
        if record.error is not None:
            raise LensLoraError(f"{file}, {record.error}")
        fields = json.loads(line)
        fault = _fault(fields)
        if fault is not None:
            raise LensLoraError(f"{file}, {record.bad(fault).error}")
        expectations.append(_expectation(record, fields))
    return expectations


def prompts_of(file: Path) -> list[str | Sequence[Mapping[str, str]]]:
    """Read the texts of a file: one per line, or the `prompt` or `messages` of .jsonl records.

    Args:
        file: the file, which is read as records if its name ends in .jsonl.

    Raises:
        LensLoraError: there is no text, or a line is not a record; the message gives its number.
    """
    if file.suffix.lower() != ".jsonl":
        return list(texts_of(file))
    prompts: list[str | Sequence[Mapping[str, str]]] = []
    for record in read_records(file, with_answers=False):
        if record.error is not None:
            raise LensLoraError(f"{file}, {record.error}")
        prompt = record.prompt if record.messages is None else record.messages
        assert prompt is not None  # a record without an error has one
        prompts.append(prompt)
    return prompts


def _expectation(record: Record, fields: Mapping[str, Any]) -> ExpectedMargin:
    prompt = record.prompt if record.messages is None else record.messages
    # A record without an error has a prompt and both answers.
    assert prompt is not None
    assert record.doc is not None
    assert record.pre is not None
    return ExpectedMargin(
        where=record.where,
        prompt=prompt,
        doc=record.doc,
        pre=record.pre,
        flips=fields.get("flips"),
        at_least=fields.get("margin_at_least"),
    )


def _fault(fields: Mapping[str, Any]) -> str | None:
    """Say what is wrong with the keys other than prompt and answers; None if nothing is."""
    unknown = sorted(fields.keys() - _KEYS)
    if unknown:
        return f"{unknown[0]!r} is no key of an expectation; they are {', '.join(sorted(_KEYS))}."
    flips = fields.get("flips")
    if not isinstance(flips, bool | None):
        return f"flips is {flips!r}; expected true or false."
    least = fields.get("margin_at_least")
    if least is not None and not _is_finite_number(least):
        return f"margin_at_least is {least!r}; expected a number."
    return None


def _is_finite_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)
