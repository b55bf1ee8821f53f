"""How far what was found is from what was expected, as the tests of exactness measure it."""

from __future__ import annotations

from torch import Tensor


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """The largest |found − expected| of any entry; NaN, which passes no bound, if any is NaN."""
    return float((found - expected).detach().abs().max())
