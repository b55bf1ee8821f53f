"""The remainder: the exact shift minus first order, at full strength and along ε·1.

    single site   u_yᵀ r_l = g(e_l) − g(0) − a_l                          (note, §3)
    all sites     R_y = g(1) − g(0) − Σ_l a_l                             (note, §4)
    the path      R_y(ε) = g(ε·1) − g(0) − ε Σ_l a_l = O(ε²)              (note, Assumption 2)

1. First order at ε = 0 is computed beside the exact g at both ends and on the way; on request also
   with each site alone.
2. Noise floors say how much of the shift, and of the remainder, may be rounding.
3. At ε = 1 first order and the shift may agree by coincidence, so the verdict also looks at ε =
   0.25, 0.5 and 0.75. These are the same for every result, so no two can disagree on one remainder.
4. If a model routes tokens to experts, g jumps where a token changes its expert, which no
   derivative shows. So the tokens whose experts differ between the two ends are counted, by layer
   (`hosts/rerouted.py`).
5. The order is the slope of log|R| over log ε, fitted over the first decade of strengths at which R
   stands out of the noise. It is 2 for a smooth model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.arguments import numbers_of
from lens_lora.compat import in_float64
from lens_lora.core.analyses import verdict as verdicts
from lens_lora.core.analyses.own_analyses import analysis
from lens_lora.core.analyses.verdict import CHECKPOINTS, points_of
from lens_lora.core.function.cache import Evaluations
from lens_lora.core.function.function import Function
from lens_lora.core.model import extensions
from lens_lora.core.results import base as results_base
from lens_lora.core.results.attribution import Attribution
from lens_lora.core.results.base import Drawn, Measured
from lens_lora.core.results.tables import flat, long_table
from lens_lora.errors import ArgumentError

# Small strengths, 0.0001 … 0.08, show the order of the remainder.
_SMALL_SCALES: list[float] = np.geomspace(1e-4, 8e-2, 10).tolist()
# Evenly spaced strengths, 0.1, 0.2, … 1, show the path.
_EVEN_SCALES: list[float] = np.linspace(0.1, 1.0, 10).round(3).tolist()
USUAL_SCALES = (*_SMALL_SCALES, *sorted({*_EVEN_SCALES, *CHECKPOINTS}))
# A remainder is used for the fit if it exceeds ten noise floors: rounding then moves its logarithm
# by a tenth.
_CLEAR = 10
# The smallest number of strengths to which the order is fitted.
_FEWEST_POINTS = 3


@final
class Remainder(Measured):
    """The exact shift, and the remainder that first order leaves of it, in the readout's units.

    Attributes:
        first_order: [batch], Σ_l a_l.
        noise: σ of a shift and of the remainder, from rounding alone.
        path_scales: the ε on the way at which g was run.
        path_shift: [batch, scale], g(ε) − g(0) at each of them.
        site_first_order: [batch, site], a_l.
        site_shift: [batch, site], g(e_l) − g(0); only with by_site.
        rerouted: {'layer 3': [batch]}, how many tokens go to other experts at ε = 1 than at 0;
            empty for a model without experts.
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
        """The remainder R_y."""
        return self.shift - self.first_order

    @property
    def noise_floor(self) -> Float[Tensor, " batch"]:
        """The noise floor σ of the shift, from rounding alone."""
        return self.noise.shift

    @property
    def remainder_floor(self) -> Float[Tensor, " batch"]:
        """The noise floor σ of the remainder, from the rounding of the shift and of first order."""
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

        With experts also `rerouted`: the tokens that go to other experts, summed over layers.
        """
        numbers = {
            "shift": self.shift,
            "first_order": self.first_order,
            "remainder": self.remainder,
            "noise_floor": self.noise_floor,
            "remainder_floor": self.remainder_floor,
        }
        frame = pd.DataFrame({"prompt": range(len(self.shift)), **flat(numbers)})
        if self.rerouted:
            by_layer = torch.stack(list(self.rerouted.values()))
            frame["rerouted"] = by_layer.sum(0).int().tolist()
        return frame.assign(verdict=[verdict.kind for verdict in self.verdict])


@analysis
def remainder(g: Evaluations, *, by_site: bool = False) -> Remainder:
    """R_y of all sites together and, with by_site, u_yᵀ r_l of each site alone.

    Cost: five forward and backward passes and 12 forward passes, batched, most of them for the
    noise floors; with by_site one more per site; with experts two more forward passes.

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
    g.require_slope_at_base()
    slopes = g.slopes_with_noise(along=CHECKPOINTS)
    path = g.along(CHECKPOINTS)
    base, _ = g.ends
    noise = g.remainder_noise(slopes)
    site_shift: Tensor | None = None
    if by_site:
        site_shift = (g.corners("add_one") - base).T
    return Remainder(
        first_order=slopes.sum(1),
        noise=noise,
        path_scales=CHECKPOINTS,
        path_shift=(path - base).T,
        site_first_order=slopes,
        site_shift=site_shift,
        rerouted=extensions.rerouted_tokens(g),
        **g.header(),
    )


