"""What rounding alone does to a shift, and to what first or second order leaves of it."""

from __future__ import annotations

import dataclasses
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.engine.asked import Asked
from lens_lora.engine.noise import first_order_noise
from lens_lora.results.attribution import Attribution
from lens_lora.results.storage import stored

__all__ = ["Noise", "noise_of"]

_At = float | Float[Tensor, "scale"]


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

    shift: Float[Tensor, "batch"]
    base: Float[Tensor, "batch"]
    slope: Float[Tensor, "batch"]

    def of_shift(self, scale: _At) -> Float[Tensor, "batch *scale"]:
        """σ of g(ε) − g(0): from `base` to `shift`, its square with ε².

        Args:
            scale: ε, or several.
        """
        eps, shift, base = self._beside(scale, self.shift, self.base)
        share = eps.square().clamp(max=1)
        return ((1 - share) * base.square() + share * shift.square()).sqrt()

    def of_remainder(
        self, scale: _At, curvature: Float[Tensor, "batch"] | None = None
    ) -> Float[Tensor, "batch *scale"]:
        """σ of g(ε) − g(0) − ε Σ a, or of what second order leaves as well.

        Args:
            scale: ε, or several.
            curvature: [batch], σ of ½ 1ᵀH1; None for what first order leaves.
        """
        eps, slope = self._beside(scale, self.slope)
        square = self.of_shift(scale).square() + (eps * slope).square()
        if curvature is not None:
            eps, bend = self._beside(scale, curvature)
            square = square + (eps.square() * bend).square()
        return square.sqrt()

    def _beside(self, scale: _At, *of: Tensor) -> tuple[Tensor, ...]:
        """ε and numbers of each prompt, in shapes that go together."""
        eps = torch.as_tensor(scale, dtype=self.shift.dtype, device=self.shift.device)
        return eps, *(each[:, None] if eps.ndim else each for each in of)


def noise_of(asked: Asked, first: Attribution) -> Noise:
    """Fourteen forward passes and four backward, batched; none after `slopes_with_floors`.

    Args:
        asked: the lens, the prompts and the readout.
        first: first order at ε = 0.
    """
    floor = asked.noise_floor
    both = first_order_noise(asked.lens, asked.slope_draws, asked.base_draws, first.per_site)
    return Noise(floor, *both)
