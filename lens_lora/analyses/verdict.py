"""How good first order is on one prompt: decided here, and nowhere else in the package.

The remainder is compared with the shift at ε = 1 and at a quarter, half and three quarters of the
strength, each with its own noise floor: on a violent adapter the remainder's is far above the
shift's, as first order has rounding of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, final

from jaxtyping import Float
from torch import Tensor

from lens_lora.results import drawing
from lens_lora.results.measured import SIGMAS
from lens_lora.results.noise import Noise

__all__ = ["CHECKPOINTS", "Point", "Verdict", "points_of", "verdict_of"]

CHECKPOINTS = (0.25, 0.5, 0.75)
_SMALL, _LARGE = 0.1, 0.2
Kind = Literal["no_shift", "coincidence", "noise", "small", "large", "uneven"]


class Point(NamedTuple):
    """One strength of one prompt, in the readout's units.

    Attributes:
        scale: ε.
        remainder, shift: R(ε), and g(ε) − g(0).
        remainder_floor, noise_floor: σ of each from rounding alone.
    """

    scale: float
    remainder: float
    shift: float
    remainder_floor: float
    noise_floor: float

    @property
    def share(self) -> float | None:
        """|R| / |shift|; None where one of them is within rounding."""
        is_clear = abs(self.remainder) > SIGMAS * self.remainder_floor
        has_moved = abs(self.shift) > SIGMAS * self.noise_floor
        return abs(self.remainder / self.shift) if is_clear and has_moved else None


def points_of(
    scales: Float[Tensor, "scale"],
    remainder: Float[Tensor, "batch scale"],
    shift: Float[Tensor, "batch scale"],
    noise: Noise,
) -> list[list[Point]]:
    """The points of each prompt.

    Args:
        scales: ε.
        remainder, shift: at each of them.
        noise: of the prompts.
    """
    rows = (remainder, shift, noise.of_remainder(scales), noise.of_shift(scales))
    by_prompt = zip(*(values.double().tolist() for values in rows), strict=True)
    strengths = scales.double().tolist()
    return [
        [Point(*point) for point in zip(strengths, *numbers, strict=True)] for numbers in by_prompt
    ]


@final
@dataclasses.dataclass(frozen=True)
class Verdict:
    """How good first order is on one prompt, at ε = 1 and on the way.

    Attributes:
        kind: 'no_shift', the shift itself is within rounding; 'coincidence', at most a tenth of
            the shift is missed at ε = 1, but more than a fifth on the way; 'noise', the remainder
            at ε = 1 is within rounding; 'small', at most a tenth is missed throughout; 'large',
            more than a tenth at ε = 1; 'uneven', at most a tenth at ε = 1, and up to a fifth on the
            way.
        shift, remainder: g(1) − g(0), and what first order leaves of it.
        floor: three noise floors of the shift; a difference of readouts of at most that can be
            rounding.
        remainder_floor: three of the remainder, whose first order has rounding of its own.
        worst: the largest |R(ε)| / |g(ε) − g(0)| at a quarter, half and three quarters of the
            strength; None where none of them stands out of the noise.
        worst_scale: the ε of it.
    """

    kind: Kind
    shift: float
    remainder: float
    floor: float
    remainder_floor: float
    worst: float | None
    worst_scale: float | None

    @property
    def share(self) -> float:
        """|R| / |shift| at ε = 1; NaN without a shift."""
        return abs(self.remainder / self.shift) if self.shift else float("nan")

    def __str__(self) -> str:
        return drawing.text(self)


def verdict_of(end: Point, way: Sequence[Point]) -> Verdict:
    """The verdict on one prompt's remainder.

    Args:
        end: at ε = 1.
        way: at the strengths on the way.
    """
    clear = [(point.share, point.scale) for point in way if point.share is not None]
    worst, scale = max(clear, default=(None, None), key=lambda pair: pair[0])
    floors = SIGMAS * end.noise_floor, SIGMAS * end.remainder_floor
    kind = _kind(abs(end.shift), abs(end.remainder), *floors, worst or 0.0)
    return Verdict(kind, end.shift, end.remainder, *floors, worst, scale)


def _kind(
    shift: float, remainder: float, floor: float, remainder_floor: float, worst: float
) -> Kind:
    if shift <= floor:
        return "no_shift"
    here = remainder / shift
    if here <= _SMALL and worst > _LARGE:
        return "coincidence"
    if remainder <= remainder_floor:
        return "noise"
    if here > _SMALL:
        return "large"
    return "small" if worst <= _SMALL else "uneven"