@final
class RemainderCurve(results_base.Read, Drawn):
    """The readout, first order and remainder along ε from 0 to 1, in the readout's units.

    `plot` is the readout and its first-order line along ε, and the remainder's share of the shift.

    Attributes:
        scales: [scale], the ε at which g was run.
        values: [batch, scale], g(ε·1), exact.
        base: [batch], g(0).
        slope: [batch], Σ_l a_l, the first-order shift per unit of ε.
        noise: σ of a shift and of the remainder from rounding alone.
        order: [batch], the slope of log|R| over log ε, fitted at small ε where R stands out of the
            noise: 2 for a smooth model, NaN where fewer than three points stand out.
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
        """The noise floor σ of the shift at ε = 1, from rounding alone."""
        return self.noise.shift

    @property
    def remainder_floor(self) -> Float[Tensor, "batch scale"]:
        """The noise floor σ of R_y(ε), from the rounding of the shift and of first order."""
        return self.noise.of_remainder(self.scales)

    @property
    def shift(self) -> Float[Tensor, "batch scale"]:
        """The exact shift g(ε) − g(0)."""
        return self.values - self.base[:, None]

    @property
    def first_order(self) -> Float[Tensor, "batch scale"]:
        """The first-order line ε Σ_l a_l."""
        return self.slope[:, None] * self.scales

    @property
    def remainder(self) -> Float[Tensor, "batch scale"]:
        """The remainder R_y(ε)."""
        return self.shift - self.first_order

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and ε: value, shift, first order, remainder and its share."""
        numbers = {
            "value": self.values,
            "shift": self.shift,
            "first_order": self.first_order,
            "remainder": self.remainder,
        }
        prompts = {"prompt": range(len(self.values))}
        scales = {"scale": self.scales.cpu().double().numpy()}
        frame = long_table(numbers, prompts, scales)
        return frame.assign(share=frame["remainder"].abs() / frame["shift"].abs())

    def orders_of(
        self, rest: Float[Tensor, "batch scale"], floor: Float[Tensor, "batch scale"]
    ) -> Float[Tensor, " batch"]:
        """Fit the order of another remainder, such as that of second order, as `order` is fitted.

        Args:
            rest: the remainder at each of `scales`.
            floor: its σ, from rounding alone.
        """
        return orders(self.scales, rest, floor)

    @property
    def points(self) -> list[list[verdicts.Point]]:
        """Each prompt's R(ε) and shift at every ε, with their floors."""
        return points_of(self.scales, self.remainder, self.shift, self.noise)

    def verdicts_on(self, first: Attribution) -> tuple[verdicts.Verdict, ...]:
        """For each prompt, how good first order is at ε = 1 and on the way.

        Args:
            first: first order at 0 of the same prompts and readout.
        """
        ends = verdicts.points_at_end(first.remainder, first.shift, self.noise)
        return tuple(verdicts.verdict_of(end, self.way_of(i)) for i, end in enumerate(ends))

    def way_of(self, prompt: int) -> list[verdicts.Point]:
        """The points between the ends that are nearest to ε = ¼, ½ and ¾.

        Args:
            prompt: the index of the prompt.
        """
        inner = [point for point in self.points[prompt] if 0 < point.scale < 1]
        if not inner:
            return []
        nearest: list[verdicts.Point] = []
        for checkpoint in CHECKPOINTS:
            distances = [abs(point.scale - checkpoint) for point in inner]
            nearest.append(inner[distances.index(min(distances))])
        return list(dict.fromkeys(nearest))


