"""What rounding alone makes of a shift, and of what first order leaves of it, at any strength."""

from __future__ import annotations

import dataclasses
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core.results.storage import stored

_Scale = float | Float[Tensor, " scale"]


@final
@stored
@dataclasses.dataclass(frozen=True, eq=False)
class Noise:
    """σ of each number from rounding alone, per prompt, in the readout's units.

    Attributes:
        shift: [batch], of g(1) − g(0).
        base: [batch], of g(ε) − g(0) where ε is small.
        slope: [batch], of Σ_l a_l.
    """

    shift: Float[Tensor, " batch"]
    base: Float[Tensor, " batch"]
    slope: Float[Tensor, " batch"]

    def of_shift(self, scale: _Scale) -> Float[Tensor, " batch *scale"]:
        """σ of g(ε) − g(0): from `base` to `shift`, its square with ε²."""
        eps, shift, base = self._beside(scale, self.shift, self.base)
        share = eps.square().clamp(max=1)
        return ((1 - share) * base.square() + share * shift.square()).sqrt()

    def of_remainder(
        self, scale: _Scale, curvature: Float[Tensor, " batch"] | None = None
    ) -> Float[Tensor, " batch *scale"]:
        """σ of g(ε) − g(0) − ε Σ a, or of what second order leaves as well."""
        eps, slope = self._beside(scale, self.slope)
        square = self.of_shift(scale).square() + (eps * slope).square()
        if curvature is not None:
            eps, bend = self._beside(scale, curvature)
            square = square + (eps.square() * bend).square()
        return square.sqrt()

    def _beside(self, scale: _Scale, *numbers: Float[Tensor, " batch"]) -> tuple[Tensor, ...]:
        """ε, and numbers of each prompt in shapes that go with it."""
        eps = torch.as_tensor(scale, dtype=self.shift.dtype, device=self.shift.device)
        return eps, *(row[:, None] if eps.ndim else row for row in numbers)
