"""The complete attribution: each site's slope, integrated along the path from base to adapted.

    c_l = ∫₀¹ ∂g/∂ε_l(ε·1) dε,      Σ_l c_l = g(1) − g(0), for dg(ε·1)/dε = Σ_l ∂g/∂ε_l

1. A Gauss–Legendre rule of K nodes takes each integral; the nodes ride in rows of the batch, a few
   hundred tokens at a time, and their weighted slopes are summed as they come.
2. What Σ c_l leaves of the exact shift is the completeness error. K = 2, 4, 8, … until it is at
   most `tol` of every prompt's shift, or within the rounding of that shift.
3. Errors of single sites can cancel in that sum. So two rules at least are taken, and the largest
   change of any site's value from one to the next stands beside the completeness error. When
   neither has improved over two doublings, more nodes do not help.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.arguments import number, whole
from lens_lora.core import (
    Attribution,
    LoraLens,
    PromptsLike,
    Reading,
    Readout,
    alone,
    by_axes,
)
from lens_lora.core.analyses.first_order import labelled
from lens_lora.core.function.asked import Asked, ask
from lens_lora.core.function.memory import graph_groups, slopes_at_once
from lens_lora.core.function.reverse import joined, require_finite_sites, site_slopes
from lens_lora.core.results import base as results_base
from lens_lora.core.results.attribution import Quadrature
from lens_lora.errors import ArgumentError

_SMOOTH = 4.0  # A doubling that divides the error by less is slower than a smooth g allows.
# For a page, whose tables show two digits: 8 nodes left 1e-5 of a margin's shift, 3e-4 of a KL's.
COARSE_TOL, COARSE_NODES = 1e-2, 16


@alone
def path_attribution(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    *,
    tol: float = 1e-3,
    by: tuple[str, ...] | str = (),
    max_nodes: int = 64,
    progress: bool = True,
) -> Attribution:
    """c_l of every site, split by position, head, expert and rank as asked: they sum to the shift.

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
    tol, max_nodes = number("tol", tol), whole("max_nodes", max_nodes, 4)
    if tol <= 0:
        raise ArgumentError(f"tol={tol}: expected a positive share of the shift, such as 1e-3.")
    return path_attribution_of(ask(lens, prompts, readout), by_axes(by), tol, max_nodes, progress)


def path_attribution_of(
    asked: Asked,
    axes: tuple[str, ...] = (),
    tol: float = COARSE_TOL,
    max_nodes: int = COARSE_NODES,
    progress: bool = True,
) -> Attribution:
    """Rules of 2, 4, 8, … nodes, until one meets `tol` or the next would have too many."""
    trail, nodes = _Trail(asked, tol), 2
    with tqdm(desc="path integral", unit="node", leave=False, disable=not progress) as bar:
        while True:
            values = _integral(asked.lens, asked.reading, axes, nodes, bar)
            path = labelled(asked, values, axes, method="path", at=math.nan)
            trail.add(path)
            if trail.is_final or 2 * nodes > max_nodes:
                break
            nodes *= 2
    return dataclasses.replace(path, quadrature=trail.quadrature(nodes))


def _integral(
    lens: LoraLens, reading: Reading, axes: tuple[str, ...], nodes: int, bar: tqdm
) -> Float[Tensor, "batch site *by"]:
    """Σ_k w_k ∂g/∂ε_l(ε_k·1), by the rule with this many nodes on [0, 1].

    Prompts whose graph is beyond the bound of the lens are run in groups, each through all nodes.
    """
    groups = graph_groups(lens, reading)
    bar.reset(total=nodes * len(groups))
    integrals = [_integral_of_group(lens, group, axes, nodes, bar) for group in groups]
    total = joined(integrals)
    require_finite_sites(lens, total)
    return total


def _integral_of_group(
    lens: LoraLens, reading: Reading, axes: tuple[str, ...], nodes: int, bar: tqdm
) -> Float[Tensor, "some site *by"]:
    """As many nodes at a time as fit beside one another in rows of one batch."""
    adapted = lens.gates(1.0)
    total = adapted.new_zeros(())
    points, weights = map(adapted.new_tensor, _gauss_legendre(nodes))
    step = slopes_at_once(lens, reading)
    for scales, weight in zip(points.split(step), weights.split(step), strict=True):
        many, rows = reading.repeat(len(scales)), scales.repeat(len(reading.owner))
        slopes = site_slopes(lens, many, rows[:, None] * adapted, axes)
        by_node = slopes.unflatten(0, (reading.batch, -1))
        total = total + torch.einsum("bk...,k->b...", by_node, weight)
        bar.update(len(scales))
    return total


