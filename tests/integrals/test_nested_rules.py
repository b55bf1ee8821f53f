"""Nested rules: exact for polynomials, and no value of the integrand is needed twice."""

from __future__ import annotations

import numpy as np
import pytest
import reference

from lens_lora.integrals.nested_rules import (
    clenshaw_curtis,
    nested_counts,
    new_nodes,
    new_patterson_nodes,
    patterson,
    patterson_counts,
)


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


def test_rules_put_together_from_new_nodes_are_the_rules():
    """Each node is new once, and the new nodes' sums up to a rule add up to that rule's."""
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


@pytest.mark.parametrize("nodes", [1, 3, 7, 15, 31, 63])
def test_patterson_s_rules_are_of_their_degree(nodes: int):
    """∫₀¹ ε^d dε = 1/(d + 1) for d ≤ ⌊(3N + 1)/2⌋; the rule of one node is Gauss's, d ≤ 1."""
    points, weights = patterson(nodes)
    assert (weights > 0).all()
    assert (points > 0).all()
    assert (points < 1).all()
    degree = (3 * nodes + 1) // 2 if nodes > 1 else 1
    for power in range(degree + 1):
        assert weights @ points**power == pytest.approx(1 / (power + 1), rel=1e-11)


@pytest.mark.parametrize("nodes", [1, 3, 7])
def test_patterson_s_rules_are_of_no_higher_degree(nodes: int):
    """The next even power is not integrated. With more nodes its error is below what rounding does.

    Every degree is odd. On [−1, 1], where rules are symmetric, an odd power is integrated anyway.
    """
    points, weights = patterson(nodes)
    degree = (3 * nodes + 1) // 2 if nodes > 1 else 1
    power = degree + 1
    error = weights @ points**power - 1 / (power + 1)
    assert abs(error) > 1e-9


def test_patterson_s_rules_hold_the_published_nodes():
    """On [−1, 1] three nodes are Gauss's, 0 and ±√0.6, and seven those of Patterson (1968)."""
    three, _ = patterson(3)
    seven, weights = patterson(7)
    assert 2 * three - 1 == pytest.approx([-(0.6**0.5), 0, 0.6**0.5], abs=1e-15)
    published_nodes = [0, 0.434243749346802558, 0.774596669241483377, 0.960491268708020283]
    assert 2 * seven[3:] - 1 == pytest.approx(published_nodes, abs=1e-14)
    published_weights = [0.450916538658474143, 0.401397414775962223, 0.268488089868333440]
    assert 2 * weights[3:6] == pytest.approx(published_weights, abs=1e-14)


def test_patterson_s_rules_put_together_from_new_nodes_are_the_rules():
    """Each node is new once, and the new nodes' sums up to a rule add up to that rule's."""
    counts = patterson_counts(100)
    assert counts == [1, 3, 7, 15, 31, 63]
    sums = np.zeros(len(counts))
    seen: list[float] = []
    for rule, nodes in enumerate(counts):
        points, weights = new_patterson_nodes(counts, rule)
        sums[rule:] += weights @ np.exp(3 * points)
        seen += points.tolist()
        all_points, all_weights = patterson(nodes)
        assert sorted(seen) == pytest.approx(all_points.tolist(), abs=1e-12)
        assert sums[rule] == pytest.approx(all_weights @ np.exp(3 * all_points), rel=1e-12)
    assert sums[3:] == pytest.approx(np.full(3, (np.exp(3) - 1) / 3), rel=1e-11)
