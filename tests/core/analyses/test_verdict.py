"""One verdict on a remainder, and where its kinds begin."""

from __future__ import annotations

import pytest
import torch
from results_by_hand import SCALES, fact

from lens_lora.core import Point, Verdict
from lens_lora.core.analyses.verdict import verdict_of


def test_the_strengths_are_the_same_for_every_result():
    """A remainder at another ε than ¼, ½ and ¾ changes no verdict; one at ½ does."""
    even = [-4.0 + 8.0 * s for s in SCALES]
    early = list(even)
    half = list(even)
    early[1] += 5.0
    half[3] += 5.0
    kinds = [fact(-4.0, [2.0] * 4, m).verdict[0].kind for m in (even, early, half)]
    assert kinds == ["noise", "noise", "coincidence"]


@pytest.mark.parametrize(
    ("shift", "remainder", "on_the_way", "kind"),
    [
        (10.0, 1.0, 0.1, "small"),
        (10.0, 1.0, 0.2, "uneven"),
        (10.0, 1.0, 0.21, "coincidence"),
        (10.0, 1.01, 0.0, "large"),
        (10.0, 1.01, 0.9, "large"),
        (10.0, 0.003, 0.2, "noise"),
        (0.003, 5.0, 0.9, "no_shift"),
    ],
)
def test_where_the_kinds_begin(shift: float, remainder: float, on_the_way: float, kind: str):
    assert verdict(shift, remainder, [(0.5, 5 * on_the_way, 5.0)]).kind == kind


def verdict(
    shift: float, remainder: float, way: list[tuple[float, float, float]], own: float = 1e-3
) -> Verdict:
    """With a noise floor of 1e-3, and that of the remainder."""
    return verdict_of(
        Point(1.0, remainder, shift, own, 1e-3), [Point(*point, own, 1e-3) for point in way]
    )


def test_rounding_on_the_way_is_no_remainder():
    """A large ratio of two numbers within rounding says nothing."""
    found = verdict(10.0, 0.5, [(0.25, 0.002, 0.002), (0.5, 0.4, 5.0)])
    assert (found.kind, found.worst, found.worst_scale) == ("small", 0.08, 0.5)
    assert verdict(10.0, 0.5, []).worst is None
    assert torch.isnan(torch.tensor(verdict(0.0, 0.0, []).share))


def test_the_remainder_has_a_floor_of_its_own():
    """First order's rounding is in it: what it could make is no remainder, at 1 and on the way."""
    way = [(0.5, 1.5, 5.0)]
    assert verdict(10.0, 0.5, way).kind == "coincidence"
    found = verdict(10.0, 0.5, way, own=0.6)
    assert (found.kind, found.worst) == ("noise", None)
    assert str(found) == "below the noise: the remainder 0.5 is within rounding (1.8)"
    assert verdict(10.0, 5.0, way, own=0.6).kind == "large"
    assert verdict(0.002, 0.5, way, own=0.6).kind == "no_shift"
