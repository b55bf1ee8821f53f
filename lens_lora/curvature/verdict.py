"""Second order compared with first: which leaves less of the shift, and up to which strength."""

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
        first, second: what first order and what second order leave of the shift.
        floor: three noise floors of the shift.
        remainder_floor: three noise floors of what second order leaves.
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

        'no_shift' if the shift itself is within rounding; 'neither' if both leave the same, within
        rounding; 'farther' if second order leaves more; 'nearer' if it leaves less, all along the
        path; 'coincidence' if it leaves less at ε = 1, but more on the way.
        """
        nearer_by = abs(self.first) - abs(self.second)
        if abs(self.shift) <= self.floor:
            return "no_shift"
        if abs(nearer_by) <= self.remainder_floor:
            return "neither"
        if nearer_by < 0:
            return "farther"
        return "coincidence" if self.helps_up_to < 1 else "nearer"
