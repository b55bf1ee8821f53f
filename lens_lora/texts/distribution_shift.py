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

Everything is computed in place. `responses/held_base.py` has the same sums with derivatives.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.errors import require_finite
from lens_lora.responses.held_base import LARGEST_SHIFT

_Rows = Float[Tensor, "*row vocab"]


@dataclasses.dataclass(frozen=True)
class DistributionShift:
    """KL(p ‖ q) in nats, and q − p, which is only computed for the rows that a caller reads.

    Attributes:
        kl: the KL of each distribution.
        p: the distribution before the shift.
        grown: p (eᵈ − 1), with d minus its mean.
        rest: Z − 1.
    """

    kl: Float[Tensor, "*row"]
    p: _Rows
    grown: _Rows
    rest: Float[Tensor, "*row"]

    def at(self, *index: Tensor) -> Float[Tensor, "some vocab"]:
        """Compute q − p of some rows.

        Args:
            index: the indices of the rows, a tensor for each of their axes.
        """
        rest = self.rest[index][:, None]
        return (self.grown[index] - rest * self.p[index]) / (1 + rest)

    def weighted(self, weights: Float[Tensor, " flat"]) -> Float[Tensor, " vocab"]:
        """Sum w (q − p) over all rows.

        Args:
            weights: w, one number for each row, with the axes of the rows flattened.
        """
        rest = self.rest.flatten()
        by_row = weights / (1 + rest)
        p = self.p.flatten(0, -2)
        grown = self.grown.flatten(0, -2)
        return by_row @ grown - (by_row * rest) @ p


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
        return DistributionShift(kl, p, log_q.exp_().sub_(p), torch.zeros_like(kl))
    # Rounding leaves a small mean after the subtraction.
    mean = _mean(p, shift)
    grown = shift.expm1_().mul_(p)
    rest = grown.sum(-1)
    return DistributionShift(rest.log1p() - mean, p, grown, rest)


def _mean(p: _Rows, shift: _Rows) -> Float[Tensor, "*row"]:
    """Σ_v p(v) d(v) of each row."""
    by_row = torch.linalg.vecdot(p.flatten(0, -2), shift.flatten(0, -2))
    return by_row.view(p.shape[:-1])
