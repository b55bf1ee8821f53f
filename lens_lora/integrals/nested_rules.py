"""Nested rules for an integral over [0, 1] whose integrand is expensive.

    ∫₀¹ f(ε) dε ≈ Σ_j w_j f(ε_j),      ε_j = (1 − cos(π j / n)) / 2,  j = 0 … n

1. This is the Clenshaw–Curtis rule of n + 1 nodes: it integrates the polynomial through its nodes.
   For an analytic f the error falls geometrically with n, as it does for a Gauss–Legendre rule.
2. With n = 2, 4, 8, … the nodes of each rule are nodes of the next. So a rule of 9 nodes costs 9
   evaluations, which also give the rules of 3 and 5 nodes. Gauss–Legendre rules of 2, 4 and 8 nodes
   share no node and cost 14.
3. The first and the last node are the ends of the path, 0 and 1.
4. If the values at the ends are not needed for anything else, as along the sides of a square,
   Patterson's rules of 1, 3, 7, 15, … nodes are used instead. They are nested as well: a rule adds
   n + 1 nodes, between and beside the n nodes that it has, which make it exact to the highest
   degree, ⌊(3N + 1)/2⌋ for N nodes. The rules of 1 and 3 nodes are Gauss–Legendre's.

Source: Clenshaw and Curtis, 1960; its weights as in Waldvogel, 2006, equation (2.4). Patterson,
Mathematics of Computation 22, 1968.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.polynomial import legendre
from numpy.typing import NDArray


class Rule(NamedTuple):
    """A rule on [0, 1]: Σ_j weight_j f(point_j).

    Attributes:
        points: the nodes, from the smallest to the largest.
        weights: the weight of each.
    """

    points: NDArray[np.float64]
    weights: NDArray[np.float64]


class NewNodes(NamedTuple):
    """The nodes that a rule adds to those of the rule before it.

    Attributes:
        points: [node], the new nodes.
        weights: [rule, node], their weights in this rule and in each later one.
    """

    points: NDArray[np.float64]
    weights: NDArray[np.float64]


def nested_counts(max_nodes: int) -> list[int]:
    """The numbers of nodes of the rules, 3, 5, 9, 17, …, up to `max_nodes`.

    Args:
        max_nodes: at least 3.
    """
    counts = [3]
    while 2 * counts[-1] - 1 <= max_nodes:
        counts.append(2 * counts[-1] - 1)
    return counts


def clenshaw_curtis(nodes: int) -> Rule:
    """The rule of so many nodes, which begin at 0 and end at 1.

    Args:
        nodes: an odd number, at least 3.
    """
    n = nodes - 1
    angles = math.pi * np.arange(nodes) / n
    weights = np.ones(nodes)
    for k in range(1, n // 2 + 1):
        # ∫ cos(2k θ) of each node, of which the highest is counted by half.
        factor = 1 if 2 * k == n else 2
        weights -= factor * np.cos(2 * k * angles) / (4 * k * k - 1)
    weights[1:-1] *= 2
    return Rule(points=(1 - np.cos(angles)) / 2, weights=weights / (2 * n))


def new_nodes(counts: Sequence[int], rule: int) -> NewNodes:
    """The points that a rule adds to the one before it, and their weights in each rule from it on.

    So no value of f is computed twice, and none has to be kept:

        for rule in range(len(counts)):
            points, weights = new_nodes(counts, rule)
            sums[rule:] += weights @ f(points)
            integral = sums[rule]

    Args:
        counts: how many nodes each rule has, from `nested_counts`.
        rule: the index of the rule.
    """
    points = clenshaw_curtis(counts[rule]).points
    is_new = np.ones(len(points), dtype=bool)
    if rule > 0:
        is_new[::2] = False
    weights: list[NDArray[np.float64]] = []
    for doublings, count in enumerate(counts[rule:]):
        of_every_node = clenshaw_curtis(count).weights
        of_shared_nodes = of_every_node[:: 2**doublings]
        weights.append(of_shared_nodes[is_new])
    return NewNodes(points[is_new], np.stack(weights))


# --- Without the ends

# Patterson's rules with more nodes than this are lost in rounding.
_MOST_OF_PATTERSON = 63


def patterson_counts(max_nodes: int) -> list[int]:
    """The numbers of nodes of the rules, 1, 3, 7, …, 63, up to `max_nodes`.

    Args:
        max_nodes: at least 1.
    """
    counts = [1]
    while 2 * counts[-1] + 1 <= min(max_nodes, _MOST_OF_PATTERSON):
        counts.append(2 * counts[-1] + 1)
    return counts


@functools.cache
def patterson(nodes: int) -> Rule:
    """The rule of so many nodes, which lie between 0 and 1.

    Args:
        nodes: 1, 3, 7, 15, ….
    """
    points = np.zeros(1)
    while len(points) < nodes:
        points = _with_points_between(points)
    # On [−1, 1] the rule integrates each Legendre polynomial: the constant to 2, the others to 0.
    integrals = np.zeros(nodes)
    integrals[0] = 2
    weights = np.linalg.solve(legendre.legvander(points, nodes - 1).T, integrals)
    return Rule(points=(points + 1) / 2, weights=weights / 2)


def _with_points_between(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """The n points of a rule on [−1, 1], with the n + 1 points that extend it, in rising order.

    These are the zeros of the polynomial E of degree n + 1 for which ∫ W E P_j dx = 0 for every
    Legendre polynomial P_j up to j = n, where W has its zeros at the given points.
    """
    n = len(points)
    # Integrands are of degree n + (n + 1) + n at most, which this rule integrates exactly.
    x, weights = legendre.leggauss(2 * n + 1)
    W = np.prod(x[:, None] - points, axis=1)
    P = legendre.legvander(x, n + 1)  # P[i, j] = P_j(x_i), for j = 0 … n + 1
    # E = P_{n+1} + Σ_k c_k P_k, so that Σ_k c_k ∫ W P_j P_k dx = − ∫ W P_j P_{n+1} dx.
    products = P[:, : n + 1].T @ ((weights * W)[:, None] * P)
    coefficients = np.linalg.solve(products[:, : n + 1], -products[:, n + 1])
    added = legendre.legroots([*coefficients, 1.0])
    return np.sort(np.concatenate([points, added.real]))


def new_patterson_nodes(counts: Sequence[int], rule: int) -> NewNodes:
    """The points that a rule adds to the one before, and their weights in each rule from it on.

    Args:
        counts: how many nodes each rule has, from `patterson_counts`.
        rule: the index of the rule.
    """
    points = patterson(counts[rule]).points
    # A rule adds the points between and beside those of the rule before: every second one.
    is_new = np.arange(counts[rule]) % 2 == 0
    weights: list[NDArray[np.float64]] = []
    for doublings, count in enumerate(counts[rule:]):
        of_every_node = patterson(count).weights
        step = 2**doublings
        of_shared_nodes = of_every_node[step - 1 :: step]
        weights.append(of_shared_nodes[is_new])
    return NewNodes(points[is_new], np.stack(weights))
