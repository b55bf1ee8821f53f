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
from lens_lora.ship.combined import CombinedSite, CombinedVerification
from lens_lora.ship.served import ServedInstead, ServedVerification
from lens_lora.ship.verify import Verification

SCHEMA = "lens_lora verification 1"

_JUNIT_TAGS: dict[Outcome, str] = {
    "failed": "failure",
    "undecided": "error",
    "not asked": "skipped",
}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_REPLACEMENT = "\ufffd"


def as_json(
    verification: Verification,
    served: ServedVerification | None = None,
    combined: CombinedVerification | None = None,
) -> str:
    """The checks and tensors as JSON of `SCHEMA`; a missing number is null.

    Args:
        verification: what is written.
        served: what a server answered; None if none was asked.
        combined: how it compares with the sum of its parts; None if it has none.
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
    if served is not None:
        fields["served"] = {
            name: _number_or_null(getattr(served, name))
            for name in ("name", "url", "way", "c", "residual", "floor", "effect", "tokens")
        }
        fields["served"]["requests"] = served.requests_sent
        fields["served"]["explanations"] = [_fields_of(e) for e in served.explanations]
    if combined is not None:
        fields["combined"] = {
            name: _number_or_null(getattr(combined, name))
            for name in ("parts", "weights", "c", "residual", "effect", "tokens")
        }
        fields["combined"]["sites"] = [_fields_of(site) for site in combined.sites]
    return json.dumps(fields, ensure_ascii=False, indent=1) + "\n"


def _fields_of(part: Check | MergedTensor | ServedInstead | CombinedSite) -> dict[str, Any]:
    """The fields of a dataclass, with None for numbers that JSON does not have."""
    fields = dataclasses.asdict(part)
    return {name: _number_or_null(value) for name, value in fields.items()}


def _number_or_null(value: object) -> object:
    """The value itself, or None for a number that is not finite."""
    is_number = isinstance(value, float)
    return None if is_number and not math.isfinite(value) else value


def as_junit(verification: Verification) -> ElementTree.ElementTree:
    """One JUnit test case per check: an error if undecided, skipped if it was not asked for.

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
