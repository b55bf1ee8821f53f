"""The signs of a readout: which of them change, and which are hidden by rounding."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

# A difference of at most so many noise floors cannot be told from rounding.
SIGMAS = 3.0

_Numbers = Float[Tensor, "*entry"]
_Floors = Float[Tensor, "*#entry"]


def hides_sign(values: _Numbers, noise_floor: _Floors) -> Bool[Tensor, "*entry"]:
    """Whether a number is so near to zero that rounding hides its sign."""
    return values.abs() <= SIGMAS * noise_floor.to(values)


def changes_sign(
    before: _Numbers, after: _Numbers, noise_floor: _Floors, floor_after: _Floors | None = None
) -> Bool[Tensor, "*entry"]:
    """Whether two numbers have opposite signs, neither of which rounding hides.

    Args:
        before: the one number.
        after: the other.
        noise_floor: σ of the first from rounding alone.
        floor_after: σ of the second; None where it is the same.
    """
    last_floor = noise_floor if floor_after is None else floor_after
    is_hidden = hides_sign(before, noise_floor) | hides_sign(after, last_floor)
    return (before.sign() != after.sign()) & ~is_hidden
