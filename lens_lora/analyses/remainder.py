"""The remainder that first order leaves: of one site, of all sites, and along the path.

    single site   u_yᵀ r_l = g(e_l) − g(0) − a_l             (note, §3)
    all sites     R_y = g(1) − g(0) − Σ_l a_l                (note, §4)
    along ε·Δ     R_y(ε) = g(ε·1) − g(0) − ε Σ_l a_l = O(ε²)   (note, Assumption 2)

At ε = 1 the two may agree by coincidence, so the verdict looks along the path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.analyses.first_order import first_order
from lens_lora.engine.function import gated_readout
from lens_lora.engine.noise import noise_floor
from lens_lora.errors import ArgumentError
from lens_lora.hooked.sites import Site
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.readouts.readout import Readout, bound
from lens_lora.results.attribution import Attribution

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["Remainder", "RemainderCurve", "remainder", "remainder_curve"]

_CHECKPOINTS = (0.25, 0.5, 0.75)
_SMALL, _SIGMAS = 0.1, 3.0


@dataclasses.dataclass(frozen=True, eq=False)
class Remainder:
    """What first order leaves, against the exact shift, in the readout's units.

    Attributes:
        shift, first_order: [batch], g(1) − g(0) and Σ_l a_l.
        noise_floor: [batch], σ of a difference of two readouts from rounding alone.
        path_scales, path_ratio: |R_y(ε)| / |g(ε) − g(0)| at some ε on the way: [batch, scale].
        site_shift, site_first_order: [batch, site], g(e_l) − g(0) and a_l; only with by_site.
        sites: of the site axis.
        meta: model, adapter, dtype and versions.
    """

    shift: Float[Tensor, "batch"]
    first_order: Float[Tensor, "batch"]
    noise_floor: Float[Tensor, "batch"]
    path_scales: tuple[float, ...]
    path_ratio: Float[Tensor, "batch scale"]
    sites: tuple[Site, ...]
    site_first_order: Float[Tensor, "batch site"]
    site_shift: Float[Tensor, "batch site"] | None
    readout: str
    units: str
    meta: Mapping[str, str]

    @property
    def remainder(self) -> Float[Tensor, "batch"]:
        """R_y."""
        return self.shift - self.first_order

    @property
    def site_remainder(self) -> Float[Tensor, "batch site"]:
        """u_yᵀ r_l of each site alone.

        Raises:
            ArgumentError: it was not computed.
        """
        if self.site_shift is None:
            raise ArgumentError("single sites were not run; call remainder(..., by_site=True).")
        return self.site_shift - self.site_first_order

    @property
    def verdict(self) -> tuple[str, ...]:
        """For each prompt, in words: noise, good along the path, a coincidence at ε = 1, or bad."""
        return tuple(self._verdict(i) for i in range(len(self.shift)))

    def _verdict(self, i: int) -> str:
        shift, rest = float(self.shift[i]), float(self.remainder[i])
        floor = _SIGMAS * float(self.noise_floor[i])
        if abs(shift) <= floor:
            return f"below the noise: the shift {shift:.2g} is within rounding ({floor:.2g})"
        worst, where = float(self.path_ratio[i].max()), int(self.path_ratio[i].argmax())
        here = abs(rest / shift)
        on_the_way = f"{worst:.0%} of the shift at ε = {self.path_scales[where]:g}"
        if here <= _SMALL and worst > 2 * _SMALL:
            return f"a coincidence at ε = 1: {here:.1%} of the shift there, but {on_the_way}"
        if abs(rest) <= floor:
            return f"below the noise: the remainder {rest:.2g} is within rounding ({floor:.2g})"
        if max(here, worst) <= _SMALL:
            return f"small: {here:.1%} of the shift at ε = 1, at most {on_the_way}"
        return f"large: {here:.0%} of the shift at ε = 1, {on_the_way}"

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt: shift, first order, remainder, noise floor, verdict."""
        return pd.DataFrame(
            {
                "shift": self.shift.double().tolist(),
                "first_order": self.first_order.double().tolist(),
                "remainder": self.remainder.double().tolist(),
                "noise_floor": self.noise_floor.double().tolist(),
                "verdict": self.verdict,
            }
        )

    def sites_to_frame(self) -> pd.DataFrame:
        """One row per prompt and site: its shift alone, first order, remainder."""
        batch, count = self.site_first_order.shape
        return pd.DataFrame(
            {
                "prompt": np.repeat(np.arange(batch), count),
                "site": [s.name for s in self.sites] * batch,
                "shift": (self.site_remainder + self.site_first_order).flatten().tolist(),
                "first_order": self.site_first_order.flatten().tolist(),
                "remainder": self.site_remainder.flatten().tolist(),
            }
        )

    def __repr__(self) -> str:
        return f"Remainder of {self.readout}:\n{self.to_frame().to_string()}"


