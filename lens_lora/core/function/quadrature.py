"""Nested rules for an integral over [0, 1] whose integrand is expensive.

    ∫₀¹ f(ε) dε ≈ Σ_j w_j f(ε_j),      ε_j = (1 − cos(π j / n)) / 2,  j = 0 … n

1. This is the Clenshaw–Curtis rule of n + 1 nodes: it integrates the polynomial through its nodes.
   Of an analytic f its error falls geometrically with n, as that of a Gauss–Legendre rule does.
2. With n = 2, 4, 8, … the nodes of each rule are nodes of the next. So a rule of 9 nodes costs 9
   evaluations, with the rules of 3 and 5 nodes on the way; Gauss–Legendre's rules of 2, 4 and 8
   nodes share none and cost 14.
3. The first and the last node are the ends of the path, 0 and 1.

Source: Clenshaw and Curtis, 1960; its weights as in Waldvogel, 2006, equation (2.4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def nested_counts(max_nodes: int) -> list[int]:
    """How many nodes each rule has, 3, 5, 9, 17, …, with at most `max_nodes` in the last.

    Args:
        max_nodes: at least 3.
    """
    counts = [3]
    while 2 * counts[-1] - 1 <= max_nodes:
        counts.append(2 * counts[-1] - 1)
    return counts


def clenshaw_curtis(nodes: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The points of a rule on [0, 1], from 0 to 1, and their weights.

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
    return (1 - np.cos(angles)) / 2, weights / (2 * n)


def new_nodes(counts: Sequence[int], rule: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The points that a rule adds to the one before it, and their weights in each rule from it on.

    A sum for each rule therefore needs no value of f twice, and no value of f kept:

        for rule in range(len(counts)):
            points, weights = new_nodes(counts, rule)
            sums[rule:] += weights @ f(points)
            integral = sums[rule]

    Args:
        counts: how many nodes each rule has, from `nested_counts`.
        rule: the index of the rule.

    Returns:
        The points [node], and the weights [rule, node] in this rule and those after it.
    """
    points, _ = clenshaw_curtis(counts[rule])
    is_new = np.ones(len(points), dtype=bool)
    if rule > 0:
        is_new[::2] = False
    weights: list[NDArray[np.float64]] = []
    for doublings, count in enumerate(counts[rule:]):
        _, of_every_node = clenshaw_curtis(count)
        of_shared_nodes = of_every_node[:: 2**doublings]
        weights.append(of_shared_nodes[is_new])
    return points[is_new], np.stack(weights)
