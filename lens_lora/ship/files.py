"""A verification as JSON and as JUnit's XML, for programs that act on it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from typing import Any
from xml.etree import ElementTree

from lens_lora.ship.checks import Check, MergedTensor, Outcome
from lens_lora.ship.verify import Verification

SCHEMA = "lens_lora verification 1"

_JUNIT_TAGS: dict[Outcome, str] = {
    "failed": "failure",
    "undecided": "error",
    "not asked": "skipped",
}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_REPLACEMENT = "\ufffd"


def as_json(verification: Verification) -> str:
    """The checks and tensors as JSON of `SCHEMA`; a missing number is null.

    Args:
        verification: what is written.
    """
    fields: dict[str, Any] = {
        "schema": SCHEMA,
        "outcome": verification.outcome,
        "exit_code": verification.exit_code,
        "adapter": verification.name,
        "meta": dict(verification.meta),
        "checks": [_fields_of(check) for check in verification.checks],
        "tensors": [_fields_of(tensor) for tensor in verification.tensors],
    }
    return json.dumps(fields, ensure_ascii=False, indent=1) + "\n"


def _fields_of(part: Check | MergedTensor) -> dict[str, Any]:
    """The fields of a check or tensor, with None for NaN, which JSON does not have."""
    fields = dataclasses.asdict(part)
    return {name: None if _is_nan(value) else value for name, value in fields.items()}


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def as_junit(verification: Verification) -> ElementTree.ElementTree:
    """One test case per check, as JUnit writes it: failed, in error if undecided, or skipped.

    Args:
        verification: what is written.
    """
    outcomes = Counter(check.outcome for check in verification.checks)
    attributes = {
        "tests": str(outcomes.total()),
        "failures": str(outcomes["failed"]),
        "errors": str(outcomes["undecided"]),
        "skipped": str(outcomes["not asked"]),
        "name": "lens-lora verify",
    }
    suite = ElementTree.Element("testsuite", attributes)
    for check in verification.checks:
        names = {"classname": verification.name, "name": check.name}
        case = ElementTree.SubElement(suite, "testcase", names)
        tag = _JUNIT_TAGS.get(check.outcome)
        if tag is not None:
            message = _NOT_XML.sub(_REPLACEMENT, check.facts)
            ElementTree.SubElement(case, tag, message=message)
    return ElementTree.ElementTree(suite)
