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
        base: f₀ of every row.
        base_rows: the row of `base` with which each pick is compared.
        is_from_base: whether it is KL(p₀‖p), else KL(p‖p₀).
        other_kept_logits: the logits that another reading keeps at the same time, which count as
            memory; None without one.
    """

    by_pick: ClassVar[tuple[str, ...]] = (*Picks.by_pick, "base_rows")
    base: Float[Tensor, "base_row *slot vocab"]
    base_rows: Int[Tensor, " pick"]
    is_from_base: bool
    other_kept_logits: Float[Tensor, "base_row *slot vocab"] | None = None

    @property
    def held_bytes(self) -> int:
        """The bytes of all logits that are kept."""
        if self.other_kept_logits is None:
            return self.base.nbytes
        return self.base.nbytes + self.other_kept_logits.nbytes

    def with_sides_exchanged(self, logits: Float[Tensor, "base_row *slot vocab"]) -> Divergence:
        """The same divergence, which keeps these logits and reads f₀.

        Args:
            logits: the logits of the adapted model.
        """
        return dataclasses.replace(
            self,
            base=logits,
            is_from_base=not self.is_from_base,
            other_kept_logits=self.base,
        )

    def terms(
        self, logits: Float[Tensor, "some vocab"], picks: Int[Tensor, " some"]
    ) -> Float[Tensor, " some"]:
        """The divergence at these picks."""
        chunks = list(zip(picks.split(_IN_CACHE), logits.split(_IN_CACHE), strict=True))
        divergences: list[Tensor] = []
        largest_shifts: list[Tensor] = []
        for chunk, logits_of_chunk in chunks:
            base, p = self._base_of(chunk, logits_of_chunk)
            divergence, largest = _from_shift(base, p, logits_of_chunk, self.is_from_base)
            divergences.append(divergence)
            largest_shifts.append(largest)
        # The largest shifts are copied from the device together; NaN also counts as too large.
        for index, largest in enumerate(torch.stack(largest_shifts).tolist()):
            if not largest <= LARGEST_SHIFT:
                chunk, logits_of_chunk = chunks[index]
                divergences[index] = self._from_logarithms(chunk, logits_of_chunk)
        return torch.cat(divergences)

    def _from_logarithms(
        self, picks: Int[Tensor, " chunk"], logits: Float[Tensor, "chunk vocab"]
    ) -> Float[Tensor, " chunk"]:
        """The divergence of two softmaxes, for a shift that is too large for its exponential."""
        base, _ = self._base_of(picks, logits)
        log_p = base.log_softmax(-1)
        log_q = logits.log_softmax(-1)
        if self.is_from_base:
            return (log_p.exp() * (log_p - log_q)).sum(-1)
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    def _base_of(
        self, picks: Int[Tensor, " chunk"], logits: Float[Tensor, "chunk vocab"]
    ) -> tuple[Float[Tensor, "#chunk vocab"], Float[Tensor, "#chunk vocab"]]:
        """The base's logits f₀ and distribution p₀ at these picks.

        Returns:
            f₀ and p₀: a row for each pick, or a single one if all picks are copies of one.
        """
        base_places = self.places(picks.device, rows=self.base_rows)
        places = torch.stack([index[picks] for index in base_places])
        # Copies of a pick follow one another, and the softmax of each is computed once.
        distinct, copy = places.unique_consecutive(dim=1, return_inverse=True)
        base = self.base[tuple(distinct.to(self.base.device))].to(logits)
        p = base.softmax(-1)
        is_one_pick = len(base) == 1
        are_all_distinct = len(base) == len(picks)
        if is_one_pick or are_all_distinct:
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
