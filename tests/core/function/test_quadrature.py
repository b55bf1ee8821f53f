"""Nested rules: exact for polynomials, and no value of the integrand is needed twice."""

from __future__ import annotations

import numpy as np
import pytest
import reference

from lens_lora.core.function.quadrature import clenshaw_curtis, nested_counts, new_nodes


@pytest.mark.parametrize("nodes", [3, 5, 9, 17, 33, 65])
def test_a_rule_integrates_every_power_up_to_its_degree(nodes: int):
    """∫₀¹ ε^d dε = 1/(d + 1)."""
    points, weights = clenshaw_curtis(nodes)
    for degree in range(nodes + 1):
        assert weights @ points**degree == pytest.approx(1 / (degree + 1), rel=1e-12)
    assert points[0] == 0
    assert points[-1] == 1
    assert (weights > 0).all()
    expected_points, expected_weights = reference.rule_at_cosines(nodes)
    assert points == pytest.approx(expected_points, abs=1e-14)
    assert weights == pytest.approx(expected_weights, abs=1e-13)


@pytest.mark.parametrize(
    ("most", "counts"),
    [(3, [3]), (4, [3]), (5, [3, 5]), (64, [3, 5, 9, 17, 33]), (65, [3, 5, 9, 17, 33, 65])],
)
def test_rules_up_to_a_number_of_nodes(most: int, counts: list[int]):
    assert nested_counts(most) == counts


def test_sums_of_new_nodes_are_the_rules():
    """Every node comes once, and each rule's sum equals the rule alone."""
    counts = nested_counts(33)
    sums = np.zeros(len(counts))
    seen: list[float] = []
    for rule, nodes in enumerate(counts):
        points, weights = new_nodes(counts, rule)
        sums[rule:] += weights @ np.exp(3 * points)
        seen += points.tolist()
        all_points, all_weights = clenshaw_curtis(nodes)
        assert sorted(seen) == pytest.approx(all_points.tolist(), abs=1e-15)
        assert sums[rule] == pytest.approx(all_weights @ np.exp(3 * all_points), rel=1e-14)
    assert sums[-1] == pytest.approx((np.exp(3) - 1) / 3, rel=1e-14)
