"""The remainder that first order leaves: of one site, and of all sites.

    single site   u_yᵀ r_l = g(e_l) − g(0) − a_l             (note, §3)
    all sites     R_y = g(1) − g(0) − Σ_l a_l                (note, §4)

1. First order and the exact ends; on request each site added alone.
2. The noise floor says what of the remainder is rounding.
3. At ε = 1 the two may agree by coincidence, so the verdict also looks at ε = 0.25, 0.5 and 0.75
   (the whole path: `analyses/remainder_curve.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.analyses.first_order import first_order_of
from lens_lora.engine.asked import ask
from lens_lora.engine.function import gated_readout
from lens_lora.errors import ArgumentError
from lens_lora.hooked.sites import Site
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.readouts.readout import Readout

__all__ = ["Remainder", "remainder"]

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

    Args:
        lens: the adapter over the model.
        prompts: strings, ids, conversations, or `Prompts`.
        readout: u_y, what is read of the logits.
        by_site: also run each site alone.
        progress: show a bar.

    Raises:
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a readout or derivative that is not finite.
    """
    asked = ask(lens, prompts, readout)
    attribution = first_order_of(asked)
    steps = torch.stack([lens.gates(scale) for scale in _CHECKPOINTS])
    way = gated_readout(lens, asked.reading, steps, progress=progress)
    site_shift = None
    if by_site:
        alone = torch.eye(len(lens.sites), dtype=lens.gate_dtype)
        corners = asked.at_gates(alone, progress=progress, what="single sites")
        site_shift = corners - attribution.base[:, None]
    scales = torch.tensor(_CHECKPOINTS, dtype=way.dtype, device=way.device)
    moved = way - attribution.base[:, None]
    return Remainder(
        shift=attribution.shift,
        first_order=attribution.total,
        noise_floor=asked.noise_floor,
        path_scales=_CHECKPOINTS,
        path_ratio=(moved - scales * attribution.total[:, None]).abs() / moved.abs(),
        sites=lens.sites,
        site_first_order=attribution.per_site,
        site_shift=site_shift,
        readout=readout.label,
        units=readout.units,
        meta=attribution.meta,
    )
