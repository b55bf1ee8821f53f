"""The remainder along the path from base to adapted model, and its order in ε.

    R_y(ε) = g(ε·1) − g(0) − ε Σ_l a_l = O(ε²)   (note, Assumption 2)

1. First order at ε = 0, and the exact g at strengths from 0.0001 to 1.
2. The order is the slope of log|R| on log ε, over the first decade of strengths at which R stands
   out of the noise: 2 for a smooth model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.analyses.first_order import first_order_of
from lens_lora.analyses.verdict import CHECKPOINTS, Point, points_of
from lens_lora.arguments import numbers_of
from lens_lora.engine.asked import Asked, ask
from lens_lora.errors import ArgumentError
from lens_lora.float64 import in_float64
from lens_lora.hooked.alone import alone
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.readouts.readout import Readout
from lens_lora.results import drawing
from lens_lora.results.attribution import Attribution
from lens_lora.results.measured import Read, flat, read_of
from lens_lora.results.noise import Noise, noise_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["RemainderCurve", "fitted_order", "orders", "remainder_curve", "remainder_curve_of"]

_FIT_DECADE = 10.0


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RemainderCurve(Read):
    """g, first order and remainder along ε from 0 to 1, in the readout's units.

    Attributes:
        scales: [scale], the ε at which g was run.
        values: [batch, scale], g(ε·1), exact.
        base: [batch], g(0).
        slope: [batch], Σ_l a_l, the first-order shift per unit of ε.
        noise: what rounding alone does to a shift and to the remainder.
        order: [batch], fitted slope of log|R| on log ε at small ε above the noise: 2 for a smooth
            model, NaN where fewer than three points stand out of the noise.
        str_tokens, readout, units, meta: as in `Read`.
    """

    scales: Float[Tensor, "scale"]
    values: Float[Tensor, "batch scale"]
    base: Float[Tensor, "batch"]
    slope: Float[Tensor, "batch"]
    noise: Noise
    order: Float[Tensor, "batch"]

    @property
    def noise_floor(self) -> Float[Tensor, "batch"]:
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
        batch, count = self.values.shape
        names = ("values", "shift", "first_order", "remainder")
        frame = pd.DataFrame(
            {
                "prompt": np.repeat(np.arange(batch), count),
                "scale": np.tile(self.scales.cpu().double().numpy(), batch),
                **flat({name: getattr(self, name) for name in names}),
            }
        )
        frame["share"] = frame["remainder"].abs() / frame["shift"].abs()
        return frame.rename(columns={"values": "value"})

    @property
    def points(self) -> list[list[Point]]:
        """Each prompt's R(ε) and shift at every ε, with their floors."""
        return points_of(self.scales, self.remainder, self.shift, self.noise)

    def way_of(self, prompt: int) -> list[Point]:
        """The points between the ends nearest to ε = ¼, ½ and ¾.

        Args:
            prompt: its index.
        """
        inner = [point for point in self.points[prompt] if 0 < point.scale < 1]
        near = [min(inner, key=lambda point: abs(point.scale - c)) for c in CHECKPOINTS if inner]
        return list(dict.fromkeys(near))

    def plot(self, prompt: int | None = None) -> Figure:
        """The readout and its first-order line along ε, and the remainder's share of the shift.

        Args:
            prompt: an index; without it, the only prompt.

        Raises:
            ArgumentError: no such prompt, or several and none named.
        """
        return drawing.figure(self, prompt)


@alone
def remainder_curve(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    scales: Sequence[float] | Float[Tensor, "scale"] | None = None,
    *,
    progress: bool = True,
) -> RemainderCurve:
    """R_y(ε) = g(ε·1) − g(0) − ε Σ_l a_l along the path from base to adapted model.

    Cost: five forward and backward passes and ten forward passes, most of them for the noise
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
    asked = ask(lens, prompts, readout)
    return remainder_curve_of(asked, first_order_of(asked, floors=True), scales, progress=progress)


def remainder_curve_of(
    asked: Asked,
    attribution: Attribution,
    scales: Sequence[float] | Float[Tensor, "scale"] | None = None,
    *,
    progress: bool = True,
) -> RemainderCurve:
    """`remainder_curve` of a question that is already tokenised.

    Args:
        asked: the lens, the prompts and the readout.
        attribution: first order at ε = 0.
        scales, progress: as for `remainder_curve`.

    Raises:
        ArgumentError: no scales, or something that is no number.
        NumericsError: a readout that is not finite.
    """
    given = _usual_scales() if scales is None else numbers_of("scales", scales)
    if not given:
        raise ArgumentError("no scales: give at least one strength ε, or None for the usual ones.")
    lens, noise = asked.lens, noise_of(asked, attribution)
    chosen = torch.tensor(sorted(given), dtype=lens.gate_dtype)
    gates = chosen[:, None].expand(-1, len(lens.sites))
    values = asked.at_gates(gates, progress=progress, what="along the path")
    chosen = chosen.to(values.device)
    rest = values - attribution.base[:, None] - chosen * attribution.total[:, None]
    return RemainderCurve(
        scales=chosen,
        values=values,
        base=attribution.base,
        slope=attribution.total,
        noise=noise,
        order=orders(chosen, rest, noise.of_remainder(chosen)),
        **read_of(asked),
    )


def _usual_scales() -> list[float]:
    """Small ones for the order, even ones for the story: 0.0001 … 0.08, 0.1, 0.2, 0.25 … 1."""
    even = [*np.linspace(0.1, 1.0, 10).round(3).tolist(), *CHECKPOINTS]
    return sorted({*np.geomspace(1e-4, 8e-2, 10).tolist(), *even})


def orders(
    scales: Float[Tensor, "scale"],
    rest: Float[Tensor, "batch scale"],
    floor: Float[Tensor, "batch scale"],
) -> Float[Tensor, "batch"]:
    """`fitted_order` of each prompt.

    Args:
        scales, rest, floor: as for `fitted_order`.
    """
    return torch.stack([fitted_order(scales, *row) for row in zip(rest, floor, strict=True)])


def fitted_order(
    scales: Float[Tensor, "scale"], rest: Float[Tensor, "scale"], floor: Float[Tensor, "scale"]
) -> Float[Tensor, ""]:
    """Slope of log|R| on log ε over the first decade of scales whose remainder clears the noise.

    Args:
        scales: ε, increasing.
        rest: R(ε) of one prompt, in the readout's units.
        floor: σ of its noise at each of them; a remainder counts from ten times that.

    Returns:
        The order, 2 for a remainder of second order; NaN where fewer than three scales count.
    """
    clear = (scales > 0) & (rest.abs() > 10 * floor)
    scales, rest = in_float64(scales[clear]), in_float64(rest[clear])
    if len(scales) < 3:
        return torch.tensor(float("nan"), dtype=torch.float64, device=rest.device)
    fitted = max(3, int((scales <= _FIT_DECADE * scales[0]).sum()))
    log_scale, log_rest = scales[:fitted].log(), rest[:fitted].abs().log()
    centred = log_scale - log_scale.mean()
    return (centred @ log_rest) / (centred @ centred)
