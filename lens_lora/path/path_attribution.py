"""From base to adapted model along ε·1: what first order leaves there, and its complete integral.

Remainder (`remainder`, `remainder_curve`):

    single site   u_yᵀ r_l = g(e_l) − g(0) − a_l                          (note, §3)
    all sites     R_y = g(1) − g(0) − Σ_l a_l                             (note, §4)
    the path      R_y(ε) = g(ε·1) − g(0) − ε Σ_l a_l = O(ε²)              (note, Assumption 2)

1. First order at ε = 0, the exact ends, and the exact g on the way; on request each site alone.
2. Noise floors say what of the shift, and what of the remainder, is rounding.
3. At ε = 1 the two may agree by coincidence, so the verdict also looks at ε = 0.25, 0.5 and 0.75:
   at the same strengths for every result, so that no two can disagree on one remainder.
4. Where a model routes tokens to experts, g jumps at strengths where a token changes them, which no
   derivative shows. So the tokens whose experts differ between the two ends are counted, by layer.
5. The order is the slope of log|R| on log ε, over the first decade of strengths at which R stands
   out of the noise: 2 for a smooth model.

Complete attribution (`path_attribution`): each site's slope, integrated along the path.

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
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from lens_lora.arguments import number, numbers_of, whole
from lens_lora.compat import Temporary, in_float64
from lens_lora.core import (
    Attribution,
    Drawn,
    Evaluations,
    Function,
    LoraLens,
    Measured,
    Prompts,
    PromptsLike,
    Reading,
    Readout,
    ScaleInject,
    alone,
    by_axes,
    evaluations,
    long_table,
)
from lens_lora.core.analyses import verdict as verdicts
from lens_lora.core.analyses.first_order import labelled
from lens_lora.core.analyses.verdict import CHECKPOINTS, points_of
from lens_lora.core.function.asked import Asked, ask
from lens_lora.core.function.forward import run_without_logits
from lens_lora.core.function.memory import graph_groups, pass_groups, slopes_at_once
from lens_lora.core.function.reverse import joined, require_finite_sites, site_slopes
from lens_lora.core.model.hooks import add_pre_hook
from lens_lora.core.model.kernels import experts_by_layer
from lens_lora.core.results import base as results_base
from lens_lora.core.results.attribution import Quadrature
from lens_lora.core.results.base import per_prompt, read_of
from lens_lora.errors import ArgumentError

# Small strengths for the order, even ones for the story: 0.0001 … 0.08, 0.1, 0.2, 0.25, … 1.
USUAL_SCALES = (
    *np.geomspace(1e-4, 8e-2, 10).tolist(),
    *sorted({*np.linspace(0.1, 1.0, 10).round(3).tolist(), *CHECKPOINTS}),
)


@final
class Remainder(Measured):
    """What first order leaves, against the exact shift, in the readout's units.

    Attributes:
        first_order: [batch], Σ_l a_l.
        noise: σ of a shift and of the remainder from rounding alone.
        path_scales: the ε on the way at which g was run.
        path_shift: [batch, scale], g(ε) − g(0) at each of them.
        site_first_order: [batch, site], a_l.
        site_shift: [batch, site], g(e_l) − g(0); only with by_site.
        rerouted: {'layer 3': [batch], the tokens that go to other experts at ε = 1 than at
            0}; empty where the model has no stacks of experts.
        sites, base, adapted, str_tokens, readout, units, meta: see `Measured`.
    """

    first_order: Float[Tensor, " batch"]
    noise: verdicts.Noise
    path_scales: Annotated[tuple[float, ...], "scale"]
    path_shift: Float[Tensor, "batch scale"]
    site_first_order: Float[Tensor, "batch site"]
    site_shift: Float[Tensor, "batch site"] | None
    rerouted: dict[str, Float[Tensor, " batch"]] = dataclasses.field(default_factory=dict)

    @property
    def remainder(self) -> Float[Tensor, " batch"]:
        """R_y."""
        return self.shift - self.first_order

    @property
    def noise_floor(self) -> Float[Tensor, " batch"]:
        """σ of the shift from rounding alone."""
        return self.noise.shift

    @property
    def remainder_floor(self) -> Float[Tensor, " batch"]:
        """σ of the remainder from rounding alone: of the shift's and of first order's."""
        return self.noise.of_remainder(1.0)

    @property
    def verdict(self) -> tuple[verdicts.Verdict, ...]:
        """For each prompt, how good first order is at ε = 1 and on the way; str() words it."""
        scales = self.path_shift.new_tensor(self.path_scales)
        path_remainder = self.path_shift - scales * self.first_order[:, None]
        ends = verdicts.points_at_end(self.remainder, self.shift, self.noise)
        ways = points_of(scales, path_remainder, self.path_shift, self.noise)
        return tuple(map(verdicts.verdict_of, ends, ways))

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt: shift, first order, remainder, both floors, the verdict's kind.

        With experts also `rerouted`, in how many layers' choices of a token one or more differ.
        """
        names = ("shift", "first_order", "remainder", "noise_floor", "remainder_floor")
        frame = pd.DataFrame(per_prompt({name: getattr(self, name) for name in names}))
        if self.rerouted:
            frame["rerouted"] = torch.stack(list(self.rerouted.values())).sum(0).int().tolist()
        return frame.assign(verdict=[verdict.kind for verdict in self.verdict])


