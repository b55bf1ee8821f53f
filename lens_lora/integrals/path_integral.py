"""An integral along the path from the base to the adapted model, by nested rules.

    ∫₀¹ h(ε) dε, where the values of h sum over sites to dg(ε·1)/dε, so that they sum to the shift

1. Rules of 3, 5, 9, 17, … nodes are nested (`nested_rules.py`), so the last one costs
   as many evaluations of h as it has nodes. Its first and last node are the base and the adapted
   model; where h gives g as well, they give the exact shift.
2. The difference between the sum and the exact shift is the completeness error. Nodes are added
   until it is at most `tol` of every prompt's shift, or within the rounding of that shift.
3. Errors of single sites can cancel in that sum. So at least two rules are computed, and the
   largest change of any site's value from one rule to the next is reported beside the completeness
   error. If neither of the two has improved over two further rules, more nodes do not help.
4. A `KL` has its minimum at the base, where h is zero, so that node is not evaluated.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.arguments import number, whole
from lens_lora.core import SIGMAS, Function, Quadrature
from lens_lora.errors import ArgumentError
from lens_lora.integrals.nested_rules import nested_counts, new_nodes

# The last rule has at least this many nodes: two rules show how far single sites still move.
_FEWEST_NODES = 5
# For a smooth g each further rule divides the error by more than this.
_SMOOTH = 4.0

_ByPrompt = Float[Tensor, " batch"]
# A function of new nodes and their weights in this and each later rule; it returns what these nodes
# add to the sum of each rule.
Added = Callable[
    [Float[Tensor, " node"], Float[Tensor, "sum node"]], Float[Tensor, "sum batch site *part"]
]


def path_integral(
    g: Function, added: Added, *, tol: float, max_nodes: int
) -> tuple[Float[Tensor, "batch site *part"], Quadrature]:
    """∫₀¹ h(ε) dε of every site and part, and how it was computed.

    Cost: an evaluation of h for each node of the last rule, and eight forward passes for the noise
    floor of the shift. At most six results are held, however many nodes there are.

    Args:
        g: the function whose path is integrated.
        added: computes Σ_k w_k h(ε_k) for each row of weights.
        tol: the completeness error allowed for every prompt, as a share of its shift.
        max_nodes: the largest number of nodes of a rule, at least 5.

    Raises:
        ArgumentError: tol or max_nodes out of range.
    """
    tol = number("tol", tol)
    max_nodes = whole("max_nodes", max_nodes, _FEWEST_NODES)
    if tol <= 0:
        raise ArgumentError(f"tol={tol}: expected a positive share of the shift, such as 1e-3.")
    counts = nested_counts(max_nodes)
    rules = _Rules(g, tol)
    sums: Tensor = g.lens.gates(0.0).new_zeros(())
    nodes = 0
    with tqdm(desc="path integral", unit=" node", leave=False, disable=not g.progress) as bar:
        for rule, nodes in enumerate(counts):
            points, weights = _new_nodes(g, counts, rule)
            of_new_nodes = added(points, weights)
            # One sum for this rule, and one for each later rule.
            sums = of_new_nodes if rule == 0 else sums[1:] + of_new_nodes
            rules.add(sums[0])
            bar.total = nodes
            bar.update(nodes - bar.n)
            if rules.is_final:
                break
    return sums[0], rules.quadrature(nodes)


def _new_nodes(
    g: Function, counts: Sequence[int], rule: int
) -> tuple[Float[Tensor, " node"], Float[Tensor, "sum node"]]:
    """The nodes that a rule adds, and their weights in its own sum and in those of later rules."""
    points, weights = new_nodes(counts, rule)
    if rule == 0 and _is_flat_at_base(g):
        points = points[1:]
        weights = weights[:, 1:]
    like = g.lens.gates(0.0)
    return like.new_tensor(points), like.new_tensor(weights)


def _is_flat_at_base(g: Function) -> bool:
    """Whether every slope at the base is zero, as it is for a divergence from the base."""
    return g.readout is not None and bool(g.readout.no_slope_at_base)


class _Rules:
    """The errors of each rule so far, and whether a further rule is worth its cost."""

    def __init__(self, g: Function, tol: float) -> None:
        self._g = g
        self._tol = tol
        self._dtype: str = g.lens.describe()["dtype"]
        self._errors: list[_ByPrompt] = []
        self._sites: list[Float[Tensor, "batch site"]] = []

    # Both are first read after the first rule, whose passes give g at both ends.

    @functools.cached_property
    def _shift(self) -> _ByPrompt:
        """The exact shift g(1) − g(0)."""
        return self._g.shift

    @functools.cached_property
    def _floor(self) -> _ByPrompt:
        """A bound on the error of the shift from rounding: three noise floors."""
        return (SIGMAS * self._g.floor).cpu().double()

    @property
    def _size(self) -> _ByPrompt:
        return self._shift.abs().cpu().double()

    @property
    def _allowed(self) -> _ByPrompt:
        return self._tol * self._size

    def add(self, values: Float[Tensor, "batch site *by"]) -> None:
        """Add the values of the next rule."""
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
        """Describe the last rule: its nodes, its errors, and what kept it from the tolerance.

        Args:
            nodes: the number of nodes of that rule.
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
        """A note if rounding hides the exact shift at this tolerance, else ''."""
        if not (self._floor > self._allowed).any():
            return ""
        i = int(_share(self._floor, self._size).argmax())
        return (
            f"rounding in {self._dtype}: the shift of prompt {i}, {self._size[i]:.2g} in size, is "
            f"known to ±{self._floor[i]:.1g} (three noise floors), which is more than the "
            "tolerance, so completeness cannot be measured to it"
        )

    def _shape_text(self, nodes: int) -> str:
        """A note on the shape of g if the error is above rounding and tolerance, else ''."""
        if not self._is_open.any():
            return ""
        share = _share(self._errors[-1], self._size)
        i = int(torch.where(self._is_open, share, -1.0).argmax())
        missing = f"{share[i]:.2g} of the shift of prompt {i} is missing at {nodes} nodes"
        last_rules = [float(errors[i]) for errors in self._errors[-3:]]
        further_rules = len(last_rules) - 1
        if last_rules[-1] * _SMOOTH**further_rules < last_rules[0]:
            return f"{missing}, and falling fast: raise max_nodes"
        return (
            f"{missing}, and hardly falls as they double: g is probably not smooth along the path "
            "(kinks of ReLU, experts that switch) or bends sharply; more nodes help slowly"
        )


def _share(size: _ByPrompt, whole: _ByPrompt) -> _ByPrompt:
    """The size over the whole: zero if the size is zero, infinite if only the whole is zero."""
    return torch.where(size == 0, 0.0, size / whole)


def _is_stuck(by_rule: list[_ByPrompt]) -> Bool[Tensor, " *batch"]:
    """Whether both of the last two rules are no better than the best rule before them."""
    if len(by_rule) < 3:
        return torch.tensor(False)
    numbers = torch.stack(by_rule)
    return numbers[-2:].amin(0) >= numbers[:-2].amin(0)
