"""What a check of an adapter, and of one tensor of a merged folder, comes to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from lens_lora.core import stored

Outcome = Literal["passed", "failed", "undecided", "not asked"]


@stored
@dataclasses.dataclass(frozen=True)
class Check:
    """One check: the two facts that agree or not, and the module or prompt where they do not.

    `value` is the number measured: nats per token, a margin, the part of ΔW that a merge keeps.
    """

    name: str
    outcome: Outcome
    measured: str
    bound: str = ""
    where: str = ""
    value: float = math.nan

    @property
    def facts(self) -> str:
        """What was measured, what was expected, and where, in a line."""
        bound = f"expected: {self.bound}" if self.bound else ""
        return "; ".join(filter(None, (self.measured.rstrip("."), bound, self.where)))


@stored
@dataclasses.dataclass(frozen=True)
class MergedTensor:
    """What a tensor of a merged folder looks like; c of it, and of base + ΔW in its dtype.

    Both are NaN where the adapter adds nothing.
    """

    name: str
    outcome: Outcome
    looks: str
    ratio: float = math.nan
    kept: float = math.nan


def worst(parts: Sequence[Check | MergedTensor]) -> Outcome:
    """'failed' if any part failed, else 'undecided' if any is, else 'passed'."""
    outcomes = {part.outcome for part in parts}
    if "failed" in outcomes:
        return "failed"
    return "undecided" if "undecided" in outcomes else "passed"


def first_of(names: Sequence[str]) -> str:
    """The first name, and how many more there are."""
    if len(names) < 2:
        return "".join(names)
    return f"{names[0]} and {len(names) - 1} more"
