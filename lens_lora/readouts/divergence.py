"""KL between the base distribution and that at the gates, summed over a response, in nats:

    D(ε) = Σ_t KL(p_0,t ‖ p_ε,t),   or the other way round   Σ_t KL(p_ε,t ‖ p_0,t).

1. f₀ is held: it is run once, at gates of zero, and does not move with ε (`engine/base_logits.py`).
2. D(0) = 0 and ∇D(0) = 0, as a divergence is least where the two agree; so first order at ε = 0
   says nothing, and is refused. `kl_shares`, `path_attribution` and first order at ε = 1 do.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.errors import ArgumentError
from lens_lora.readouts.answer_tokens import AnswerLike
from lens_lora.readouts.answers import AnswerLogProb
from lens_lora.readouts.picks import PICKS, at_some, of_slots
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.readout import Readout
from lens_lora.readouts.rows import Reading, one_row_each

__all__ = ["KL", "LARGEST_SHIFT", "Divergence", "Way", "held"]

Way = Literal["base_to_adapted", "adapted_to_base"]
# Of a logit: beyond it a probability that rounds to zero might grow to one.
LARGEST_SHIFT = 60.0
_IN_CACHE = 8  # picks whose sums are taken together


@dataclasses.dataclass(frozen=True, eq=False)
class KL(Readout):
    """KL between the base model's distribution and that at the gates, in nats.

    Its value at the base is zero, at the adapted model the divergence itself. Every analysis takes
    it but those that rest on the derivative at ε = 0, which is zero.

    Args:
        response: what is said after each prompt, as `AnswerLogProb` takes it: the sum over its
            tokens; None for the next token alone.
        direction: 'base_to_adapted', KL(p₀‖p), or 'adapted_to_base', KL(p‖p₀).

    Raises:
        ArgumentError: another direction.
    """

    response: AnswerLike | None = None
    direction: Way = "base_to_adapted"
    units = "nats"

    def __post_init__(self) -> None:
        if self.direction not in get_args(Way):
            raise ArgumentError(f"direction={self.direction!r}: expected one of {get_args(Way)}.")

    def over(self, model: Any, prompts: Prompts) -> Reading:
        """The prompts with their responses, one row each; p₀ is held later (`held`).

        Args:
            model: the hooked model.
            prompts: without the responses.

        Raises:
            TokenError, PromptError: a response that does not fit the model.
        """
        if self.response is None:
            return one_row_each(prompts, _Unheld())
        reading = AnswerLogProb(self.response).over(model, prompts)
        return dataclasses.replace(reading, read=_Unheld())

    @property
    def label(self) -> str:
        """`KL(base ‖ adapted)`, or the other way round."""
        there = self.direction == "base_to_adapted"
        of = "" if self.response is None else " of the response"
        return f"KL({'base ‖ adapted' if there else 'adapted ‖ base'}){of}"


class _Unheld:
    """Stands for the reading of a KL until its base distribution is known."""

    def __call__(self, logits: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, "row"]:
        raise RuntimeError("a KL is read before its base distribution was run")

    def repeat(self, times: int) -> _Unheld:
        return self

    def only(self, rows: Int[Tensor, "some"]) -> _Unheld:
        return self


def held(readout: KL, reading: Reading, base: Float[Tensor, "row *slot vocab"]) -> Reading:
    """The reading of a KL, with the distribution that it compares with.

    Args:
        readout: which way the divergence goes.
        reading: from `readout.over`.
        base: the logits of its rows at gates of zero.
    """
    there, prompts = readout.direction == "base_to_adapted", reading.prompts
    rows, slots = (index.cpu() for index in prompts.read_mask.nonzero(as_tuple=True))
    at = None if prompts.reads is None else slots
    return dataclasses.replace(reading, read=Divergence(base, rows, rows, at, len(base), there))


@dataclasses.dataclass(frozen=True, eq=False)
class Divergence:
    """Σ_t KL of each row's slots, in nats, from the shift d = f − f₀ less its mean Σ p₀ d.

    A pick is one of a row's slots; g of a row is the sum over its picks.

    Attributes:
        base: f₀ of every row that is held.
        of_held: which held row each pick is compared with.
        rows: each pick's row.
        slots: each pick's slot in its row; None for rows that are read at their last token only.
        batch: the number of rows.
        there: KL(p₀‖p), else KL(p‖p₀).
    """

    base: Float[Tensor, "held *slot vocab"]
    of_held: Int[Tensor, "pick"]
    rows: Int[Tensor, "pick"]
    slots: Int[Tensor, "pick"] | None
    batch: int
    there: bool

    def __call__(self, logits: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, "row"]:
        """D of each row from its logits, some of them at a time."""
        places = self.places(logits.device)
        every = torch.arange(len(self.rows), device="cpu").split(PICKS)
        each = [self.terms(logits[at_some(places, some)], some) for some in every]
        return self.of(torch.cat(each))

    @property
    def weights(self) -> Float[Tensor, "pick"]:
        """One each."""
        return torch.ones(len(self.rows), device="cpu")

    def places(self, device: torch.device) -> tuple[Int[Tensor, "pick"], ...]:
        """Where each pick is read, as indices of [row, vocab] or [row, slot, vocab].

        Args:
            device: of what is indexed.
        """
        return of_slots(self.rows, self.slots, device)

    def terms(
        self, logits: Float[Tensor, "some vocab"], some: Int[Tensor, "some"]
    ) -> Float[Tensor, "some"]:
        """The divergence at some picks.

        Args:
            logits: at the places of these picks.
            some: their indices.
        """
        pieces = list(zip(some.split(_IN_CACHE), logits.split(_IN_CACHE), strict=True))
        found = [_from_shift(*self._base_of(*piece), piece[1], self.there) for piece in pieces]
        largest = torch.stack([shift for _, shift in found]).tolist()
        return torch.cat(
            [
                near if shift <= LARGEST_SHIFT else self._from_logarithms(*piece)
                for (near, _), shift, piece in zip(found, largest, pieces, strict=True)
            ]
        )

    def _from_logarithms(
        self, few: Int[Tensor, "few"], logits: Float[Tensor, "few vocab"]
    ) -> Float[Tensor, "few"]:
        log_p, log_q = self._base_of(few, logits)[0].log_softmax(-1), logits.log_softmax(-1)
        first, second = (log_p, log_q) if self.there else (log_q, log_p)
        return (first.exp() * (first - second)).sum(-1)

    def _base_of(
        self, few: Int[Tensor, "few"], logits: Float[Tensor, "few vocab"]
    ) -> tuple[Float[Tensor, "#few vocab"], Float[Tensor, "#few vocab"]]:
        """f₀ and p₀, as one row where all are copies of one pick; copies stand together."""
        where = torch.stack(at_some(of_slots(self.of_held, self.slots, few.device), few))
        distinct, copy = where.unique_consecutive(dim=1, return_inverse=True)
        base = self.base[tuple(distinct.to(self.base.device))].to(logits)
        p = base.softmax(-1)
        if len(base) in (1, len(few)):
            return base, p
        copy = copy.to(logits.device)
        return base[copy], p[copy]

    def of(self, terms: Float[Tensor, "pick"]) -> Float[Tensor, "row"]:
        """D of each row.

        Args:
            terms: the divergence at each pick.
        """
        return terms.new_zeros(self.batch).index_add(0, self.rows.to(terms.device), terms)

    def repeat(self, times: int) -> Divergence:
        """The readout of every row several times: r0 r0 … r1 r1 …

        Args:
            times: how often.
        """
        copy = torch.arange(times, device="cpu")
        return dataclasses.replace(
            self,
            of_held=self.of_held.repeat_interleave(times),
            rows=(self.rows[:, None] * times + copy).flatten(),
            slots=None if self.slots is None else self.slots.repeat_interleave(times),
            batch=self.batch * times,
        )

    def only(self, rows: Int[Tensor, "some"]) -> Divergence:
        """The readout of these rows, counted from 0 again.

        Args:
            rows: their indices, increasing.
        """
        rows = rows.to(self.rows)
        mine = torch.isin(self.rows, rows)
        return dataclasses.replace(
            self,
            of_held=self.of_held[mine],
            rows=torch.searchsorted(rows, self.rows[mine]),
            slots=None if self.slots is None else self.slots[mine],
            batch=len(rows),
        )


def _from_shift(
    base: Float[Tensor, "#pick vocab"],
    p: Float[Tensor, "#pick vocab"],
    logits: Float[Tensor, "pick vocab"],
    there: bool,
) -> tuple[Float[Tensor, "pick"], Float[Tensor, ""]]:
    """KL(p₀‖p) = log Z − Σ p₀ d, or KL(p‖p₀) = Σ p₀ eᵈ d / Z − log Z, where Z = Σ p₀ eᵈ.

    Z and eᵈ are taken as what they exceed one by, so that rounding is that of a small divergence.
    Also the largest d, beyond which this is not to be used.
    `engine/distribution_shift.py` has the same sums in place, without derivatives.
    """
    shift = logits - base
    shift = shift - torch.linalg.vecdot(p, shift)[..., None]
    largest = shift.detach().amax()
    left = torch.linalg.vecdot(p, shift)  # of the mean, by rounding
    grown = torch.expm1(shift)
    rest = torch.linalg.vecdot(p, grown)
    if there:
        return rest.log1p() - left, largest
    moved = torch.linalg.vecdot(p * shift, grown)
    return (moved + left) / (1 + rest) - rest.log1p(), largest
