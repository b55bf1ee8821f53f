"""The complete attribution: each site's slope, integrated along the path from base to adapted.

    c_l = ∫₀¹ ∂g/∂ε_l(ε·1) dε,      Σ_l c_l = g(1) − g(0), for dg(ε·1)/dε = Σ_l ∂g/∂ε_l

1. A Gauss–Legendre rule of K nodes takes each integral: c_l ≈ Σ_k w_k ∂g/∂ε_l(ε_k·1). The nodes
   ride in rows of the batch, and their weighted slopes are summed as they come.
2. What Σ c_l leaves of the exact shift is the completeness error. K = 2, 4, 8, … until it is at
   most `tol` of every prompt's shift, or within the rounding of that shift.
3. Errors of single sites can cancel in that sum. So at least two rules are taken, and the largest
   change of any site's value from one rule to the next stands beside the completeness error. When
   neither of the two has improved over two doublings, more nodes do not help.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lens_lora.arguments import number, whole
from lens_lora.core import SIGMAS, Attribution, Function, Quadrature, analysis, by_axes
from lens_lora.errors import ArgumentError

_FIRST_NODES = 2
# For a smooth g a doubling of the nodes divides the error by more than this.
_SMOOTH = 4.0

_ByPrompt = Float[Tensor, " batch"]


@analysis
def path_attribution(
    g: Function, *, tol: float = 1e-3, by: tuple[str, ...] | str = (), max_nodes: int = 64
) -> Attribution:
    """The integral c_l of every site, split as asked; over all sites it sums to the shift.

    Where the tolerance cannot be met (rounding, kinks of ReLU models, experts that switch) the
    values are those of the last rule, and `quadrature` says what was reached and probably why.

    Cost: one forward and one backward per node, 2K − 2 nodes in all for a last rule of K; twelve
    forward passes for the exact shift and its noise floor. Memory does not grow with K.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        tol: the completeness error allowed to every prompt, as a share of its shift.
        by: any of 'position', 'head', 'expert', 'rank'.
        max_nodes: most nodes of a rule; the last rule has 4, 8, 16, … of them.
        progress: show a bar.

    Returns:
        Attribution with values [batch, site, *by] in the readout's units, method 'path', `at` NaN
        (a path has no single gate value), and its `quadrature`.

    Raises:
        ArgumentError: tol or max_nodes out of range, or an unknown axis.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: non-finite derivatives, naming the site.
    """
    tol = number("tol", tol)
    max_nodes = whole("max_nodes", max_nodes, 2 * _FIRST_NODES)
    if tol <= 0:
        raise ArgumentError(f"tol={tol}: expected a positive share of the shift, such as 1e-3.")
    axes = by_axes(by)
    rules = _Rules(g, tol)
    nodes = _FIRST_NODES
    with tqdm(desc="path integral", unit="node", leave=False, disable=not g.progress) as bar:
        while True:
            bar.reset(total=nodes)
            values = _integral(g, nodes, axes)
            rules.add(values)
            bar.update(nodes)
            if rules.is_final or 2 * nodes > max_nodes:
                break
            nodes *= 2
    quadrature = rules.quadrature(nodes)
    return Attribution.of(g, values, axes, method="path", at=math.nan, quadrature=quadrature)


def _integral(g: Function, nodes: int, axes: tuple[str, ...]) -> Float[Tensor, "batch site *by"]:
    """Σ_k w_k ∂g/∂ε_l(ε_k·1), by the rule with this many nodes on [0, 1]."""
    points, weights = _gauss_legendre(nodes)
    adapted = g.lens.gates(1.0)
    strengths = adapted.new_tensor(points)
    return g.slopes(strengths[:, None] * adapted, axes, weights=adapted.new_tensor(weights))


def _gauss_legendre(nodes: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points and weights on [0, 1]: exact for polynomials up to degree 2·nodes − 1."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return (points + 1) / 2, weights / 2


class _Rules:
    """The errors of one rule after the other, and whether a further rule is worth its cost."""

    def __init__(self, g: Function, tol: float) -> None:
        self._floor: _ByPrompt = (SIGMAS * g.floor).cpu().double()
        self._shift: _ByPrompt = g.shift
        self._size: _ByPrompt = self._shift.abs().cpu().double()
        self._tol = tol
        self._allowed: _ByPrompt = tol * self._size
        self._dtype: str = g.lens.describe()["dtype"]
        self._errors: list[_ByPrompt] = []
        self._sites: list[Float[Tensor, "batch site"]] = []

    def add(self, values: Float[Tensor, "batch site *by"]) -> None:
        """Take the values of the next rule, which has twice the nodes."""
        of_sites = values if values.ndim == 2 else values.flatten(2).sum(2)
        missing = self._shift - of_sites.sum(1)
        self._errors.append(missing.abs().cpu().double())
        self._sites.append(of_sites)

    @property
    def _changes(self) -> list[_ByPrompt]:
        """The largest change of any site's value from each rule to the next."""
        changes = [after - before for before, after in itertools.pairwise(self._sites)]
        return [change.abs().amax(1).cpu().double() for change in changes]

    @property
    def is_final(self) -> bool:
        """Whether a further rule would help no prompt; never before the second rule."""
        if len(self._errors) < 2:
            return False
        is_stuck = _is_stuck(self._errors) & _is_stuck(self._changes)
        return bool((is_stuck | ~self._is_open).all())

    @property
    def _is_open(self) -> Bool[Tensor, " batch"]:
        """Whether the error is neither within the tolerance nor within rounding."""
        return self._errors[-1] > torch.maximum(self._allowed, self._floor)

    def quadrature(self, nodes: int) -> Quadrature:
        """How the integral was taken, and how far it was reached, by the last rule.

        Args:
            nodes: how many nodes that rule has.
        """
        obstacles = [self._rounding_text(), self._shape_text(nodes)]
        known_error = torch.maximum(self._errors[-1], self._floor)
        return Quadrature(
            nodes=nodes,
            tol=self._tol,
            error=float(_share(self._errors[-1], self._size).max()),
            site_change=float(_share(self._changes[-1], self._size).max()),
            met=bool((known_error <= self._allowed).all()),
            note="; ".join(filter(None, obstacles)),
        )

    def _rounding_text(self) -> str:
        """A note where the exact shift is itself not known to the tolerance; else nothing."""
        if not (self._floor > self._allowed).any():
            return ""
        i = int(_share(self._floor, self._size).argmax())
        return (
            f"rounding in {self._dtype}: the shift of prompt {i}, {self._size[i]:.2g} in size, is "
            f"known to ±{self._floor[i]:.1g} (three noise floors), which is more than the "
            "tolerance, so completeness cannot be measured to it"
        )

    def _shape_text(self, nodes: int) -> str:
        """A note on the shape of g, where the error is above rounding and tolerance."""
        if not self._is_open.any():
            return ""
        share = _share(self._errors[-1], self._size)
        i = int(torch.where(self._is_open, share, -1.0).argmax())
        missing = f"{share[i]:.2g} of the shift of prompt {i} is missing at {nodes} nodes"
        last_rules = [float(errors[i]) for errors in self._errors[-3:]]
        doublings = len(last_rules) - 1
        if last_rules[-1] * _SMOOTH**doublings < last_rules[0]:
            return f"{missing}, and falling fast: raise max_nodes"
        return (
            f"{missing}, and hardly falls as they double: g is probably not smooth along the path "
            "(kinks of ReLU, experts that switch) or bends sharply; more nodes help slowly"
        )


def _share(size: _ByPrompt, whole: _ByPrompt) -> _ByPrompt:
    """The size over the whole; zero where the size is, infinite where only the whole is zero."""
    return torch.where(size == 0, 0.0, size / whole)


def _is_stuck(by_rule: list[_ByPrompt]) -> Bool[Tensor, " *batch"]:
    """Whether the last two rules have no smaller number than the best rule before them."""
    if len(by_rule) < 3:
        return torch.tensor(False)
    numbers = torch.stack(by_rule)
    return numbers[-2:].amin(0) >= numbers[:-2].amin(0)
