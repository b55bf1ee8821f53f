"""One verdict on a remainder: every result has the same, and words and tables follow it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from results_by_hand import META, SCALES, SITES, fact
from shapes import share

import lens_lora as ll
from lens_lora.core import Point, Verdict
from lens_lora.core.analyses.verdict import verdict_of
from lens_lora.show.words import account_of, margin_story

CLAIMS = {
    "no_shift": "no effect of the adapter",
    "coincidence": "is a coincidence",
    "small": "describes the whole path",
    "large": "do not add up",
}
SIZES = st.floats(-10, 10, width=32)
MARGINS = st.lists(SIZES, min_size=6, max_size=6)


@settings(max_examples=share(100), deadline=None)
@given(
    margins=MARGINS,
    first=st.lists(SIZES, min_size=4, max_size=4),
    noise=st.sampled_from([1e-6, 0.3]),
)
def test_results_and_words_agree(margins: list[float], first: list[float], noise: float):
    """`remainder` and `fact_margin` on the same numbers, the account, and the story's claim."""
    margin = fact(-4.0, first, margins, noise=noise)
    quarters = (0.25, 0.5, 0.75)
    columns = [SCALES.index(scale) for scale in quarters]
    ends = {name: getattr(margin.attribution, name) for name in ("base", "adapted", "str_tokens")}
    rest = ll.results.Remainder(
        first_order=margin.first_order, noise=margin.curve.noise, path_scales=quarters,
        path_shift=margin.curve.shift[:, columns], sites=SITES,
        site_first_order=margin.attribution.per_site, site_shift=None,
        readout="y", units="logits", meta=META, **ends,
    )  # fmt: skip
    (verdict,) = margin.verdict
    assert verdict == rest.verdict[0] == account_of(margin).verdict
    assert rest.to_frame()["verdict"].tolist() == [verdict.kind]
    story = margin_story(margin)
    assert {kind for kind, claim in CLAIMS.items() if claim in story} == {verdict.kind} & set(
        CLAIMS
    )
    assert verdict.kind in str(verdict) or "noise" in str(verdict) or verdict.kind == "no_shift"


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
