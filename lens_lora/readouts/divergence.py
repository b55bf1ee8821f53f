"""KL between the base distribution and that at the gates, summed over a response, in nats:

    D(ε) = Σ_t KL(p_0,t ‖ p_ε,t),   or the other way round   Σ_t KL(p_ε,t ‖ p_0,t).

1. p₀ is held: it is run once, at gates of zero, and does not move with ε (`engine/asked.py`).
2. D(0) = 0 and ∇D(0) = 0, as a divergence is least where the two agree; so first order at ε = 0
   says nothing, and is refused. `kl_shares`, `path_attribution` and first order at ε = 1 do.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_lora.errors import ArgumentError
from lens_lora.readouts.answer_tokens import AnswerLike
from lens_lora.readouts.answers import AnswerLogProb
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.readout import Readout
from lens_lora.readouts.rows import Reading, one_row_each

__all__ = ["KL", "LARGEST_SHIFT", "Divergence", "Way", "held"]

Way = Literal["base_to_adapted", "adapted_to_base"]
# Of a logit: beyond it a probability that rounds to zero might grow to one.
LARGEST_SHIFT = 60.0


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
            return one_row_each(prompts, _unheld)
        reading = AnswerLogProb(self.response).over(model, prompts)
        return dataclasses.replace(reading, read=_unheld)

    @property
    def label(self) -> str:
        """`KL(base ‖ adapted)`, or the other way round."""
        there = self.direction == "base_to_adapted"
        of = "" if self.response is None else " of the response"
        return f"KL({'base ‖ adapted' if there else 'adapted ‖ base'}){of}"


def _unheld(logits: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, "row"]:
    raise RuntimeError("a KL is read before its base distribution was run")


def held(readout: KL, reading: Reading, base: Float[Tensor, "row *slot vocab"]) -> Reading:
    """The reading of a KL, with the distribution that it compares with.

    Args:
        readout: which way the divergence goes.
        reading: from `readout.over`.
        base: the logits of its rows at gates of zero.
    """
    rows = torch.arange(len(base), device="cpu")
    mask = reading.prompts.read_mask.to(base.device)
    there = readout.direction == "base_to_adapted"
    return dataclasses.replace(reading, read=Divergence(base, base.softmax(-1), mask, rows, there))


@dataclasses.dataclass(frozen=True, eq=False)
class Divergence:
    """Σ_t KL of each row's slots, in nats, from the shift d = f − f₀ less its mean Σ p₀ d.

    Attributes:
        base: f₀ of every row that is held.
        p: p₀, their softmax.
        mask: which slots of it hold a token.
        of: which held row each row is compared with.
        there: KL(p₀‖p), else KL(p‖p₀).
    """

    base: Float[Tensor, "held *slot vocab"]
    p: Float[Tensor, "held *slot vocab"]
    mask: Bool[Tensor, "held slot"]
    of: Int[Tensor, "row"]
    there: bool

    def __call__(self, logits: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, "row"]:
        """D of each row from its logits."""
        by_slot = torch.stack(
            [self._of_row(row, of) for row, of in zip(logits, self.of.tolist(), strict=True)]
        )
        return by_slot if by_slot.ndim == 1 else _over_slots(by_slot, self.mask[self.of])

    def _of_row(self, logits: Float[Tensor, "*slot vocab"], of: int) -> Float[Tensor, "*slot"]:
        base, p = (
            held[of][: len(logits)] if logits.ndim == 2 else held[of]
            for held in (self.base, self.p)
        )
        return _divergence(base.to(logits), p.to(logits), logits, self.there)

    def repeat(self, times: int) -> Divergence:
        """The readout of every row several times: r0 r0 … r1 r1 …

        Args:
            times: how often.
        """
        return dataclasses.replace(self, of=self.of.repeat_interleave(times))

    def only(self, rows: Int[Tensor, "some"]) -> Divergence:
        """The readout of these rows.

        Args:
            rows: their indices, increasing.
        """
        return dataclasses.replace(self, of=self.of[rows.to(self.of.device)])


def _over_slots(
    by_slot: Float[Tensor, "row slot"], mask: Bool[Tensor, "row all_slots"]
) -> Float[Tensor, "row"]:
    return (by_slot * mask[:, : by_slot.shape[1]].to(by_slot)).sum(1)


def _divergence(
    base: Float[Tensor, "*slot vocab"],
    p: Float[Tensor, "*slot vocab"],
    logits: Float[Tensor, "*slot vocab"],
    there: bool,
) -> Float[Tensor, "*slot"]:
    """KL(p₀‖p) = log Z − Σ p₀ d, or KL(p‖p₀) = Σ p₀ eᵈ d / Z − log Z, where Z = Σ p₀ eᵈ.

    Z and eᵈ are taken as what they exceed one by, so that rounding is that of a small divergence.
    `engine/distribution_shift.py` has the same sums in place, without derivatives.
    """
    shift = logits - base
    shift = shift - torch.linalg.vecdot(p, shift)[..., None]
    if float(shift.detach().amax()) > LARGEST_SHIFT:
        return _from_logarithms(base.log_softmax(-1), logits.log_softmax(-1), there)
    left = torch.linalg.vecdot(p, shift)  # of the mean, by rounding
    grown = torch.expm1(shift)
    rest = torch.linalg.vecdot(p, grown)
    if there:
        return rest.log1p() - left
    moved = torch.linalg.vecdot(p * shift, grown)
    return (moved + left) / (1 + rest) - rest.log1p()


def _from_logarithms(log_p: Tensor, log_q: Tensor, there: bool) -> Tensor:
    first, second = (log_p, log_q) if there else (log_q, log_p)
    return (first.exp() * (first - second)).sum(-1)
