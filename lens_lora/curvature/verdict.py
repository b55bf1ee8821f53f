"""Second order compared with first: which misses less of the shift, and up to which strength."""

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
        first, second: the remainders of first order and of second order.
        floor: three noise floors of the shift.
        remainder_floor: three noise floors of second order's remainder.
        helps_up_to: the strength up to which second order is nowhere farther than first order.
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
        """Say which of the two is nearer at ε = 1.

        'no_shift' if the shift itself is within rounding; 'neither' if both miss the same, within
        rounding; 'farther' if second order misses more; 'nearer' if it misses less, all along the
        path; 'coincidence' if it misses less at ε = 1, but more on the way.
        """
        nearer_by = abs(self.first) - abs(self.second)
        if abs(self.shift) <= self.floor:
            return "no_shift"
        if abs(nearer_by) <= self.remainder_floor:
            return "neither"
        if nearer_by < 0:
            return "farther"
        return "coincidence" if self.helps_up_to < 1 else "nearer"
