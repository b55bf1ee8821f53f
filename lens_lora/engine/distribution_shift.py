"""What a shift d of the logits does to a distribution p, without another softmax.

    Z = 1 + Σ p (eᵈ − 1),    KL(p ‖ q) = log Z − Σ p d,    q − p = (p (eᵈ − 1) − (Z − 1) p) / Z

d counts from its mean Σ p d, as a constant in all logits changes nothing: the rounding of a KL is
then that of what d differs by, not of the logits or of the constant. Beyond `LARGEST_SHIFT` q is a
softmax.

Cost: no forward pass; the logits are read a few times, in place.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.engine.function import require_finite
from lens_lora.readouts.divergence import LARGEST_SHIFT

__all__ = ["DistributionShift", "distribution_shift"]


@dataclasses.dataclass(frozen=True)
class DistributionShift:
    """KL(p ‖ q) in nats, and q − p, which is built for the rows that are asked for.

    Attributes:
        kl: of each distribution.
        p: before the shift.
        grown: p (eᵈ − 1), d from its mean.
        rest: Z − 1.
    """

    kl: Float[Tensor, "*row"]
    p: Float[Tensor, "*row vocab"]
    grown: Float[Tensor, "*row vocab"]
    rest: Float[Tensor, "*row"]

    def at(self, *index: Tensor) -> Float[Tensor, "some vocab"]:
        """q − p of some rows.

        Args:
            index: of the rows, one tensor for each of their axes.
        """
        rest = self.rest[index][:, None]
        return (self.grown[index] - rest * self.p[index]) / (1 + rest)

    def weighted(self, weights: Float[Tensor, "flat"]) -> Float[Tensor, "vocab"]:
        """Σ w (q − p) over all rows.

        Args:
            weights: of the rows, flattened.
        """
        rest = self.rest.flatten()
        each = weights / (1 + rest)
        return each @ self.grown.flatten(0, -2) - (each * rest) @ self.p.flatten(0, -2)


def distribution_shift(
    base: Float[Tensor, "*row vocab"],
    p: Float[Tensor, "*row vocab"],
    shift: Float[Tensor, "*row vocab"],
) -> DistributionShift:
    """KL and q − p of a shift of the logits.

    Args:
        base: logits before it.
        p: their softmax.
        shift: d; overwritten.

    Raises:
        NumericsError: a shift that is not finite.
    """
    require_finite(shift.sum(-1), "the shift of a logit")
    shift.sub_(_mean(p, shift)[..., None])
    if float(shift.amax()) > LARGEST_SHIFT:
        log_q, log_p = (base + shift).log_softmax(-1), base.log_softmax(-1)
        kl = (p * (log_p - log_q)).sum(-1)
        return DistributionShift(kl, p, log_q.exp_().sub_(p), torch.zeros_like(kl))
    linear = _mean(p, shift)  # what rounding left of it
    grown = shift.expm1_().mul_(p)
    rest = grown.sum(-1)
    return DistributionShift(rest.log1p() - linear, p, grown, rest)


def _mean(
    p: Float[Tensor, "*row vocab"], shift: Float[Tensor, "*row vocab"]
) -> Float[Tensor, "*row"]:
    return torch.linalg.vecdot(p.flatten(0, -2), shift.flatten(0, -2)).view(p.shape[:-1])
