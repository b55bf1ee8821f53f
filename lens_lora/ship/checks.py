"""The outcome of one check of an adapter, and of one tensor of a merged folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from lens_lora.core import storage

Outcome = Literal["passed", "failed", "undecided", "not asked"]


@storage.stored
@dataclasses.dataclass(frozen=True)
class Check:
    """One check: what was measured, what was expected, and where the two disagree.

    Attributes:
        name: what was checked.
        outcome: what the check came to.
        measured: what was found.
        bound: what was expected.
        where: the module or prompt at fault.
        value: the number behind `measured`: nats per token, a margin, the part of ΔW that a merge
            keeps. NaN if there is no number.
    """

    name: str
    outcome: Outcome
    measured: str
    bound: str = ""
    where: str = ""
    value: float = math.nan

    @property
    def facts(self) -> str:
        """One line: what was measured, what was expected, and where."""
        facts = [self.measured.rstrip(".")]
        if self.bound:
            facts.append(f"expected: {self.bound}")
        facts.append(self.where)
        return "; ".join(filter(None, facts))


@storage.stored
@dataclasses.dataclass(frozen=True)
class MergedTensor:
    """How one tensor of a merged folder compares with base + ΔW.

    Attributes:
        name: the parameter's name in the base model.
        outcome: 'passed', 'failed' or 'undecided'.
        looks: what the tensor is, in words.
        ratio: c, the part of ΔW that was added to the base; NaN if the adapter adds nothing here.
        kept: c of a correct merge in the tensor's dtype, which rounds; NaN as for `ratio`.
    """

    name: str
    outcome: Outcome
    looks: str
    ratio: float = math.nan
    kept: float = math.nan

    @property
    def is_changed(self) -> bool:
        """Whether the adapter adds something to this tensor."""
        return not math.isnan(self.ratio)


def worst(parts: Sequence[Check | MergedTensor]) -> Outcome:
    """'failed' if any part failed, else 'undecided' if any is, else 'passed'."""
    outcomes = {part.outcome for part in parts}
    if "failed" in outcomes:
        return "failed"
    if "undecided" in outcomes:
        return "undecided"
    return "passed"


def kinds_of(findings: Sequence[str], most: int) -> list[tuple[str, int]]:
    """The most frequent findings, each with how often it was made.

    Findings of one kind may differ in the number behind their colon: the first stands for all.

    Args:
        findings: the findings, in words.
        most: how many kinds are kept.
    """
    of_kind: dict[str, list[str]] = {}
    for finding in findings:
        of_kind.setdefault(finding.partition(": ")[0], []).append(finding)
    kinds: list[tuple[str, int]] = []
    for alike in of_kind.values():
        remark = " in the first" if len(set(alike)) > 1 else ""
        kinds.append((alike[0] + remark, len(alike)))
    return sorted(kinds, key=lambda kind: -kind[1])[:most]


def first_of(names: Sequence[str]) -> str:
    """The first name, and how many more there are."""
    if not names:
        return ""
    if len(names) == 1:
        return names[0]
    return f"{names[0]} and {len(names) - 1} more"
