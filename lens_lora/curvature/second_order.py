"""Second order: H = ∂²g/∂ε_l∂ε_m, summed by site.

    g(ε·1) − g(0) = ε Σ_l a_l + ½ε² Σ_l (H1)_l + O(ε³),    (H1)_l = Σ_m H_lm at ε = 0

½(H1)_l is the site's own curvature, ½H_ll, plus half of its coupling to every other site (note, §6,
item 4).

1. First order, and the exact g along the path (`core/analyses/remainder.py`).
2. H·1 from one Hessian product; ½H_ll on request, from `coupling` of single sites.
3. For each prompt, the verdict says whether second order is nearer to the exact shift at ε = 1
   than first order, or farther. At the full strength of trained adapters it is often far worse,
   because the terms in ε³ and beyond are then not smaller. It shows curvature; it is not a
   correction.
"""

from __future__ import annotations

import dataclasses
from typing import final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core import (
    SIGMAS,
    Attribution,
    Evaluations,
    OfMeasured,
    RemainderCurve,
    analysis,
    drawing,
    remainder_curve,
    tables,
)
from lens_lora.curvature.coupling import coupling
from lens_lora.curvature.verdict import SecondVerdict
from lens_lora.errors import MissingPartError


@final
class SecondOrder(OfMeasured):
    """Second order at ε = 0, with first order and the exact shift, in the readout's units.

    Attributes:
        first_order: a_l, with the readout's labels, sites and meta.
        half_row_sums: [batch, site], ½(H1)_l.
        self_curvature: [batch, site], ½H_ll; None if it was not computed.
        curve: g along the path from base to adapted model, exact, with first order beside it.
        curvature_noise: [batch], σ of ½ 1ᵀH1 from rounding alone.
    """

    first_order: Attribution
    half_row_sums: Float[Tensor, "batch site"]
    self_curvature: Float[Tensor, "batch site"] | None
    curve: RemainderCurve
    curvature_noise: Float[Tensor, " batch"]

    @property
    def measured(self) -> Attribution:
        """First order, with the exact ends."""
        return self.first_order

    @property
    def curvature(self) -> Float[Tensor, " batch"]:
        """The second-order part of the shift, ½ 1ᵀH1."""
        return self.half_row_sums.sum(1)

    @property
    def predicted(self) -> Float[Tensor, " batch"]:
        """The shift to second order, Σ_l a_l + ½ 1ᵀH1; look at `verdict` before you use it."""
        return self.first_order.total + self.curvature

    @property
    def remainder(self) -> Float[Tensor, " batch"]:
        """The exact shift minus what second order predicts."""
        return self.shift - self.predicted

    @property
    def first_order_remainder(self) -> Float[Tensor, " batch"]:
        """The exact shift minus what first order predicts: R_y of the note."""
        return self.first_order.remainder

    @property
    def noise_floor(self) -> Float[Tensor, " batch"]:
        """The noise floor of the shift: its σ from rounding alone."""
        return self.curve.noise_floor

    @property
    def remainder_floor(self) -> Float[Tensor, " batch"]:
        """The noise floor of `remainder`, with the rounding in first and second order."""
        return self.curve.noise.of_remainder(1.0, self.curvature_noise)

    @property
    def corrected(self) -> Float[Tensor, "batch site"]:
        """Each site's part of `predicted`, a_l + ½(H1)_l; look at `verdict` before you use it."""
        return self.first_order.per_site + self.half_row_sums

    @property
    def coupling(self) -> Float[Tensor, "batch site"]:
        """½ Σ_{m≠l} H_lm: half of each site's coupling to all others.

        Raises:
            MissingPartError: self-curvature was not computed.
        """
        if self.self_curvature is None:
            raise MissingPartError(
                "single sites were not run", remedy="call second_order(self_curvature=True)."
            )
        return self.half_row_sums - self.self_curvature

    def predicted_at(
        self, scale: float | Float[Tensor, " scale"]
    ) -> Float[Tensor, " batch *scale"]:
        """The shift predicted at strength ε, ε Σ_l a_l + ½ε² 1ᵀH1.

        Args:
            scale: ε, or several.
        """
        slope = self.first_order.total
        bend = self.curvature
        eps = torch.as_tensor(scale, dtype=bend.dtype, device=bend.device)
        if eps.ndim:
            slope = slope[:, None]
            bend = bend[:, None]
        return eps * slope + eps.square() * bend

    @property
    def path_remainder(self) -> Float[Tensor, "batch scale"]:
        """The exact shift minus second order at each of `curve.scales`, which is of order ε³."""
        return self.curve.shift - self.predicted_at(self.curve.scales)

    @property
    def order(self) -> Float[Tensor, " batch"]:
        """Fitted slope of log|remainder| on log ε, as `curve.order`: 3 for a smooth model.

        NaN where fewer than three points stand out of the noise.
        """
        return self.curve.orders_of(self.path_remainder, self._path_floor)

    @property
    def helps_up_to(self) -> Float[Tensor, " batch"]:
        """The largest of `curve.scales` up to which second order is nowhere farther than first.

        Points at which both remainders are within rounding are ignored. It is 0 if second order is
        farther from the start.
        """
        first = self.curve.remainder.abs()
        second = self.path_remainder.abs()
        is_noise = torch.maximum(first, second) <= SIGMAS * self._path_floor
        is_no_farther = (second <= first) | is_noise
        so_far = is_no_farther.long().cumprod(1)
        return (so_far * self.curve.scales).amax(1)

    @property
    def _path_floor(self) -> Float[Tensor, "batch scale"]:
        return self.curve.noise.of_remainder(self.curve.scales, self.curvature_noise)

    @property
    def verdict(self) -> tuple[SecondVerdict, ...]:
        """Whether it is nearer than first order at full strength, by prompt; str() says it."""
        numbers = [
            self.shift,
            self.first_order_remainder,
            self.remainder,
            SIGMAS * self.noise_floor.double(),
            SIGMAS * self.remainder_floor.double(),
            self.helps_up_to,
        ]
        by_prompt = torch.stack([values.cpu().double() for values in numbers], 1).tolist()
        return tuple(SecondVerdict(*of_prompt) for of_prompt in by_prompt)

    def attribution(self) -> Attribution:
        """The values of `corrected` as an attribution, to be compared with effects or saved."""
        return self._as_attribution(self.corrected, "second_order")

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt: shift, first and second order, their remainders, and the verdict."""
        columns = {
            "shift": self.shift,
            "first_order": self.first_order.total,
            "curvature": self.curvature,
            "predicted": self.predicted,
            "first_order_remainder": self.first_order_remainder,
            "remainder": self.remainder,
            "noise_floor": self.noise_floor,
            "remainder_floor": self.remainder_floor,
        }
        kinds = [verdict.kind for verdict in self.verdict]
        prompts = {"prompt": range(len(kinds))}
        return pd.DataFrame({**prompts, **tables.flat(columns), "verdict": kinds})

    def plot(self, prompt: int | None = None) -> drawing.Figure:
        """Heatmap of ½(H1)_l, layer × kind of module."""
        return drawing.figure(self._as_attribution(self.half_row_sums, "curvature"), prompt)

    def plot_path(self, prompt: int | None = None) -> drawing.Figure:
        """The exact shift along ε, first order's line and second order's parabola.

        Args:
            prompt: an index; without it, the only prompt.

        Raises:
            ArgumentError: no such prompt, or several and none named.
        """
        return drawing.path(self, prompt)

    def _as_attribution(self, values: Tensor, method: str) -> Attribution:
        return dataclasses.replace(self.first_order, values=values, method=method)


@analysis
def second_order(g: Evaluations, *, self_curvature: bool = False) -> SecondOrder:
    """Second order at the base model, ½(H1)_l of every site, and what it misses of the shift.

    Cost: one forward and two backward passes, and 40 forward and 13 backward for first order, the
    path and the noise floors, batched; with self_curvature two backward passes more per site.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read from the logits.
        self_curvature: also ½H_ll, the curvature of each site alone.
        progress: show a bar.

    Raises:
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a derivative is not finite; the error names the site.
    """
    curve = remainder_curve.of(g)
    slopes = g.slopes_with_noise()  # The curve has computed these already.
    half_row_sums = g.curvature(1.0) / 2
    own_curvature = coupling.of(g).self_curvature if self_curvature else None
    return SecondOrder(
        first_order=Attribution.of(g, slopes, method="first_order", at=0.0, mode="reverse"),
        half_row_sums=half_row_sums,
        self_curvature=own_curvature,
        curve=curve,
        curvature_noise=g.curvature_noise(half_row_sums),
    )
