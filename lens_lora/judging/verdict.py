"""The verdict on how far a shift stands out from those of adapters in random directions."""

from __future__ import annotations

import dataclasses
from typing import Literal, final

from lens_lora.core import SIGMAS, drawing

# The usual level of significance.
_LEVEL = 0.05


@final
@dataclasses.dataclass(frozen=True)
class NullVerdict:
    """How far one prompt's shift stands out from those of adapters in random directions.

    Attributes:
        shift: g(1) − g(0).
        floor: three noise floors.
        null: the root mean square of the draws' shifts, or one noise floor if that is larger.
        is_least: whether it is the noise floor, so that the ratio is a lower bound.
        p: the share of draws, the real adapter counted as one, that reach the shift.
        exceeds_all: the share of sites that exceed every draw.
        draws, run: how many random adapters were drawn, and run for their shift.
    """

    shift: float
    floor: float
    null: float
    is_least: bool
    p: float
    exceeds_all: float
    draws: int
    run: int

    @classmethod
    def of(
        cls,
        *,
        shift: float,
        noise_floor: float,
        null: float,
        p: float,
        exceeds_all: float,
        draws: int,
        run: int,
    ) -> NullVerdict:
        """The verdict on one prompt's null test.

        Args:
            shift: g(1) − g(0).
            noise_floor: σ of the shift from rounding alone.
            null: the root mean square of the draws' shifts.
            p, exceeds_all, draws, run: as in the class.
        """
        return cls(
            shift=shift,
            floor=SIGMAS * noise_floor,
            null=max(null, noise_floor),
            is_least=null < noise_floor,
            p=p,
            exceeds_all=exceeds_all,
            draws=draws,
            run=run,
        )

    def __str__(self) -> str:
        return drawing.text(self)

    @property
    def kind(self) -> Literal["no_shift", "as_random", "stands_out"]:
        """The outcome in a word.

        'no_shift': the shift itself is within rounding. 'as_random': as many draws reach it as
        chance allows. 'stands_out': fewer do.
        """
        if abs(self.shift) <= self.floor:
            return "no_shift"
        smallest_p = 1 / (1 + self.run)
        return "as_random" if self.p > max(_LEVEL, smallest_p) else "stands_out"

    @property
    def ratio(self) -> float:
        """The size of the shift over that of the draws."""
        return abs(self.shift) / self.null

    @property
    def chance(self) -> float:
        """The share of sites that exceed every draw by chance."""
        return 1 / (1 + self.draws)
