"""The KL and the change of a distribution p when its logits shift by d, without another softmax.

With q = softmax(log p + d),

    Z = Σ p eᵈ = 1 + Σ p (eᵈ − 1)
    KL(p ‖ q) = log Z − Σ p d
    q − p = (p (eᵈ − 1) − (Z − 1) p) / Z

1. A constant added to all logits changes nothing, so the mean Σ p d is subtracted from d. Then the
   rounding error of the KL comes from the differences within d, not from the logits or the
   constant.
2. If d exceeds `LARGEST_SHIFT`, a probability that rounds to zero in p may be one in q, and q is
   computed as a softmax after all.

Everything is computed in place. `responses/divergence.py` has the same sums with derivatives.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.errors import require_finite
from lens_lora.responses.divergence import LARGEST_SHIFT

_Rows = Float[Tensor, "*row vocab"]


@dataclasses.dataclass(frozen=True)
class DistributionShift:
    """KL(p ‖ q) in nats, and q − p, which is only computed for the rows that a caller reads.

    Attributes:
        kl: the KL of each distribution.
        p: the distribution before the shift.
        p_expm1: p (eᵈ − 1), where d is without its mean.
        z_minus_1: Z − 1.
    """

    kl: Float[Tensor, "*row"]
    p: _Rows
    p_expm1: _Rows
    z_minus_1: Float[Tensor, "*row"]

    def at(self, *index: Tensor) -> Float[Tensor, "some vocab"]:
        """Compute q − p of some rows.

        Args:
            index: the indices of the rows, a tensor for each of their axes.
        """
        z_minus_1 = self.z_minus_1[index][:, None]
        return (self.p_expm1[index] - z_minus_1 * self.p[index]) / (1 + z_minus_1)

    def weighted(self, weights: Float[Tensor, " flat"]) -> Float[Tensor, " vocab"]:
        """Sum w (q − p) over all rows.

        Args:
            weights: w, one number for each row, with the axes of the rows flattened.
        """
        z_minus_1 = self.z_minus_1.flatten()
        weights_over_z = weights / (1 + z_minus_1)
        p = self.p.flatten(0, -2)
        p_expm1 = self.p_expm1.flatten(0, -2)
        return weights_over_z @ p_expm1 - (weights_over_z * z_minus_1) @ p


def distribution_shift(base: _Rows, p: _Rows, shift: _Rows) -> DistributionShift:
    """Compute how a distribution changes when its logits shift.

    Args:
        base: the logits of p.
        p: softmax(base).
        shift: d; it is overwritten.

    Raises:
        NumericsError: a shift is not finite.
    """
    require_finite(shift.sum(-1), "the shift of a logit")
    shift.sub_(_mean(p, shift)[..., None])
    if float(shift.amax()) > LARGEST_SHIFT:
        log_q = (base + shift).log_softmax(-1)
        log_p = base.log_softmax(-1)
        kl = (p * (log_p - log_q)).sum(-1)
        # q is normalised, so Z = 1, and p (eᵈ − 1) is q − p itself.
        q_minus_p = log_q.exp_().sub_(p)
        return DistributionShift(kl, p, q_minus_p, torch.zeros_like(kl))
    # Rounding leaves a small mean after the subtraction.
    mean = _mean(p, shift)
    p_expm1 = shift.expm1_().mul_(p)
    z_minus_1 = p_expm1.sum(-1)
    kl = z_minus_1.log1p() - mean
    return DistributionShift(kl, p, p_expm1, z_minus_1)


def _mean(p: _Rows, shift: _Rows) -> Float[Tensor, "*row"]:
    """Σ_v p(v) d(v) of each row."""
    by_row = torch.linalg.vecdot(p.flatten(0, -2), shift.flatten(0, -2))
    return by_row.view(p.shape[:-1])
