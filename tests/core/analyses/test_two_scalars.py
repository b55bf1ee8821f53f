"""Known answers, worked by hand on a model of two scalars (see two_scalars.py)."""

from __future__ import annotations

import math

import pytest
import torch
from two_scalars import D1, D2, scalar_lens

import lens_lora as ll

LENS = scalar_lens(torch.square)
X = torch.tensor([[3]])
Y = ll.Logit(0)


def test_first_order_by_hand():
    """a₁ = 2·w₂·w₁·d₁·x² = 18, a₂ = d₂·w₁²·x² = 45; g(0) = 18, g(1) = 141.75."""
    for mode in ("forward", "reverse"):
        found = ll.first_order(LENS, X, Y, mode=mode, progress=False)
        assert found.values.tolist() == [[18.0, 45.0]]
    assert found.base.item() == 18.0
    assert found.adapted.item() == 141.75
    assert found.remainder.item() == pytest.approx(141.75 - 18 - 63)


def test_first_order_at_the_adapted_end_by_hand():
    """At ε = 1: a₁ = 7·2·1.5·0.5·9 = 94.5, a₂ = 5·2.25·9 = 101.25."""
    found = ll.first_order(LENS, X, Y, at=1.0)
    assert found.values[0].tolist() == pytest.approx([94.5, 101.25])


def test_remainder_by_hand():
    """Alone, site 1 leaves 2·0.25·9 = 4.5 and site 2 nothing; together they leave 60.75."""
    found = ll.remainder(LENS, X, Y, by_site=True)
    assert (found.site_shift - found.site_first_order)[0].tolist() == pytest.approx([4.5, 0.0])
    assert found.remainder.item() == pytest.approx(60.75)
    assert str(found.verdict[0]).startswith("large: 49% of the shift at ε = 1")


def test_curve_by_hand():
    """R(ε) = (2 + 5ε)(1 + ε/2)²·9 − 18 − 63ε = 49.5ε² + 11.25ε³, of order 2."""
    scales = [1e-4, 2e-4, 4e-4, 8e-4, 0.5, 1.0]
    curve = ll.remainder_curve(LENS, X, Y, scales)
    expected = [49.5 * e**2 + 11.25 * e**3 for e in scales]
    assert curve.remainder[0].tolist() == pytest.approx(expected, rel=1e-6)
    assert curve.order.item() == pytest.approx(2.0, abs=0.01)


def test_margin_and_flip_by_hand():
    """doc = −y₂ against pre = 0 … the margin g − 30 changes sign where (2+5ε)(1+ε/2)²·9 = 30."""
    shifted = scalar_lens(lambda y: y**2 - 30 / 18)
    found = ll.fact_margin(shifted, X, 0, 1, progress=False)

    def g(e: float) -> float:
        return (2 + 5 * e) * ((1 + e / 2) ** 2 * 9 - 30 / 18)

    assert found.m0.item() == pytest.approx(g(0))
    assert found.m.item() == pytest.approx(g(1))
    assert not found.flips[0]
    assert math.isnan(found.flip_scale.item())
    flipping = scalar_lens(lambda y: y**2 - 16)
    found = ll.fact_margin(flipping, X, 0, 1, progress=False)
    root = 2 * (4 / 3 - 1)
    assert found.flips == (True,)
    assert found.flip_scale.item() == pytest.approx(root, abs=1e-5)
    assert found.m0.item() == -14.0
    assert str(found.flip_verdict[0]) == f"flips: from -14 to {found.m.item():+.3g}"


def test_components_by_hand():
    """Site 1: z = 3, δz = 1.5, Jᵀu = 2·w₂·y₁ = 12, cosine 1. Gain: ‖(12·1.5, 0) − mean‖ / 1.5."""
    found = ll.components(LENS, X, Y, progress=False)
    assert found.z_norm[0].tolist() == [3.0, 9.0]
    assert found.delta_norm[0].tolist() == [3 * D1, 9 * D2]
    assert found.sensitivity[0].tolist() == [12.0, 1.0]
    assert found.cosine[0].tolist() == [1.0, 1.0]
    assert found.gain[0].tolist() == pytest.approx([12 / math.sqrt(2), 1 / math.sqrt(2)])


def test_the_input_of_a_site_is_live():
    """Both sites beyond each alone: d₂ (1.5² − 1) x² = 56.25; with z₂ frozen at the base, 0."""

    def g(*on: str) -> float:
        return LENS.logits(X, dict.fromkeys(on, 1.0) if on else 0.0)[0, -1, 0].item()

    assert (g(), g("site1"), g("site2")) == (18.0, 40.5, 63.0)
    assert g("site1", "site2") - g("site1") - g("site2") + g() == 56.25


@pytest.mark.parametrize("gates", [{"site1": 1.0}, {"site2": 1.0}])
def test_remainder_is_zero_where_g_is_linear(gates: dict[str, float]):
    """φ = id and one site open: g is linear in ε, so R is round-off at any strength."""
    lens = scalar_lens(lambda y: y)
    one = ll.first_order(lens, X, Y)
    exact = lens.logits(X, gates)[0, -1, 0] - one.base[0]
    (name,) = gates
    predicted = one.values[0, [s.name for s in lens.sites].index(name)]
    assert abs(exact - predicted) < 1e-12


def test_remainder_of_two_linear_sites_is_their_coupling():
    """φ = id, both open: R = d₁d₂x exactly, though each map is linear."""
    found = ll.remainder(scalar_lens(lambda y: y), X, Y, by_site=True)
    assert (found.site_shift - found.site_first_order)[0].tolist() == pytest.approx([0.0, 0.0])
    assert found.remainder.item() == pytest.approx(D1 * D2 * 3)
