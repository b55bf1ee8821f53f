"""Results and the words about them have one verdict on a remainder."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from results_by_hand import META, SCALES, SITES, fact
from shapes import share

import lens_lora as ll
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
