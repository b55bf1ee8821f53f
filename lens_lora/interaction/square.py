"""The split of an interaction among pairs of modules, by nested rules over the square of gates.

    P_GM = ∫₀¹ ∫₀¹ Σ_{l∈G, m∈M} H_lm(s, t) ds dt,      Σ_G Σ_M P_GM = I_ab

1. The share of a group of one adapter is the sum of its row or column of the parts. It is an
   integral along the group's own gate:

       Σ_M P_GM = ∫₀¹ Σ_{l∈G} [∂g/∂ε_l(s, 1) − ∂g/∂ε_l(s, 0)] ds

   Slopes are cheap, so finer and finer rules are used until the shares have settled and sum to
   I_ab, which the corners give exactly. That shows how many values each gate needs: the readout may
   bend sharply along one gate and hardly along the other.
2. A rule over the square has m values of s and n of t, each a rule of Patterson's
   (`integrals/nested_rules.py`): 3 × 3, 3 × 7, 7 × 31, …. They are nested, so a rule that is
   coarser along either axis costs nothing more.
3. Every row and every column of the parts has to sum to its share. While one does not, the rule is
   refined along one axis: the one along which halving the values changes the parts more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.core import Evaluations, Groups, Quadrature
from lens_lora.integrals.nested_rules import new_patterson_nodes, patterson_counts

# The largest number of values of a gate; finer rules are lost in rounding.
_MOST_VALUES = 63

_ByPrompt = Float[Tensor, " batch"]
_Parts = Float[Tensor, "batch group group"]
# A rule over the square: which of Patterson's rules it has along each of its axes.
_Rule = tuple[int, int]


class Bounds(NamedTuple):
    """The bounds on what the parts of an interaction may miss, by prompt, in the readout's units.

    Attributes:
        largest_shift: the largest |shift| of either adapter alone and of both together.
        tol: the tolerance, a share of the largest shift.
        floor: a bound on the error of the interaction from rounding.
    """

    largest_shift: _ByPrompt
    tol: float
    floor: _ByPrompt

    @property
    def asked(self) -> _ByPrompt:
        """The bound by the tolerance."""
        return self.tol * self.largest_shift

    @property
    def allowed(self) -> _ByPrompt:
        """The bound by the tolerance or by rounding, whichever is larger."""
        return torch.maximum(self.asked, self.floor)


class Split(NamedTuple):
    """The parts of one interaction by the last rule, with what they miss.

    Attributes:
        parts: P_GM.
        nodes: the number of values of each gate that the last rule has.
        missed: |I_ab − Σ parts|.
        missed_of_group: the most by which a row or a column of the parts misses its share.
        has_settled: whether the shares of the groups have settled along both gates.
    """

    parts: _Parts
    nodes: tuple[int, int]
    missed: _ByPrompt
    missed_of_group: _ByPrompt
    has_settled: bool

    @property
    def error(self) -> _ByPrompt:
        """The larger of `missed` and `missed_of_group`."""
        return torch.maximum(self.missed, self.missed_of_group)


def split_by_modules(
    g: Evaluations,
    of_first: Groups,
    of_second: Groups,
    interaction: _ByPrompt,
    allowed: _ByPrompt,
    max_nodes: int,
) -> Split:
    """The parts by the first rule that misses no more than is allowed, or by the last that fits.

    Cost: along each gate two forward and two backward passes at each of 3 to 63 values; at each
    node of the square a forward and a backward pass, and two backward passes for each group in
    which the second adapter has modules.

    Args:
        g: the function, with the sites of both adapters.
        of_first: the groups of modules of the first adapter.
        of_second: the groups of modules of the second adapter, under the same names.
        interaction: I_ab of each prompt.
        allowed: what the parts of each prompt may miss of it, and of the share of any group.
        max_nodes: the most nodes in the square, at least 9.
    """
    lens = g.lens
    first = lens.gates(lens.sites.indicator(of_first))
    second = lens.gates(lens.sites.indicator(of_second))
    rows = _shares(g, first, second, interaction, allowed)
    columns = _shares(g, second, first, interaction, allowed)
    rules = _Rules(g, first, second, max_nodes)
    rule = rules.within((rows.rule, columns.rule))
    while True:
        parts = rules.parts(rule)
        of_rows = (parts.sum(2) - rows.values).abs().amax(1)
        of_columns = (parts.sum(1) - columns.values).abs().amax(1)
        split = Split(
            parts,
            rules.nodes(rule),
            missed=(interaction - parts.flatten(1).sum(1)).abs(),
            missed_of_group=torch.maximum(of_rows, of_columns),
            has_settled=rows.has_settled and columns.has_settled,
        )
        finer = rules.refined(rule)
        if bool((split.error <= allowed).all()) or finer is None:
            return split
        rule = finer


class _Shares(NamedTuple):
    """The share of each group of one adapter in the interaction, from slopes along its own gate.

    Attributes:
        values: the shares by the finest rule.
        rule: the coarsest rule that gives these values within half of the allowed error.
        has_settled: whether the two finest rules agree within half of the allowed error.
    """

    values: Float[Tensor, "batch group"]
    rule: int
    has_settled: bool


def _shares(
    g: Evaluations,
    own: Float[Tensor, "group site"],
    other: Float[Tensor, "group site"],
    interaction: _ByPrompt,
    allowed: _ByPrompt,
) -> _Shares:
    """∫₀¹ Σ_{l∈G} [∂g/∂ε_l(s, 1) − ∂g/∂ε_l(s, 0)] ds of each group G of one adapter.

    Args:
        g: the function, with the sites of both adapters.
        own: the groups of the adapter whose gate is s.
        other: the groups of the other adapter.
        interaction: I_ab of each prompt, the sum of all shares.
        allowed: what the parts of each prompt may miss; the shares may miss half as much.
    """
    counts = patterson_counts(_MOST_VALUES)
    of_adapter = own.amax(0)
    of_other = other.amax(0)
    # The shares by each rule.
    sums = own.new_zeros(len(counts), g.prompts.batch, len(own))

    def suffices(rule: int, finest: int) -> bool:
        missed = _missed_of_shares(sums[finest], sums[rule], interaction)
        return bool((missed <= allowed / 2).all())

    has_settled = False
    finest = 0
    for finest in range(len(counts)):
        points, weights = new_patterson_nodes(counts, finest)
        along_gate = own.new_tensor(points)[:, None] * of_adapter
        at = torch.cat([along_gate + of_other, along_gate])
        of_rule = own.new_tensor(weights)
        slopes = g.slopes(at=at, weights=torch.cat([of_rule, -of_rule], 1))
        sums[finest:] += slopes.to(own) @ own.T
        has_settled = finest > 0 and suffices(finest - 1, finest)
        if has_settled:
            break
    # The rule of one node is never enough: a rule of the square has three values of each gate.
    coarsest = 1
    while coarsest < finest and not suffices(coarsest, finest):
        coarsest += 1
    return _Shares(sums[finest], coarsest, has_settled)


def _missed_of_shares(
    finest: Float[Tensor, "batch group"],
    values: Float[Tensor, "batch group"],
    interaction: _ByPrompt,
) -> _ByPrompt:
    """The larger of two errors: of a share, from the finest rule, and of the sum, from I_ab."""
    change = (finest - values).abs().amax(1)
    return torch.maximum(change, (interaction - values.sum(1)).abs())


class _Rules:
    """The parts by any rule over the square; each node is evaluated once, when it is needed."""

    def __init__(
        self,
        g: Evaluations,
        first: Float[Tensor, "group site"],
        second: Float[Tensor, "group site"],
        max_nodes: int,
    ) -> None:
        self._g = g
        self._first = first
        self._second = second
        self._max_nodes = max_nodes
        self._counts = patterson_counts(_MOST_VALUES)
        self._evaluated: set[_Rule] = set()
        self._sums: dict[_Rule, _Parts] = {}

    def nodes(self, rule: _Rule) -> tuple[int, int]:
        """The number of values of each gate that a rule has."""
        first, second = rule
        return self._counts[first], self._counts[second]

    def parts(self, rule: _Rule) -> _Parts:
        """The parts by a rule; nodes that no rule has evaluated before are evaluated now."""
        first, second = rule
        # A block is what is new in a rule: the nodes that it adds along both axes.
        for block in itertools.product(range(first + 1), range(second + 1)):
            if block not in self._evaluated:
                self._evaluated.add(block)
                self._evaluate(block)
        return self._sums[rule]

    def within(self, rule: _Rule) -> _Rule:
        """The rule, or the first coarser one that fits if it has too many nodes."""
        first, second = rule
        while not self._fits((first, second)):
            if first > second:
                first -= 1
            else:
                second -= 1
        return first, second

    def refined(self, rule: _Rule) -> _Rule | None:
        """The next rule, finer along the axis of larger change; None if none fits."""
        first, second = rule
        candidates = [(first + 1, second), (first, second + 1)]
        change_along_first = (self._sums[rule] - self._sums[first - 1, second]).abs().max()
        change_along_second = (self._sums[rule] - self._sums[first, second - 1]).abs().max()
        if change_along_second > change_along_first:
            candidates.reverse()
        for candidate in candidates:
            if self._fits(candidate):
                return candidate
        return None

    def _fits(self, rule: _Rule) -> bool:
        if max(rule) >= len(self._counts):
            return False
        first, second = self.nodes(rule)
        return first * second <= self._max_nodes

    def _rules_with(self, block: _Rule) -> list[_Rule]:
        """The rules that have the nodes of a block: those at least as fine along both axes."""
        along_s, along_t = block
        count = len(self._counts)
        at_least_as_fine = itertools.product(range(along_s, count), range(along_t, count))
        return [rule for rule in at_least_as_fine if self._fits(rule)]

    def _evaluate(self, block: _Rule) -> None:
        """Add the nodes that are new along both axes to the sums of every rule that has them."""
        along_s, along_t = block
        s_points, s_weights = new_patterson_nodes(self._counts, along_s)
        t_points, t_weights = new_patterson_nodes(self._counts, along_t)
        first = self._first
        second = self._second
        rules_with_block = self._rules_with(block)
        for rule in rules_with_block:
            if rule not in self._sums:
                self._sums[rule] = first.new_zeros(self._g.prompts.batch, len(first), len(second))
        # A group in which the second adapter has no module needs no product. If the readout is
        # inside the model, all modules of the second adapter may come after it.
        is_there = second.any(1)
        if not bool(is_there.any()):
            return
        nodes = list(itertools.product(range(len(s_points)), range(len(t_points))))
        gates: list[Tensor] = []
        for i, j in nodes:
            of_first = float(s_points[i]) * first.amax(0)
            of_second = float(t_points[j]) * second.amax(0)
            gates.append(of_first + of_second)
        products = self._g.curvature(second[is_there], torch.stack(gates))
        at_nodes = torch.einsum("nmbs,gs->nbgm", products, first)
        for rule in rules_with_block:
            s_rule, t_rule = rule
            # Row 0 of the weights is that of the rule which adds these nodes.
            s_weights_of_rule = s_weights[s_rule - along_s]
            t_weights_of_rule = t_weights[t_rule - along_t]
            for (i, j), at_node in zip(nodes, at_nodes, strict=True):
                weight = float(s_weights_of_rule[i] * t_weights_of_rule[j])
                self._sums[rule][:, :, is_there] += weight * at_node


# --- In words


def quadrature_of(
    splits: Sequence[Split], bounds: Sequence[Bounds], pairs: Sequence[str], dtype: str
) -> Quadrature:
    """Describe how the interactions were split: nodes, errors, and what kept them from `tol`.

    Args:
        splits: the split of each pair of adapters.
        bounds: the bounds of each pair of adapters.
        pairs: the name of each pair of adapters.
        dtype: the precision, in words.
    """
    errors: list[float] = []
    of_groups: list[float] = []
    notes: list[str] = []
    is_met = True
    for split, bound, pair in zip(splits, bounds, pairs, strict=True):
        errors.append(_largest_share(split.missed, bound))
        of_groups.append(_largest_share(split.missed_of_group, bound))
        known_error = torch.maximum(split.error, bound.floor)
        is_met = is_met and bool((known_error <= bound.asked).all())
        notes.append(_rounding_text(bound, pair, dtype))
        notes.append(_shape_text(split, bound, pair))
    return Quadrature(
        nodes=max(math.prod(split.nodes) for split in splits),
        tol=bounds[0].tol,
        error=max(errors),
        site_change=max(of_groups),
        met=is_met,
        note="; ".join(filter(None, notes)),
    )


def _rounding_text(bound: Bounds, pair: str, dtype: str) -> str:
    """A note if rounding hides the interaction at this tolerance, else ''."""
    is_hidden: Bool[Tensor, " batch"] = bound.floor > bound.asked
    if not is_hidden.any():
        return ""
    i = int(_share(bound.floor, bound).argmax())
    return (
        f"rounding in {dtype}: the interaction of {pair} on prompt {i} is known to "
        f"±{bound.floor[i]:.1g} (three noise floors), which is more than the tolerance, so what "
        "the parts miss cannot be measured to it"
    )


def _shape_text(split: Split, bound: Bounds, pair: str) -> str:
    """A note on the shape of g if the parts miss more than rounding and tolerance, else ''."""
    is_open = split.error > bound.allowed
    if not is_open.any():
        return ""
    share = _share(split.error, bound)
    i = int(torch.where(is_open, share, -1.0).argmax())
    missed = (
        f"with {split.nodes[0]} × {split.nodes[1]} nodes the parts of {pair} on prompt {i} miss "
        f"{split.missed[i]:.2g} of the interaction, and up to {split.missed_of_group[i]:.2g} of "
        "what one group has of it"
    )
    if split.has_settled:
        return f"{missed}: raise max_nodes"
    return (
        f"{missed}; {_MOST_VALUES} values along one gate alone do not suffice: g is probably not "
        "smooth between the adapters (kinks of ReLU, experts that switch) or bends sharply, and "
        "the parts are an indication"
    )


def _largest_share(size: _ByPrompt, bound: Bounds) -> float:
    return float(_share(size, bound).max())


def _share(size: _ByPrompt, bound: Bounds) -> _ByPrompt:
    """The size over the largest shift: zero if it is zero, infinite if only the shift is zero."""
    return torch.where(size == 0, 0.0, size / bound.largest_shift)
