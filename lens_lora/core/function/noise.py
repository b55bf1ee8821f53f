"""The noise σ of g(ε) − g(0), and of what first order leaves of it, from rounding alone.

σ(ε)²            = (1 − ε²) σ_base² + ε² σ_shift²     of g(ε) − g(0), for ε up to 1
σ_remainder(ε)²  = σ(ε)² + (ε σ_a)² (+ (ε² σ_H)²)     of what first (second) order leaves
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.arguments import number, numbers_of
from lens_lora.core.results.storage import stored
from lens_lora.errors import ArgumentError

_Scale = float | Float[Tensor, " scale"]


@final
@stored
@dataclasses.dataclass(frozen=True, eq=False)
class Noise:
    """The noise σ from rounding alone, for each prompt, in the readout's units.

    Attributes:
        shift: [batch], σ of g(1) − g(0).
        base: [batch], σ of g(ε) − g(0) at small ε.
        slope: [batch], σ of Σ_l a_l.
    """

    shift: Float[Tensor, " batch"]
    base: Float[Tensor, " batch"]
    slope: Float[Tensor, " batch"]

    def of_shift(self, scale: _Scale) -> Float[Tensor, " batch *scale"]:
        """The noise σ of g(ε) − g(0), whose square goes from `base`² to `shift`² with ε²."""
        eps = self._as_tensor(scale)
        base = self._beside(eps, self.base)
        shift = self._beside(eps, self.shift)
        share = eps.square().clamp(max=1)
        return ((1 - share) * base.square() + share * shift.square()).sqrt()

    def of_remainder(
        self, scale: _Scale, curvature: Float[Tensor, " batch"] | None = None
    ) -> Float[Tensor, " batch *scale"]:
        """The noise σ of g(ε) − g(0) − ε Σ a; with `curvature`, of what second order leaves."""
        eps = self._as_tensor(scale)
        slope = self._beside(eps, self.slope)
        square = self.of_shift(scale).square() + (eps * slope).square()
        if curvature is not None:
            square = square + (eps.square() * self._beside(eps, curvature)).square()
        return square.sqrt()

    def _as_tensor(self, scale: _Scale) -> Float[Tensor, " *scale"]:
        return torch.as_tensor(scale, dtype=self.shift.dtype, device=self.shift.device)

    @staticmethod
    def _beside(eps: Tensor, numbers: Float[Tensor, " batch"]) -> Tensor:
        """The numbers of each prompt, with an axis for strengths if there are several."""
        return numbers[:, None] if eps.ndim else numbers


def scale_of_each(at: float | Sequence[float], count: int) -> list[float]:
    """The strength of each value, given one for all values or one for each.

    Raises:
        ArgumentError: no values, or another number of strengths.
    """
    if isinstance(at, Sequence) or (isinstance(at, Tensor) and at.ndim):
        scales = list(numbers_of("at", at))
    else:
        scales = [number("at", at)] * count
    if not count or len(scales) != count:
        raise ArgumentError(
            f"{count} coefficients and {len(scales)} strengths",
            remedy="give each value of g its coefficient, and one strength for all or one for "
            "each.",
        )
    return scales
