"""The verdict on second order: its kinds and their words."""

from __future__ import annotations

import re

import pytest

from lens_lora.curvature.verdict import SecondVerdict

NOISE = 0.01


def verdict(
    shift: float, first: float, second: float, reach: float, own: float = 0.1
) -> SecondVerdict:
    """With this much rounding of second order's own."""
    return SecondVerdict(shift, first, second, 3 * NOISE, 3 * own, reach)


@pytest.mark.parametrize(
    ("first", "second", "reach", "shift", "kind", "says"),
    [
        (4.0, 1.0, 1.0, 10.0, "nearer", "nearer: misses 10.0% of the shift at ε = 1, first order"),
        (4.0, 1.0, 0.5, 10.0, "coincidence", "nearer at ε = 1 by coincidence.*from ε > 0.5"),
        (1.0, -4.0, 0.3, 10.0, "farther", "farther, no correction: .*only up to ε = 0.3"),
        (1.2, -1.0, 0.3, 10.0, "neither", "neither nearer nor farther, within rounding"),
        (4.0, 1.0, 1.0, 0.02, "no_shift", r"below the noise: the shift 0.02 .*\(0.03\)"),
    ],
)
def test_second_order_beside_first(
    first: float, second: float, reach: float, shift: float, kind: str, says: str
):
    """What they differ by must stand out of second order's own rounding."""
    found = verdict(shift, first, second, reach)
    assert found.kind == kind
    assert re.match(says, str(found))
    assert verdict(10.0, 4.0, 3.0, 1.0, own=0.4).kind == "neither"
