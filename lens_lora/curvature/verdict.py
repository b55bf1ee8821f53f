"""Second order beside first: which of the two leaves less of the shift, up to which strength."""

from __future__ import annotations

import dataclasses
from typing import Literal, final

from lens_lora.core import drawing


@final
@dataclasses.dataclass(frozen=True)
class SecondVerdict:
    """Whether second order is nearer to the exact shift than first order, on one prompt.

    Attributes:
        shift: g(1) − g(0).
        first, second: the remainders that first order, and second order, leave.
        floor: three noise floors of the shift.
        remainder_floor: three of what second order leaves.
        helps_up_to: the strength up to which second order is nowhere farther.
    """

    shift: float
    first: float
    second: float
    floor: float
    remainder_floor: float
    helps_up_to: float

    def __str__(self) -> str:
        return drawing.text(self)

    @property
    def kind(self) -> Literal["no_shift", "neither", "farther", "nearer", "coincidence"]:
        """'no_shift', the shift itself is within rounding; 'neither', the two leave the same at
        ε = 1, within rounding; 'farther', second order leaves more; 'nearer', it leaves less, all
        along the path; 'coincidence', less at ε = 1, but more on the way.
        """
        nearer_by = abs(self.first) - abs(self.second)
        if abs(self.shift) <= self.floor:
            return "no_shift"
        if abs(nearer_by) <= self.remainder_floor:
            return "neither"
        if nearer_by < 0:
            return "farther"
        return "coincidence" if self.helps_up_to < 1 else "nearer"
