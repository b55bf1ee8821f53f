"""The remainder that first order leaves: of one site, and of all sites.

    single site   u_yᵀ r_l = g(e_l) − g(0) − a_l             (note, §3)
    all sites     R_y = g(1) − g(0) − Σ_l a_l                (note, §4)

1. First order and the exact ends; on request each site added alone.
2. The noise floor says what of the remainder is rounding.
3. At ε = 1 the two may agree by coincidence, so the verdict also looks at ε = 0.25, 0.5 and 0.75:
   at the same strengths for every result, so that no two can disagree on one remainder (the whole
   path: `analyses/remainder_curve.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.analyses.first_order import first_order_of
from lens_lora.engine.asked import ask
from lens_lora.engine.function import gated_readout
from lens_lora.errors import ArgumentError
from lens_lora.hooked.alone import alone
from lens_lora.hooked.sites import Site
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.readouts.readout import Readout
from lens_lora.results import drawing
from lens_lora.results.measured import SIGMAS, Result

__all__ = ["CHECKPOINTS", "Remainder", "Verdict", "remainder", "verdict_of"]

CHECKPOINTS = (0.25, 0.5, 0.75)
_SMALL, _LARGE = 0.1, 0.2
Kind = Literal["no_shift", "coincidence", "noise", "small", "large", "uneven"]


@final
@dataclasses.dataclass(frozen=True)
class Verdict:
    """How good first order is on one prompt, at ε = 1 and on the way.

    Attributes:
        kind: 'no_shift', the shift itself is within rounding; 'coincidence', at most a tenth of
            the shift is missed at ε = 1, but more than a fifth on the way; 'noise', the remainder
            at ε = 1 is within rounding; 'small', at most a tenth is missed throughout; 'large',
            more than a tenth at ε = 1; 'uneven', at most a tenth at ε = 1, and up to a fifth on the
            way.
        shift, remainder: g(1) − g(0), and what first order leaves of it.
        floor: three noise floors; a difference of at most that can be rounding.
        worst: the largest |R(ε)| / |g(ε) − g(0)| at a quarter, half and three quarters of the
            strength; None where none of them stands out of the noise.
        worst_scale: the ε of it.
    """

    kind: Kind
    shift: float
    remainder: float
    floor: float
    worst: float | None
    worst_scale: float | None

    @property
    def share(self) -> float:
        """|R| / |shift| at ε = 1; NaN without a shift."""
        return abs(self.remainder / self.shift) if self.shift else float("nan")

    def __str__(self) -> str:
        return drawing.text(self)


def verdict_of(
    shift: float,
    remainder: float,
    noise_floor: float,
    path: Sequence[tuple[float, float, float]],
) -> Verdict:
    """The verdict on one prompt's remainder; nothing else in the package decides it.

    Args:
        shift: g(1) − g(0).
        remainder: what first order leaves of it.
        noise_floor: σ of a difference of two readouts from rounding alone.
        path: (ε, R(ε), g(ε) − g(0)) at the strengths on the way.
    """
    floor = SIGMAS * noise_floor
    clear = [(abs(r / moved), e) for e, r, moved in path if abs(r) > floor and abs(moved) > floor]
    worst, scale = max(clear, default=(None, None), key=lambda point: point[0])
    kind = _kind(abs(shift), abs(remainder), floor, worst or 0.0)
    return Verdict(kind, shift, remainder, floor, worst, scale)


def _kind(shift: float, remainder: float, floor: float, worst: float) -> Kind:
    if shift <= floor:
        return "no_shift"
    here = remainder / shift
    if here <= _SMALL and worst > _LARGE:
        return "coincidence"
    if remainder <= floor:
        return "noise"
    if here > _SMALL:
        return "large"
    return "small" if worst <= _SMALL else "uneven"


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Remainder(Result):
    """What first order leaves, against the exact shift, in the readout's units.

    Attributes:
        shift, first_order: [batch], g(1) − g(0) and Σ_l a_l.
        noise_floor: [batch], σ of a difference of two readouts from rounding alone.
        path_scales: some ε on the way.
        path_shift: [batch, scale], g(ε) − g(0) at each of them.
        site_shift, site_first_order: [batch, site], g(e_l) − g(0) and a_l; only with by_site.
        sites: of the site axis.
        readout, units: what was read.
        meta: model, adapter, dtype and versions.
    """

    shift: Float[Tensor, "batch"]
    first_order: Float[Tensor, "batch"]
    noise_floor: Float[Tensor, "batch"]
    path_scales: tuple[float, ...]
    path_shift: Float[Tensor, "batch scale"]
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
    def path_ratio(self) -> Float[Tensor, "batch scale"]:
        """|R_y(ε)| / |g(ε) − g(0)| at each of `path_scales`."""
        return self._path_remainder.abs() / self.path_shift.abs()

    @property
    def _path_remainder(self) -> Float[Tensor, "batch scale"]:
        return (
            self.path_shift
            - self.path_shift.new_tensor(self.path_scales) * (self.first_order[:, None])
        )

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
        rows = zip(self._path_remainder.tolist(), self.path_shift.tolist(), strict=True)
        return tuple(
            verdict_of(
                shift=float(self.shift[i]),
                remainder=float(self.remainder[i]),
                noise_floor=float(self.noise_floor[i]),
                path=list(zip(self.path_scales, rest, moved, strict=True)),
            )
            for i, (rest, moved) in enumerate(rows)
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt: shift, first order, remainder, noise floor, the verdict's kind."""
        return pd.DataFrame(
            {
                "shift": self.shift.double().tolist(),
                "first_order": self.first_order.double().tolist(),
                "remainder": self.remainder.double().tolist(),
                "noise_floor": self.noise_floor.double().tolist(),
                "verdict": [verdict.kind for verdict in self.verdict],
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

    Cost: one forward and one backward, thirteen forward passes, and one per site with by_site.

    Args:
        lens: the adapter over the model.
        prompts: strings, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        by_site: also run each site alone.
        progress: show a bar.

    Raises:
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a readout or derivative that is not finite.
    """
    asked = ask(lens, prompts, readout)
    attribution = first_order_of(asked)
    steps = torch.stack([lens.gates(scale) for scale in CHECKPOINTS])
    way = gated_readout(lens, asked.reading, steps, progress=progress)
    site_shift = None
    if by_site:
        alone = torch.eye(len(lens.sites), dtype=lens.gate_dtype)
        corners = asked.at_gates(alone, progress=progress, what="single sites")
        site_shift = corners - attribution.base[:, None]
    return Remainder(
        shift=attribution.shift,
        first_order=attribution.total,
        noise_floor=asked.noise_floor,
        path_scales=CHECKPOINTS,
        path_shift=way - attribution.base[:, None],
        sites=lens.sites,
        site_first_order=attribution.per_site,
        site_shift=site_shift,
        readout=readout.label,
        units=readout.units,
        meta=attribution.meta,
    )
