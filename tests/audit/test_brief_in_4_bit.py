"""A brief over a base in 4 bit is that over the same weights as a plain model."""

from __future__ import annotations

import models
import pytest
from quantised import of_4bit

import lens_lora as ll
from lens_lora.audit import brief
from lens_lora.audit import what_changed as changes

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = models.NEEDS_BRIDGE


@pytest.fixture
def short_brief(monkeypatch):
    """As the context of the tiny models is."""
    for module, name, value in (
        (brief, "_TOKENS_SPOKEN", 4),
        (brief, "_TOKENS_OF_A_CLAIM", 3),
        (changes, "_ANSWER", 4),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.mark.slow
def test_a_brief_in_4_bit_is_that_of_the_dequantised_model(short_brief):
    """The same answers, the same words claimed, the same runs."""
    options = {"nulls": 1, "fast": True, "progress": False}
    found = [ll.what_changed(lens, models.tokens(), **options) for lens in of_4bit("llama")]
    own, plain = [each.brief() for each in found]
    assert own.answers == plain.answers
    assert own.entropies == pytest.approx(plain.entropies, abs=1e-4)
    claims, expected_claims = [each.claims for each in found]
    assert len(claims) == len(expected_claims) > 0
    for claim, expected in zip(claims, expected_claims, strict=True):
        assert (claim.context, claim.says) == (expected.context, expected.says)
        for name in ("score", "null_score", "base", "adapted", "null", "without"):
            assert getattr(claim, name) == pytest.approx(getattr(expected, name), abs=2e-3)