@alone
def remainder(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    *,
    by_site: bool = False,
    progress: bool = True,
) -> Remainder:
    """R_y of all sites together and, with by_site, u_yᵀ r_l of each site alone.

    Cost: five forward and backward passes and 12 forward passes, batched, most of them for the
    noise floors; and one per site with by_site. Two more forward passes of a model with experts.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        by_site: also run each site alone.
        progress: show a bar.

    Raises:
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a readout or derivative that is not finite.
    """
    g = evaluations(lens, prompts, readout, progress=progress)
    g.require_slope_at_base()
    slopes = g.slopes_with_noise(along=CHECKPOINTS)
    path = g.along(CHECKPOINTS)
    base, _ = g.ends
    return Remainder(
        first_order=slopes.sum(1),
        noise=g.remainder_noise(slopes),
        path_scales=CHECKPOINTS,
        path_shift=(path - base).T,
        site_first_order=slopes,
        site_shift=(g.corners("add_one") - base).T if by_site else None,
        rerouted=rerouted_tokens(g),
        **g.header(),
    )


def rerouted_tokens(g: Function) -> dict[str, Float[Tensor, " batch"]]:
    """How many tokens of each prompt have other experts at ε = 1 than at 0, by layer of experts.

    Two forward passes; none where the model has no stacks of experts.
    """
    lens = g.lens
    stacks = experts_by_layer(lens.model)
    if not stacks:
        return {}
    counts: dict[str, list[Tensor]] = {f"layer {layer}": [] for layer in stacks}
    for group in pass_groups(lens, g.reading):
        rows = group.prompts
        real = rows.real.to(lens.device)
        base = _chosen(lens, rows, 0.0, stacks)
        adapted = _chosen(lens, rows, 1.0, stacks)
        for layer in stacks:
            is_other = (base[layer] != adapted[layer]).any(-1).view(real.shape)
            by_row = (is_other & real).sum(1).double()
            counts[f"layer {layer}"].append(group.by_prompt(by_row))
    return {layer: torch.cat(by_group) for layer, by_group in counts.items()}


def _chosen(
    lens: LoraLens, rows: Prompts, scale: float, stacks: Mapping[int, nn.Module]
) -> dict[int, Int[Tensor, "token slot"]]:
    """The experts of every token at this strength, in order."""
    chosen: dict[int, Tensor] = {}

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, layer: int) -> None:
        index = args[1] if len(args) > 1 else kwargs["top_k_index"]
        chosen[layer] = index.sort(-1).values

    def record(span: Temporary) -> None:
        for layer, module in stacks.items():
            add_pre_hook(span, module, functools.partial(keep, layer=layer), with_kwargs=True)

    inject = ScaleInject(lens.plan, lens.gates(scale))
    with torch.no_grad(), Temporary(record), lens.injected(inject):
        run_without_logits(lens, rows)
    return chosen


