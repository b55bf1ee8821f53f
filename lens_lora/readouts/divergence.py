"""KL between the base distribution and that at the gates, summed over a response, in nats:

    D(ε) = Σ_t KL(p_0,t ‖ p_ε,t),   or the other way round   Σ_t KL(p_ε,t ‖ p_0,t).

1. f₀ is held: it is run once, at gates of zero, and does not move with ε (`engine/asked.py`).
2. D(0) = 0 and ∇D(0) = 0, as a divergence is least where the two agree; so first order at ε = 0
   says nothing, and is refused. `kl_shares`, `path_attribution` and first order at ε = 1 do.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora import arguments
from lens_lora.readouts.answers import AnswerLike, AnswerLogProb
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.reading import Picks, Reading, at_some, of_slots, one_row_each
from lens_lora.readouts.readout import Readout

Way = Literal["base_to_adapted", "adapted_to_base"]
# Of a logit, in nats: beyond it a probability that rounds to zero might grow to one.
LARGEST_SHIFT = 60.0
_IN_CACHE = 8  # picks whose sums are taken together, so that their rows stay in the cache


@dataclasses.dataclass(frozen=True, eq=False)
class KL(Readout):
    """KL between the base model's distribution and that at the gates, in nats.

    Its value at the base is zero, at the adapted model the divergence itself. Every analysis takes
    it but those that rest on the derivative at ε = 0, which is zero. The base's distribution is
    computed once and held; the rounding in it is part of the noise floors.

    Args:
        response: the answer to each prompt, as `AnswerLogProb` takes it: the sum over its
            tokens; None for the next token alone.
        direction: 'base_to_adapted', KL(p₀‖p), or 'adapted_to_base', KL(p‖p₀).

    Raises:
        ArgumentError: another direction.
    """

    response: AnswerLike | None = None
    direction: Way = "base_to_adapted"
    units = "nats"

    def __post_init__(self) -> None:
        arguments.word("direction", self.direction, get_args(Way))

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
        sides = "base ‖ adapted" if self.direction == "base_to_adapted" else "adapted ‖ base"
        return f"KL({sides}){'' if self.response is None else ' of the response'}"


class _Unheld:
    """Stands for the reading of a KL until its base distribution is known."""

    def __call__(self, logits: Float[Tensor, "row *slot vocab"]) -> Float[Tensor, " row"]:
        raise RuntimeError("a KL is read before its base distribution was run")

    def repeat(self, times: int) -> _Unheld:
        return self

    def only(self, rows: Int[Tensor, " some"]) -> _Unheld:
        return self


def held(readout: KL, reading: Reading, base: Float[Tensor, "row *slot vocab"]) -> Reading:
    """The reading of a KL, with the base distribution that it compares with."""
    prompts = reading.prompts
    rows, slots = (index.cpu() for index in prompts.read_mask.nonzero(as_tuple=True))
    divergence = Divergence(
        rows=rows,
        slots=None if prompts.reads is None else slots,
        owner=rows,
        weights=torch.ones(len(rows), device="cpu"),
        batch=len(base),
        base=base,
        held_rows=rows,
        is_from_base=readout.direction == "base_to_adapted",
    )
    return dataclasses.replace(reading, read=divergence)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Divergence(Picks):
    """Σ_t KL of each row's slots, in nats, from the shift d = f − f₀ less its mean Σ p₀ d.

    A pick is one of a row's slots; a row is its own prompt.

    Attributes:
        base: f₀ of every row that is held.
        held_rows: the held row with which each pick is compared.
        is_from_base: whether KL(p₀‖p) is read, else KL(p‖p₀).
        beside: the logits that another reading holds meanwhile; None without one.
    """

    by_pick: ClassVar[tuple[str, ...]] = (*Picks.by_pick, "held_rows")
    base: Float[Tensor, "held *slot vocab"]
    held_rows: Int[Tensor, " pick"]
    is_from_base: bool
    beside: Float[Tensor, "held *slot vocab"] | None = None

    @property
    def held_bytes(self) -> int:
        """The memory of all logits that are held."""
        return self.base.nbytes + (0 if self.beside is None else self.beside.nbytes)

    def turned(self, logits: Float[Tensor, "held *slot vocab"]) -> Divergence:
        """The same divergence with the other side held: read from f₀, beside these logits."""
        is_from_base = not self.is_from_base
        return dataclasses.replace(self, base=logits, is_from_base=is_from_base, beside=self.base)

    def terms(
        self, logits: Float[Tensor, "some vocab"], picks: Int[Tensor, " some"]
    ) -> Float[Tensor, " some"]:
        """The divergence at these picks."""
        pieces = list(zip(picks.split(_IN_CACHE), logits.split(_IN_CACHE), strict=True))
        near = [_from_shift(*self._base_at(*p), p[1], self.is_from_base) for p in pieces]
        largest = torch.stack([shift for _, shift in near]).tolist()
        return torch.cat(
            [
                kl if shift <= LARGEST_SHIFT else self._from_logarithms(*piece)
                for (kl, _), shift, piece in zip(near, largest, pieces, strict=True)
            ]
        )

    def _from_logarithms(
        self, few: Int[Tensor, " few"], logits: Float[Tensor, "few vocab"]
    ) -> Float[Tensor, " few"]:
        log_p, log_q = self._base_at(few, logits)[0].log_softmax(-1), logits.log_softmax(-1)
        first, second = (log_p, log_q) if self.is_from_base else (log_q, log_p)
        return (first.exp() * (first - second)).sum(-1)

    def _base_at(
        self, few: Int[Tensor, " few"], logits: Float[Tensor, "few vocab"]
    ) -> tuple[Float[Tensor, "#few vocab"], Float[Tensor, "#few vocab"]]:
        """f₀ and p₀, as one row where all are copies of one pick; copies stand together."""
        places = torch.stack(at_some(of_slots(self.held_rows, self.slots, few.device), few))
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

    Z and eᵈ are taken as what they exceed one by, so that rounding is that of a small divergence.
    Also the largest d, beyond which this is not to be used.
    `distribution_shift` in `engine/texts.py` has the same sums in place, without derivatives.
    """
    shift = logits - base
    shift = shift - torch.linalg.vecdot(p, shift)[..., None]
    largest = shift.detach().amax()
    left = torch.linalg.vecdot(p, shift)  # of the mean, by rounding
    grown = torch.expm1(shift)
    rest = torch.linalg.vecdot(p, grown)
    if is_from_base:
        return rest.log1p() - left, largest
    moved = torch.linalg.vecdot(p * shift, grown)
    return (moved + left) / (1 + rest) - rest.log1p(), largest