def remainder(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    *,
    by_site: bool = False,
    progress: bool = True,
) -> Remainder:
    """R_y of all sites together and, with by_site, u_yᵀ r_l of each site alone.

    Cost: one forward and one backward, thirteen forward passes, and one per site with by_site.
    """
    ready = lens.prompts(prompts)
    reading = bound(readout, lens.model, ready)
    attribution = first_order(lens, ready, readout)
    steps = torch.stack([lens.gates(scale) for scale in _CHECKPOINTS])
    way = gated_readout(lens, reading, steps, progress=progress)
    site_shift = None
    if by_site:
        alone = torch.eye(len(lens.sites), dtype=lens.gate_dtype)
        corners = gated_readout(lens, reading, alone, progress=progress, what="single sites")
        site_shift = corners - attribution.base[:, None]
    scales = torch.tensor(_CHECKPOINTS, dtype=way.dtype, device=way.device)
    moved = way - attribution.base[:, None]
    return Remainder(
        shift=attribution.shift,
        first_order=attribution.total,
        noise_floor=noise_floor(lens, reading),
        path_scales=_CHECKPOINTS,
        path_ratio=(moved - scales * attribution.total[:, None]).abs() / moved.abs(),
        sites=lens.sites,
        site_first_order=attribution.per_site,
        site_shift=site_shift,
        readout=readout.label,
        units=readout.units,
        meta=attribution.meta,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class RemainderCurve:
    """g, first order and remainder along ε from 0 to 1, in the readout's units.

    Attributes:
        scales: [scale], the ε at which g was run.
        values: [batch, scale], g(ε·1), exact.
        slope: [batch], Σ_l a_l, the first-order shift per unit of ε.
        noise_floor: [batch], σ of a difference of two readouts from rounding alone.
        order: [batch], fitted slope of log|R| on log ε at small ε above the noise: 2 for a smooth
            model, NaN where fewer than three points stand out of the noise.
        meta: model, adapter, dtype and versions.
    """

    scales: Float[Tensor, "scale"]
    values: Float[Tensor, "batch scale"]
    base: Float[Tensor, "batch"]
    slope: Float[Tensor, "batch"]
    noise_floor: Float[Tensor, "batch"]
    order: Float[Tensor, "batch"]
    readout: str
    units: str
    meta: Mapping[str, str]

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
        flat = {
            name: getattr(self, name).double().cpu().flatten().numpy()
            for name in ("values", "shift", "first_order", "remainder")
        }
        frame = pd.DataFrame(
            {
                "prompt": np.repeat(np.arange(batch), count),
                "scale": np.tile(self.scales.double().cpu().numpy(), batch),
                **flat,
            }
        )
        frame["share"] = frame["remainder"].abs() / frame["shift"].abs()
        return frame.rename(columns={"values": "value"})

    def plot(self, prompt: int = 0) -> Figure:
        """The readout and its first-order line along ε, and the remainder's share of the shift."""
        from lens_lora.show.figures.attribution import remainder_figure

        return remainder_figure(self, prompt)

    def __repr__(self) -> str:
        orders = ", ".join(f"{o:.2f}" for o in self.order.tolist())
        return f"RemainderCurve of {self.readout} at {len(self.scales)} scales, order {orders}"


def default_scales() -> list[float]:
    """Small ones for the order, even ones for the story: 0.0001 … 0.08, 0.1, 0.2, 0.25 … 1."""
    even = [*np.linspace(0.1, 1.0, 10).round(3).tolist(), *_CHECKPOINTS]
    return sorted({*np.geomspace(1e-4, 8e-2, 10).tolist(), *even})


def remainder_curve(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    scales: Sequence[float] | None = None,
    *,
    progress: bool = True,
) -> RemainderCurve:
    """R_y(ε) = g(ε·1) − g(0) − ε Σ_l a_l along the path from base to adapted model.

    Cost: one forward and one backward, and one forward pass per scale (22 by default), batched.
    """
    ready = lens.prompts(prompts)
    attribution = first_order(lens, ready, readout)
    return curve_of(lens, prompts, readout, attribution, scales, progress=progress)


def curve_of(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    attribution: Attribution,
    scales: Sequence[float] | None = None,
    *,
    progress: bool = True,
) -> RemainderCurve:
    """`remainder_curve` beside a first-order attribution at hand."""
    reading = bound(readout, lens.model, lens.prompts(prompts))
    given = default_scales() if scales is None else [float(scale) for scale in scales]
    if not given:
        raise ArgumentError("no scales: give at least one strength ε, or None for the usual ones.")
    chosen = torch.tensor(sorted(given), dtype=lens.gate_dtype)
    gates = chosen[:, None].expand(-1, len(lens.sites))
    values = gated_readout(lens, reading, gates, progress=progress, what="along the path")
    floor = noise_floor(lens, reading)
    chosen = chosen.to(values.device)
    rest = values - attribution.base[:, None] - chosen * attribution.total[:, None]
    return RemainderCurve(
        scales=chosen,
        values=values,
        base=attribution.base,
        slope=attribution.total,
        noise_floor=floor,
        order=torch.stack([fitted_order(chosen, r, f) for r, f in zip(rest, floor, strict=True)]),
        readout=readout.label,
        units=readout.units,
        meta=attribution.meta,
    )


_FIT_DECADE = 10.0


def fitted_order(
    scales: Float[Tensor, "scale"], rest: Float[Tensor, "scale"], floor: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Slope of log|R| on log ε over the first decade of scales whose remainder clears the noise."""
    clear = (scales > 0) & (rest.abs() > 10 * floor)
    scales, rest = scales[clear].double(), rest[clear].double()
    if len(scales) < 3:
        return torch.tensor(float("nan"), dtype=torch.float64, device=rest.device)
    fitted = max(3, int((scales <= _FIT_DECADE * scales[0]).sum()))
    log_scale, log_rest = scales[:fitted].log(), rest[:fitted].abs().log()
    centred = log_scale - log_scale.mean()
    return (centred @ log_rest) / (centred @ centred)