@final
class RemainderCurve(results_base.Read, Drawn):
    """g, first order and remainder along ε from 0 to 1, in the readout's units.

    `plot` is the readout and its first-order line along ε, and the remainder's share of the shift.

    Attributes:
        scales: [scale], the ε at which g was run.
        values: [batch, scale], g(ε·1), exact.
        base: [batch], g(0).
        slope: [batch], Σ_l a_l, the first-order shift per unit of ε.
        noise: σ of a shift and of the remainder from rounding alone.
        order: [batch], fitted slope of log|R| on log ε at small ε above the noise: 2 for a smooth
            model, NaN where fewer than three points stand out of the noise.
        str_tokens, readout, units, meta: see `Read`.
    """

    scales: Float[Tensor, " scale"]
    values: Float[Tensor, "batch scale"]
    base: Float[Tensor, " batch"]
    slope: Float[Tensor, " batch"]
    noise: verdicts.Noise
    order: Float[Tensor, " batch"]

    @property
    def noise_floor(self) -> Float[Tensor, " batch"]:
        """σ of the shift at ε = 1 from rounding alone."""
        return self.noise.shift

    @property
    def remainder_floor(self) -> Float[Tensor, "batch scale"]:
        """σ of R_y(ε) from rounding alone: of the shift's and of first order's."""
        return self.noise.of_remainder(self.scales)

    @property
    def shift(self) -> Float[Tensor, "batch scale"]:
        """g(ε) − g(0)."""
        return self.values - self.base[:, None]

    @property
    def first_order(self) -> Float[Tensor, "batch scale"]:
        """ε Σ_l a_l."""
        return self.slope[:, None] * self.scales

    @property
    def remainder(self) -> Float[Tensor, "batch scale"]:
        """R_y(ε)."""
        return self.shift - self.first_order

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and ε: value, shift, first order, remainder and its share."""
        parts = {name: getattr(self, name) for name in ("shift", "first_order", "remainder")}
        numbers = {"value": self.values, **parts}
        scales = self.scales.cpu().double().numpy()
        frame = long_table(numbers, {"prompt": range(len(self.values))}, {"scale": scales})
        return frame.assign(share=frame["remainder"].abs() / frame["shift"].abs())

    @property
    def points(self) -> list[list[verdicts.Point]]:
        """Each prompt's R(ε) and shift at every ε, with their floors."""
        return points_of(self.scales, self.remainder, self.shift, self.noise)

    def way_of(self, prompt: int) -> list[verdicts.Point]:
        """The points between the ends nearest to ε = ¼, ½ and ¾.

        Args:
            prompt: its index.
        """
        inner = [point for point in self.points[prompt] if 0 < point.scale < 1]
        near = [min(inner, key=lambda point: abs(point.scale - c)) for c in CHECKPOINTS if inner]
        return list(dict.fromkeys(near))


@alone
def remainder_curve(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    scales: Sequence[float] | Float[Tensor, " scale"] | None = None,
    *,
    progress: bool = True,
) -> RemainderCurve:
    """R_y(ε) = g(ε·1) − g(0) − ε Σ_l a_l along the path from base to adapted model.

    Cost: five forward and backward passes and nine forward passes, most of them for the noise
    floors, beside a forward pass per scale below 1 (21 by default), batched.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        scales: the strengths ε at which g is run; None for the usual ones.
        progress: show a bar.

    Raises:
        ArgumentError: no scales, or something that is no number.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a readout or derivative that is not finite.
    """
    strengths = USUAL_SCALES if scales is None else numbers_of("scales", scales)
    if not strengths:
        raise ArgumentError("no scales: give at least one strength ε, or None for the usual ones.")
    g = evaluations(lens, prompts, readout, progress=progress)
    slopes = g.slopes_with_noise(along=strengths)
    return _curve(g, slopes, strengths)


def remainder_curve_of(
    asked: Asked,
    attribution: Attribution,
    strengths: Sequence[float] = USUAL_SCALES,
    progress: bool = True,
) -> RemainderCurve:
    """The curve at these ε, beside first order at the base."""
    g = Evaluations.about_question(asked, progress=progress)
    return _curve(g, attribution.per_site, strengths)


def _curve(
    g: Evaluations, slopes: Float[Tensor, "batch site"], strengths: Sequence[float]
) -> RemainderCurve:
    ordered = sorted(strengths)
    noise = g.remainder_noise(slopes)
    values = g.along(ordered).T
    base, _ = g.ends
    slope = slopes.sum(1)
    scales = torch.tensor(ordered, dtype=g.lens.gate_dtype, device=values.device)
    rest = values - base[:, None] - scales * slope[:, None]
    return RemainderCurve(
        scales=scales,
        values=values,
        base=base,
        slope=slope,
        noise=noise,
        order=orders(scales, rest, noise.of_remainder(scales)),
        **read_of(g.asked),
    )


def orders(
    scales: Float[Tensor, " scale"],
    rest: Float[Tensor, "batch scale"],
    floor: Float[Tensor, "batch scale"],
) -> Float[Tensor, " batch"]:
    """`fitted_order` of each prompt."""
    return torch.stack([fitted_order(scales, *row) for row in zip(rest, floor, strict=True)])


def fitted_order(
    scales: Float[Tensor, " scale"], rest: Float[Tensor, " scale"], floor: Float[Tensor, " scale"]
) -> Float[Tensor, ""]:
    """Slope of log|R| on log ε over the first decade of scales, 2 for a remainder of second order.

    A remainder counts from ten noise floors on, which is where rounding moves its logarithm by a
    tenth; NaN where fewer than three scales count.
    """
    clear = (scales > 0) & (rest.abs() > 10 * floor)
    scales, rest = in_float64(scales[clear]), in_float64(rest[clear])
    if len(scales) < 3:
        return torch.tensor(float("nan"), dtype=torch.float64, device=rest.device)
    fitted = max(3, int((scales <= 10 * scales[0]).sum()))
    log_scale, log_rest = scales[:fitted].log(), rest[:fitted].abs().log()
    centred = log_scale - log_scale.mean()
    return (centred @ log_rest) / (centred @ centred)


# --- The complete integral.

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