@analysis
def remainder_curve(
    g: Evaluations, scales: Sequence[float] | Float[Tensor, " scale"] | None = None
) -> RemainderCurve:
    """R_y(ε) = g(ε·1) − g(0) − ε Σ_l a_l along the path from the base to the adapted model.

    Cost: five forward and backward passes and nine forward passes, most of them for the noise
    floors, and one forward pass per scale below 1 (21 by default), batched.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        scales: the strengths ε at which g is run; None for the usual ones.
        progress: show a bar.

    Raises:
        ArgumentError: no scales, or something that is not a number.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a readout or derivative that is not finite.
    """
    strengths = USUAL_SCALES if scales is None else numbers_of("scales", scales)
    if not strengths:
        raise ArgumentError("no scales: give at least one strength ε, or None for the usual ones.")
    slopes = g.slopes_with_noise(along=strengths)
    return curve_beside(g, slopes, strengths)


def curve_beside(
    g: Function,
    slopes: Float[Tensor, "batch site"],
    strengths: Sequence[float] = USUAL_SCALES,
) -> RemainderCurve:
    """The exact curve at these ε, with the line of first order that is known already.

    It takes one forward pass for each strength that g has not been evaluated at, and fourteen
    forward and four backward passes for the noise floors, unless g has them
    (`Evaluations.slopes_with_noise`).

    Args:
        g: the function.
        slopes: ∂g/∂ε_l at the base.
        strengths: the ε at which g is run.
    """
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
        **g.labels(),
    )


def orders(
    scales: Float[Tensor, " scale"],
    rest: Float[Tensor, "batch scale"],
    floor: Float[Tensor, "batch scale"],
) -> Float[Tensor, " batch"]:
    """Fit the order of each prompt's remainder.

    Args:
        scales: the strengths ε.
        rest: R(ε) of each prompt.
        floor: its σ, from rounding alone.
    """
    orders_of_prompts: list[Tensor] = []
    for rest_of_prompt, floor_of_prompt in zip(rest, floor, strict=True):
        orders_of_prompts.append(fitted_order(scales, rest_of_prompt, floor_of_prompt))
    return torch.stack(orders_of_prompts)


def fitted_order(
    scales: Float[Tensor, " scale"], rest: Float[Tensor, " scale"], floor: Float[Tensor, " scale"]
) -> Float[Tensor, ""]:
    """The slope of log|R| over log ε, which is 2 for a remainder of second order.

    It is fitted over the first decade of strengths at which R stands out of the noise, and to three
    of them at least. NaN if fewer than three stand out.

    Args:
        scales: the strengths ε, in increasing order.
        rest: R(ε).
        floor: its σ, from rounding alone.
    """
    is_clear = (scales > 0) & (rest.abs() > _CLEAR * floor)
    clear_scales = in_float64(scales[is_clear])
    clear_rest = in_float64(rest[is_clear])
    if len(clear_scales) < _FEWEST_POINTS:
        return torch.tensor(float("nan"), dtype=torch.float64, device=clear_rest.device)
    in_first_decade = int((clear_scales <= 10 * clear_scales[0]).sum())
    fitted = max(_FEWEST_POINTS, in_first_decade)
    log_scale = clear_scales[:fitted].log()
    log_rest = clear_rest[:fitted].abs().log()
    centred = log_scale - log_scale.mean()
    return (centred @ log_rest) / (centred @ centred)
