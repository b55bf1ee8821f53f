"""The terms of a KL, computed from logits and from those of the base model, which are kept.

    KL(p₀‖p) = log Z − Σ p₀ d,      KL(p‖p₀) = Σ p₀ eᵈ d / Z − log Z,      Z = Σ p₀ eᵈ,

where d = f − f₀ is the shift of the logits, minus its mean Σ p₀ d.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.core import Picks

# The largest shift of a logit, in nats, for which the formulas hold: with a larger one, a
# probability that rounds to zero might grow to one.
LARGEST_SHIFT = 60.0
# The number of picks that are summed together, so that their rows stay in the processor's cache.
_IN_CACHE = 8


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Divergence(Picks):
    """Σ_t KL of each row's slots, in nats, from the shift d = f − f₀ minus its mean Σ p₀ d.

    A pick is one of a row's slots; a row is its own prompt.

    Attributes:
        base: f₀ of every row that is kept.
        held_rows: the kept row with which each pick is compared.
        is_from_base: whether it is KL(p₀‖p), else KL(p‖p₀).
        beside: the logits that another reading keeps at the same time; None without one.
    """

    by_pick: ClassVar[tuple[str, ...]] = (*Picks.by_pick, "held_rows")
    base: Float[Tensor, "held *slot vocab"]
    held_rows: Int[Tensor, " pick"]
    is_from_base: bool
    beside: Float[Tensor, "held *slot vocab"] | None = None

    @property
    def held_bytes(self) -> int:
        """The bytes of all logits that are kept."""
        if self.beside is None:
            return self.base.nbytes
        return self.base.nbytes + self.beside.nbytes

    def turned(self, logits: Float[Tensor, "held *slot vocab"]) -> Divergence:
        """The same divergence with the sides exchanged: these logits are kept, and f₀ is read."""
        is_from_base = not self.is_from_base
        return dataclasses.replace(self, base=logits, is_from_base=is_from_base, beside=self.base)

    def terms(
        self, logits: Float[Tensor, "some vocab"], picks: Int[Tensor, " some"]
    ) -> Float[Tensor, " some"]:
        """The divergence at these picks."""
        chunks = list(zip(picks.split(_IN_CACHE), logits.split(_IN_CACHE), strict=True))
        divergences: list[Tensor] = []
        largest_shifts: list[Tensor] = []
        for few, logits_of_few in chunks:
            base, p = self._base_at(few, logits_of_few)
            divergence, largest = _from_shift(base, p, logits_of_few, self.is_from_base)
            divergences.append(divergence)
            largest_shifts.append(largest)
        # The largest shifts are copied from the device together; NaN also counts as too large.
        for i, largest in enumerate(torch.stack(largest_shifts).tolist()):
            if not largest <= LARGEST_SHIFT:
                few, logits_of_few = chunks[i]
                divergences[i] = self._from_logarithms(few, logits_of_few)
        return torch.cat(divergences)

    def _from_logarithms(
        self, few: Int[Tensor, " some"], logits: Float[Tensor, "some vocab"]
    ) -> Float[Tensor, " some"]:
        """The divergence of two softmaxes, for a shift that is too large for its exponential."""
        base, _ = self._base_at(few, logits)
        log_p = base.log_softmax(-1)
        log_q = logits.log_softmax(-1)
        if self.is_from_base:
            return (log_p.exp() * (log_p - log_q)).sum(-1)
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    def _base_at(
        self, few: Int[Tensor, " some"], logits: Float[Tensor, "some vocab"]
    ) -> tuple[Tensor, Tensor]:
        """The base's logits f₀ and distribution p₀ at these picks.

        If all are copies of one pick, they are one row.
        """
        held_places = self.places(few.device, rows=self.held_rows)
        places = torch.stack([index[few] for index in held_places])
        # Copies of a pick follow one another.
        distinct, copy = places.unique_consecutive(dim=1, return_inverse=True)
        base = self.base[tuple(distinct.to(self.base.device))].to(logits)
        p = base.softmax(-1)
        if len(base) in (1, len(few)):
            return base, p
        copy = copy.to(logits.device)
        return base[copy], p[copy]


def _from_shift(
    base: Float[Tensor, "#pick vocab"],
    p: Float[Tensor, "#pick vocab"],
    logits: Float[Tensor, "pick vocab"],
    is_from_base: bool,
) -> tuple[Float[Tensor, " pick"], Float[Tensor, ""]]:
    """KL(p₀‖p) = log Z − Σ p₀ d, or KL(p‖p₀) = Σ p₀ eᵈ d / Z − log Z, where Z = Σ p₀ eᵈ.

    Z − 1 and eᵈ − 1 are computed in place of Z and eᵈ, so that the rounding error is that of a
    small divergence. `texts/distribution_shift.py` has the same sums in place, without derivatives.

    Returns:
        The divergence, and the largest d, which tells whether it can be trusted.
    """
    shift = logits - base
    d = shift - torch.linalg.vecdot(p, shift)[..., None]
    largest = d.detach().amax()
    # The mean was subtracted, and rounding left this much of it.
    mean = torch.linalg.vecdot(p, d)
    expm1 = torch.expm1(d)
    z_minus_1 = torch.linalg.vecdot(p, expm1)
    log_z = z_minus_1.log1p()
    if is_from_base:
        return log_z - mean, largest
    # Σ p₀ eᵈ d, as Σ p₀ d (eᵈ − 1) + Σ p₀ d.
    weighted_shift = torch.linalg.vecdot(p * d, expm1) + mean
    return weighted_shift / (1 + z_minus_1) - log_z, largest
