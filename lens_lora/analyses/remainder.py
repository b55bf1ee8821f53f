"""The remainder that first order leaves: of one site, and of all sites.

    single site   u_yᵀ r_l = g(e_l) − g(0) − a_l             (note, §3)
    all sites     R_y = g(1) − g(0) − Σ_l a_l                (note, §4)

1. First order and the exact ends; on request each site added alone.
2. Noise floors say what of the shift, and what of the remainder, is rounding.
3. At ε = 1 the two may agree by coincidence, so the verdict also looks at ε = 0.25, 0.5 and 0.75:
   at the same strengths for every result, so that no two can disagree on one remainder (the whole
   path: `analyses/remainder_curve.py`).
"""

from __future__ import annotations

import dataclasses
from typing import final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.analyses.first_order import first_order_of
from lens_lora.analyses.verdict import CHECKPOINTS, Verdict, points_of, verdict_of
from lens_lora.engine.asked import ask
from lens_lora.engine.function import gated_readout
from lens_lora.errors import ArgumentError
from lens_lora.hooked.alone import alone
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.readouts.readout import Readout
from lens_lora.results.measured import Measured, flat, header, per_prompt
from lens_lora.results.noise import Noise, noise_of

__all__ = ["Remainder", "remainder"]


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Remainder(Measured):
    """What first order leaves, against the exact shift, in the readout's units.

    Attributes:
        first_order: [batch], Σ_l a_l.
        noise: what rounding alone does to a shift and to the remainder.
        path_scales: some ε on the way.
        path_shift: [batch, scale], g(ε) − g(0) at each of them.
        site_first_order: [batch, site], a_l.
        site_shift: [batch, site], g(e_l) − g(0); only with by_site.
        sites, base, adapted, str_tokens, readout, units, meta: as in `Measured`.
    """

    first_order: Float[Tensor, "batch"]
    noise: Noise
    path_scales: tuple[float, ...]
    path_shift: Float[Tensor, "batch scale"]
    site_first_order: Float[Tensor, "batch site"]
    site_shift: Float[Tensor, "batch site"] | None

    @property
    def remainder(self) -> Float[Tensor, "batch"]:
        """R_y."""
        return self.shift - self.first_order

    @property
    def noise_floor(self) -> Float[Tensor, "batch"]:
        """σ of the shift from rounding alone."""
        return self.noise.shift

    @property
    def remainder_floor(self) -> Float[Tensor, "batch"]:
        """σ of the remainder from rounding alone: of the shift's and of first order's."""
        return self.noise.of_remainder(1.0)

    @property
    def path_ratio(self) -> Float[Tensor, "batch scale"]:
        """|R_y(ε)| / |g(ε) − g(0)| at each of `path_scales`."""
        return self._path_remainder.abs() / self.path_shift.abs()

    @property
    def _scales(self) -> Float[Tensor, "scale"]:
        return self.path_shift.new_tensor(self.path_scales)

    @property
    def _path_remainder(self) -> Float[Tensor, "batch scale"]:
        return self.path_shift - self._scales * self.first_order[:, None]

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
    def verdict(self) -> tuple[Verdict, ...]:
        """For each prompt, how good first order is at ε = 1 and on the way; str() words it."""
        one = self._scales.new_ones(1)
        ends = points_of(one, self.remainder[:, None], self.shift[:, None], self.noise)
        ways = points_of(self._scales, self._path_remainder, self.path_shift, self.noise)
        return tuple(verdict_of(end[0], way) for end, way in zip(ends, ways, strict=True))

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt: shift, first order, remainder, both floors, the verdict's kind."""
        names = ("shift", "first_order", "remainder", "noise_floor", "remainder_floor")
        frame = pd.DataFrame(per_prompt({name: getattr(self, name) for name in names}))
        return frame.assign(verdict=[verdict.kind for verdict in self.verdict])

    def sites_to_frame(self) -> pd.DataFrame:
        """One row per prompt and site: its shift alone, first order, remainder."""
        batch, count = self.site_first_order.shape
        numbers = {
            "shift": self.site_remainder + self.site_first_order,
            "first_order": self.site_first_order,
            "remainder": self.site_remainder,
        }
        labels = {
            "prompt": np.repeat(np.arange(batch), count),
            "site": [s.name for s in self.sites] * batch,
        }
        return pd.DataFrame({**labels, **flat(numbers)})


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

    Cost: five forward and backward passes and 13 forward passes, batched, most of them for the
    noise floors; and one per site with by_site.

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
    asked = ask(lens, prompts, readout).require_slope_at_base()
    attribution = first_order_of(asked, floors=True)
    steps = torch.stack([lens.gates(scale) for scale in CHECKPOINTS])
    way = gated_readout(lens, asked.reading, steps, progress=progress)
    site_shift = None
    if by_site:
        single = torch.eye(len(lens.sites), dtype=lens.gate_dtype)
        corners = asked.at_gates(single, progress=progress, what="single sites")
        site_shift = corners - attribution.base[:, None]
    return Remainder(
        first_order=attribution.total,
        noise=noise_of(asked, attribution),
        path_scales=CHECKPOINTS,
        path_shift=way - attribution.base[:, None],
        site_first_order=attribution.per_site,
        site_shift=site_shift,
        **header(asked),
    )