def _gauss_legendre(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights on [0, 1]: exact for polynomials up to degree 2·nodes − 1."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return (points + 1) / 2, weights / 2


class _Trail:
    """The errors of one rule after the other, and whether a further rule is worth its cost."""

    def __init__(self, asked: Asked, tol: float) -> None:
        self._floor = (results_base.SIGMAS * asked.noise_floor).cpu().double()
        self._shift = (asked.ends[1] - asked.ends[0]).abs().cpu().double()
        self._tol, self._allowed = tol, tol * self._shift
        self._dtype = asked.lens.describe()["dtype"]
        self._errors: list[Tensor] = []
        self._sites: list[Tensor] = []

    def add(self, rule: Attribution) -> None:
        """The next rule, of twice the nodes."""
        self._errors.append(rule.completeness_error.cpu().double())
        self._sites.append(rule.per_site)

    @property
    def _changes(self) -> list[Tensor]:
        """[batch], the largest change of any site's value from each rule to the next."""
        moved = (after - before for before, after in itertools.pairwise(self._sites))
        return [change.abs().amax(1).cpu().double() for change in moved]

    @property
    def is_final(self) -> bool:
        """Whether a further rule would help no prompt; never before the second rule."""
        if len(self._errors) < 2:
            return False
        stuck = _is_stuck(self._errors) & _is_stuck(self._changes)
        return bool((stuck | ~self._open).all())

    @property
    def _open(self) -> Tensor:
        """[batch] bool: neither within the tolerance nor within rounding."""
        return self._errors[-1] > torch.maximum(self._allowed, self._floor)

    def quadrature(self, nodes: int) -> Quadrature:
        """What was reached with the last rule."""
        return Quadrature(
            nodes=nodes,
            tol=self._tol,
            error=float(_share(self._errors[-1], self._shift).max()),
            site_change=float(_share(self._changes[-1], self._shift).max()),
            met=bool((torch.maximum(self._errors[-1], self._floor) <= self._allowed).all()),
            note="; ".join(filter(None, [self._on_rounding(), self._on_shape(nodes)])),
        )

    def _on_rounding(self) -> str:
        """Where the exact shift is itself not known to the tolerance."""
        if not (self._floor > self._allowed).any():
            return ""
        i = int(_share(self._floor, self._shift).argmax())
        return (
            f"rounding in {self._dtype}: the shift of prompt {i}, {self._shift[i]:.2g} in size, is "
            f"known to ±{self._floor[i]:.1g} (three noise floors), which is more than the "
            "tolerance, so completeness cannot be measured to it"
        )

    def _on_shape(self, nodes: int) -> str:
        """Where the error is above rounding and tolerance: what its fall says of g."""
        if not self._open.any():
            return ""
        share = _share(self._errors[-1], self._shift)
        i = int(torch.where(self._open, share, -torch.ones_like(share)).argmax())
        # Of up to three rules, the first and the last.
        before, *between, now = (float(errors[i]) for errors in self._errors[-3:])
        missing = f"{share[i]:.2g} of the shift of prompt {i} is missing at {nodes} nodes"
        if now * _SMOOTH ** (1 + len(between)) < before:
            return f"{missing}, and falling fast: raise max_nodes"
        return (
            f"{missing}, and hardly falls as they double: g is probably not smooth along the path "
            "(kinks of ReLU, experts that switch) or bends sharply; more nodes help slowly"
        )


def _share(size: Float[Tensor, " batch"], unit: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """size / unit; zero where the size is, infinite where only the unit is zero."""
    return torch.where(size == 0, torch.zeros_like(size), size / unit)


def _is_stuck(past: list[Tensor]) -> Tensor:
    """[batch] bool: the last two entries are no better than the best before them."""
    if len(past) < 3:
        return torch.tensor(False)
    rules = torch.stack(past)
    return rules[-2:].amin(0) >= rules[:-2].amin(0)
