"""Signs of a readout: what changes, and what rounding hides."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.results.measured import SIGMAS

__all__ = ["changes_sign", "hides_sign"]


def hides_sign(
    values: Float[Tensor, "*entry"], noise_floor: Float[Tensor, "*#entry"]
) -> Bool[Tensor, "*entry"]:
    """Whether a number is so near to zero that rounding hides its sign.

    Args:
        values: of a readout.
        noise_floor: σ of it from rounding alone.
    """
    return values.abs() <= SIGMAS * noise_floor.to(values)


def changes_sign(
    before: Float[Tensor, "*entry"],
    after: Float[Tensor, "*entry"],
    noise_floor: Float[Tensor, "*#entry"],
    floor_after: Float[Tensor, "*#entry"] | None = None,
) -> Bool[Tensor, "*entry"]:
    """Whether two numbers have opposite signs, neither hidden by rounding.

    Args:
        before, after: of a readout.
        noise_floor: σ of each from rounding alone.
        floor_after: of the second, where it has its own.
    """
    floors = noise_floor, noise_floor if floor_after is None else floor_after
    pairs = zip((before, after), floors, strict=True)
    is_hidden = [hides_sign(value, floor) for value, floor in pairs]
    return (before.sign() != after.sign()) & ~is_hidden[0] & ~is_hidden[1]
