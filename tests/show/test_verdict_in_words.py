"""Results and the words about them have one verdict on a remainder."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from results_by_hand import META, SCALES, SITES, fact
from shapes import share

import lens_lora as ll
from lens_lora.core import Verdict
from lens_lora.views.words import margin_numbers, margin_story

CLAIMS = {
    "no_shift": "no effect of the adapter",
    "coincidence": "is a coincidence",
    "small": "describes the whole path",
    "large": "do not add up",
}
# How a verdict names its kind, where that is not the kind's own word.
SAID = {
    "no_shift": "below the noise: the shift",
    "noise": "below the noise: the remainder",
}
SIZES = st.floats(-10, 10, width=32)
MARGINS = st.lists(SIZES, min_size=6, max_size=6)


BASE = -4.0
LINE = [BASE + 8 * scale for scale in SCALES]


def bent(by: float) -> list[float]:
    """Margins on the line but for the one at ε = ½."""
    return [margin + by * (scale == 0.5) for margin, scale in zip(LINE, SCALES, strict=True)]


# Margins, of whose shift of 8 each of four sites has a part. Random ones are nearly always "large".
OF_EACH_KIND = {
    "noise": (LINE, 2.0),
    "small": (LINE, 1.9),
    "uneven": (bent(0.6), 1.95),
    "coincidence": (bent(2.0), 1.9),
    "large": (LINE, 1.0),
    "no_shift": ([BASE] * len(SCALES), 1.0),
}


@pytest.mark.parametrize("kind", OF_EACH_KIND)
def test_results_and_words_agree_on_each_kind(kind: str):
    margins, part = OF_EACH_KIND[kind]
    assert verdict_of_all(margins, [part] * 4, noise=1e-6).kind == kind


@settings(max_examples=share(100), deadline=None)
@given(
    margins=MARGINS,
    first=st.lists(SIZES, min_size=4, max_size=4),
    noise=st.sampled_from([1e-6, 0.3]),
)
def test_results_and_words_agree(margins: list[float], first: list[float], noise: float):
    verdict_of_all(margins, first, noise)


def verdict_of_all(margins: list[float], first: list[float], noise: float) -> Verdict:
    """Require one verdict of `remainder` and `fact_margin`, of the numbers, and of the story."""
    margin = fact(BASE, first, margins, noise=noise)
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
    assert verdict == rest.verdict[0] == margin_numbers(margin).verdict
    assert rest.to_frame()["verdict"].tolist() == [verdict.kind]
    story = margin_story(margin)
    claimed = {kind for kind, claim in CLAIMS.items() if claim in story}
    assert claimed == {verdict.kind} & set(CLAIMS)
    assert SAID.get(verdict.kind, verdict.kind) in str(verdict)
    return verdict
