"""What one prompt's numbers say, decided here and nowhere else; `show/words/verdicts.py` words it.

1. First order (`Verdict`): the remainder against the shift, at ε = 1 and at a quarter, half and
   three quarters of the strength. Each has its own noise floor: on a violent adapter the
   remainder's is far above the shift's, as first order has rounding of its own.
2. Second order beside first (`SecondVerdict`): which of the two leaves less, up to which strength.
3. Random directions (`NullVerdict`): how far the shift stands out from theirs.
4. The sign of a margin at both ends (`FlipVerdict`): a sign within three noise floors is unknown.
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

__all__ = [
    "CHECKPOINTS",
    "FlipVerdict",
    "NullVerdict",
    "Point",
    "SecondVerdict",
    "Verdict",
    "flip_verdict",
    "null_verdict",
    "points_of",
    "second_verdict",
    "verdict_of",
]

CHECKPOINTS = (0.25, 0.5, 0.75)
_SMALL, _LARGE, _LEVEL = 0.1, 0.2, 0.05
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
    curvature_noise: Float[Tensor, "batch"] | None = None,
) -> list[list[Point]]:
    """The points of each prompt.

    Args:
        scales: ε.
        remainder, shift: at each of them.
        noise: of the prompts.
        curvature_noise: where the remainder is what second order leaves.
    """
    floor = noise.of_remainder(scales, curvature_noise)
    rows = (remainder, shift, floor, noise.of_shift(scales))
    by_prompt = zip(*(values.cpu().double().tolist() for values in rows), strict=True)
    strengths = scales.cpu().double().tolist()
    return [
        [Point(*point) for point in zip(strengths, *numbers, strict=True)] for numbers in by_prompt
    ]


class _Worded:
    """What str() words."""

    def __str__(self) -> str:
        return drawing.text(self)


@final
@dataclasses.dataclass(frozen=True)
class Verdict(_Worded):
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


@final
@dataclasses.dataclass(frozen=True)
class SecondVerdict(_Worded):
    """Whether second order is nearer to the exact shift than first order, on one prompt.

    Attributes:
        kind: 'no_shift', the shift itself is within rounding; 'neither', they leave the same at
            ε = 1, within rounding; 'farther', second order leaves more; 'nearer', it leaves less,
            all along the path; 'coincidence', less at ε = 1, but more on the way.
        shift: g(1) − g(0).
        first, second: what first order, and second order, leaves of it.
        floor: three noise floors of the shift.
        remainder_floor: three of what second order leaves.
        helps_up_to: the strength up to which second order is nowhere farther.
    """

    kind: Literal["no_shift", "neither", "farther", "nearer", "coincidence"]
    shift: float
    first: float
    second: float
    floor: float
    remainder_floor: float
    helps_up_to: float


def second_verdict(first: Point, second: Point, helps_up_to: float) -> SecondVerdict:
    """The verdict on one prompt's second order.

    Args:
        first, second: what first order, and second order, leaves at ε = 1.
        helps_up_to: the strength up to which second order is nowhere farther.
    """
    floor, own = SIGMAS * second.noise_floor, SIGMAS * second.remainder_floor
    nearer_by = abs(first.remainder) - abs(second.remainder)
    numbers = (second.shift, first.remainder, second.remainder, floor, own, helps_up_to)
    if abs(second.shift) <= floor:
        return SecondVerdict("no_shift", *numbers)
    if abs(nearer_by) <= own:
        return SecondVerdict("neither", *numbers)
    if nearer_by < 0:
        return SecondVerdict("farther", *numbers)
    return SecondVerdict("coincidence" if helps_up_to < 1 else "nearer", *numbers)


@final
@dataclasses.dataclass(frozen=True)
class NullVerdict(_Worded):
    """How far one prompt's shift stands out from those of adapters in random directions.

    Attributes:
        kind: 'no_shift', the shift itself is within rounding; 'as_random', as many draws reach it
            as chance allows; 'stands_out'.
        shift: g(1) − g(0).
        floor: three noise floors.
        null: root mean square of the draws' shifts, at least one noise floor.
        is_least: whether the draws' own is below that floor, so that the ratio is a lower bound.
        p: the share of draws, the real adapter counted as one, that reach the shift.
        exceeds_all: the share of sites that exceed every draw.
        draws: how many there are.
    """

    kind: Literal["no_shift", "as_random", "stands_out"]
    shift: float
    floor: float
    null: float
    is_least: bool
    p: float
    exceeds_all: float
    draws: int

    @property
    def ratio(self) -> float:
        """|shift| over the draws'."""
        return abs(self.shift) / self.null

    @property
    def chance(self) -> float:
        """The share of sites that exceed every draw by chance."""
        return 1 / (1 + self.draws)


def null_verdict(
    shift: float, noise_floor: float, null: float, p: float, exceeds_all: float, draws: int
) -> NullVerdict:
    """The verdict on one prompt's null test.

    Args:
        shift: g(1) − g(0).
        noise_floor: σ of it from rounding alone.
        null: root mean square of the draws' shifts.
        p: the share of draws that reach the shift.
        exceeds_all: the share of sites that exceed every draw.
        draws: how many there are.
    """
    floor, is_least = SIGMAS * noise_floor, null < noise_floor
    numbers = (shift, floor, max(null, noise_floor), is_least, p, exceeds_all, draws)
    if abs(shift) <= floor:
        return NullVerdict("no_shift", *numbers)
    return NullVerdict("as_random" if p > max(_LEVEL, 1 / (1 + draws)) else "stands_out", *numbers)


@final
@dataclasses.dataclass(frozen=True)
class FlipVerdict(_Worded):
    """Whether one prompt's margin changes sign between base and adapted model.

    Attributes:
        kind: 'hidden', a margin is within rounding of zero, so that its sign is unknown; 'flips';
            'keeps', both have the same sign.
        m0, m: the base model's margin, and the adapted model's.
        floor: three noise floors.
    """

    kind: Literal["hidden", "flips", "keeps"]
    m0: float
    m: float
    floor: float


def flip_verdict(m0: float, m: float, noise_floor: float) -> FlipVerdict:
    """The verdict on one prompt's flip.

    Args:
        m0, m: the base model's margin, and the adapted model's.
        noise_floor: σ of each from rounding alone.
    """
    floor = SIGMAS * noise_floor
    if min(abs(m0), abs(m)) <= floor:
        return FlipVerdict("hidden", m0, m, floor)
    return FlipVerdict("flips" if m0 * m < 0 else "keeps", m0, m, floor)
