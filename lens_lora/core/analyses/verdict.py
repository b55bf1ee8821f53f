"""Verdicts on the numbers of one prompt: what they are is decided here, how to say it elsewhere.

A number counts if it exceeds three noise floors σ (`Noise`), where σ is what rounding alone makes
of it.

1. `Verdict` compares the remainder of first order with the shift, at ε = 1 and at a quarter, half
   and three quarters of the strength. The two have noise floors of their own: for a large adapter
   that of the remainder is far above that of the shift, as first order adds its own rounding.
2. `FlipVerdict` compares the signs of a margin at both ends; a margin within three noise floors of
   zero has no known sign.

The verdicts of other questions stand beside these: `curvature/verdict.py`, `judging/verdict.py`,
`shifts/kl_shares.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, final

from jaxtyping import Float
from torch import Tensor

from lens_lora.core.function.noise import Noise
from lens_lora.core.results import drawing
from lens_lora.core.results.signs import SIGMAS

# The strengths between the ends at which every result looks at the path.
CHECKPOINTS = (0.25, 0.5, 0.75)
# A remainder of at most a tenth of the shift is small.
_SMALL = 0.1
# If it exceeds a fifth of the shift on the way, a small one at ε = 1 is a coincidence.
_LARGE = 0.2


class Point(NamedTuple):
    """One strength of one prompt, in the readout's units.

    Attributes:
        scale: the strength ε.
        remainder, shift: R(ε), and g(ε) − g(0).
        remainder_floor, noise_floor: σ of each of these, from rounding alone.
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
    scales: Float[Tensor, " scale"],
    remainder: Float[Tensor, "batch scale"],
    shift: Float[Tensor, "batch scale"],
    noise: Noise,
    curvature_noise: Float[Tensor, " batch"] | None = None,
) -> list[list[Point]]:
    """The points of each prompt.

    Args:
        scales: the strengths ε.
        remainder: R(ε) of each prompt.
        shift: g(ε) − g(0).
        noise: σ of a shift and of a remainder.
        curvature_noise: if R is what second order leaves, σ of the curvature from rounding alone;
            None if R is what first order leaves.
    """
    strengths = scales.cpu().double().tolist()
    columns = (
        remainder,
        shift,
        noise.of_remainder(scales, curvature_noise),
        noise.of_shift(scales),
    )
    columns_by_prompt = [column.cpu().double().tolist() for column in columns]
    points: list[list[Point]] = []
    for columns_of_prompt in zip(*columns_by_prompt, strict=True):
        rows = zip(strengths, *columns_of_prompt, strict=True)
        points.append([Point(*row) for row in rows])
    return points


def points_at_end(
    remainder: Float[Tensor, " batch"],
    shift: Float[Tensor, " batch"],
    noise: Noise,
    curvature_noise: Float[Tensor, " batch"] | None = None,
) -> list[Point]:
    """Each prompt's point at ε = 1; the arguments are those of `points_of`."""
    full_strength = shift.new_ones(1)
    points = points_of(full_strength, remainder[:, None], shift[:, None], noise, curvature_noise)
    return [point for (point,) in points]


class _Worded:
    """A verdict, which str() puts into words."""

    def __str__(self) -> str:
        return drawing.text(self)


@final
@dataclasses.dataclass(frozen=True)
class Verdict(_Worded):
    """How good first order is on one prompt, at ε = 1 and on the way.

    Attributes:
        shift, remainder: g(1) − g(0), and what first order leaves of it.
        floor: three noise floors of the shift; a smaller difference may be rounding.
        remainder_floor: three noise floors of the remainder.
        worst: the largest |R(ε)| / |g(ε) − g(0)| at a quarter, half and three quarters of the
            strength; None if all of them are within the noise.
        worst_scale: the ε at which it is found.
    """

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

    @property
    def kind(self) -> Literal["no_shift", "coincidence", "noise", "small", "large", "uneven"]:
        """The verdict in a word.

        'no_shift': the shift itself is within rounding.
        'coincidence': at most a tenth is missed at ε = 1, but more than a fifth on the way.
        'noise': the remainder at ε = 1 is within rounding.
        'small': at most a tenth is missed throughout.
        'large': more than a tenth is missed at ε = 1.
        'uneven': at most a tenth is missed at ε = 1, but up to a fifth on the way.
        """
        worst = self.worst or 0.0
        if abs(self.shift) <= self.floor:
            return "no_shift"
        if self.share <= _SMALL and worst > _LARGE:
            return "coincidence"
        if abs(self.remainder) <= self.remainder_floor:
            return "noise"
        if self.share > _SMALL:
            return "large"
        return "small" if worst <= _SMALL else "uneven"


def verdict_of(end: Point, way: Sequence[Point]) -> Verdict:
    """The verdict on one prompt's remainder, at ε = 1 and on the way.

    Args:
        end: the prompt's point at ε = 1.
        way: its points on the way.
    """
    worst: float | None = None
    worst_scale: float | None = None
    for point in way:
        share = point.share
        if share is not None and (worst is None or share > worst):
            worst = share
            worst_scale = point.scale
    return Verdict(
        shift=end.shift,
        remainder=end.remainder,
        floor=SIGMAS * end.noise_floor,
        remainder_floor=SIGMAS * end.remainder_floor,
        worst=worst,
        worst_scale=worst_scale,
    )


@final
@dataclasses.dataclass(frozen=True)
class FlipVerdict(_Worded):
    """Whether one prompt's margin changes sign between base and adapted model.

    Attributes:
        m0, m: the margins of the base and of the adapted model.
        floor: three noise floors of a margin.
    """

    m0: float
    m: float
    floor: float

    @property
    def kind(self) -> Literal["hidden", "flips", "keeps"]:
        """The verdict in a word.

        'hidden': a margin is within rounding of zero, so that its sign is unknown.
        'flips': the margins have different signs.
        'keeps': both have the same sign.
        """
        if min(abs(self.m0), abs(self.m)) <= self.floor:
            return "hidden"
        return "flips" if self.m0 * self.m < 0 else "keeps"
