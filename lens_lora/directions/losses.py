"""The base model's loss on texts, without and with the caller's hooks.

For each text these are sums over the tokens after its first, in nats:

    Σ_t −log p(y_t)  without the hooks and with them,    and    Σ_t KL(p without ‖ p with).

Cost: two forward passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_lora.core import LoraLens, Prompts, PromptsLike
from lens_lora.errors import PromptError
from lens_lora.texts.batches import TOKENS_AT_ONCE, logits_of, over_texts
from lens_lora.texts.distribution_shift import distribution_shift
from lens_lora.texts.neutral import readable_texts

# Every eighth of the neutral texts is read, which is enough to tell what a change costs.
_EVERY = 8


@dataclasses.dataclass(frozen=True)
class Losses:
    """The base's loss on texts without the caller's hooks and with them.

    Attributes:
        plain, hooked: [text], Σ_t −log p(y_t) in nats.
        kl: [text], Σ_t KL(plain ‖ hooked) in nats.
        counts: [text], the number of tokens that each sum is over.
    """

    plain: Float[Tensor, " text"]
    hooked: Float[Tensor, " text"]
    kl: Float[Tensor, " text"]
    counts: Int[Tensor, " text"]


def losses(
    lens: LoraLens,
    texts: Prompts,
    unhooked: Callable[[], AbstractContextManager[None]],
    *,
    progress: bool,
) -> Losses:
    """The base's loss on texts within `unhooked` and without it. Two forward passes.

    Args:
        lens: the adapter over the model; its gates are 0.
        texts: prompts of at least two tokens each.
        unhooked: begins a block in which the caller's hooks do nothing.
        progress: show a bar.

    Raises:
        NumericsError: a logit is not finite.
    """
    plain = torch.zeros(texts.batch, dtype=torch.float64)
    hooked = torch.zeros(texts.batch, dtype=torch.float64)
    kl = torch.zeros(texts.batch, dtype=torch.float64)
    base = lens, lens.gates(0.0)

    def visit(index: list[int], rows: Prompts) -> None:
        predicted = PredictedTokens.of(rows)
        with unhooked():
            before = logits_of(base, rows)
        after = logits_of(base, rows)
        plain[index] = predicted.loss(before)
        hooked[index] = predicted.loss(after)
        kl[index] = predicted.divergence(before, before.softmax(-1), after)

    over_texts(lens, texts, TOKENS_AT_ONCE, visit, "the base's loss", progress)
    return Losses(plain, hooked, kl, (texts.lengths - 1).cpu())


@dataclasses.dataclass(frozen=True)
class PredictedTokens:
    """The tokens of some rows that are predicted: all that follow another token of their row.

    The logits at a token predict the next one, so those at the last token predict nothing.

    Attributes:
        ids: the token after each token but the last.
        exist: whether it is a token of the row, and no padding.
    """

    ids: Int[Tensor, "row next"]
    exist: Bool[Tensor, "row next"]

    @classmethod
    def of(cls, rows: Prompts) -> PredictedTokens:
        """The predicted tokens of these rows."""
        return cls(rows.tokens[:, 1:], rows.after_first[:, 1:])

    def loss(self, logits: Float[Tensor, "row token vocab"]) -> Float[Tensor, " row"]:
        """Σ_t −log p(y_t) of each row, in nats, in float64 on the CPU."""
        log_p = logits[:, :-1].log_softmax(-1)
        ids = self.ids.to(log_p.device)
        return self._sum(-log_p.gather(2, ids[..., None])[..., 0])

    def divergence(
        self,
        base: Float[Tensor, "row token vocab"],
        p: Float[Tensor, "row token vocab"],
        other: Float[Tensor, "row token vocab"],
    ) -> Float[Tensor, " row"]:
        """Σ_t KL(base ‖ other) of each row, in nats, in float64 on the CPU.

        Args:
            base: the base's logits.
            p: their softmax, which several other models share.
            other: the other model's logits.
        """
        logits = base[:, :-1]
        shift = distribution_shift(logits, p[:, :-1], other[:, :-1] - logits)
        return self._sum(shift.kl)

    def _sum(self, values: Float[Tensor, "row next"]) -> Float[Tensor, " row"]:
        exist = self.exist.to(values.device)
        return values.masked_fill(~exist, 0.0).cpu().double().sum(1)


def texts_or_neutral(lens: LoraLens, texts: PromptsLike | None) -> PromptsLike:
    """The caller's texts, or some of the package's neutral ones if there are none.

    Raises:
        PromptError: there are no texts, and no tokenizer that reads the neutral ones.
    """
    if texts is None and getattr(lens.model, "tokenizer", None) is not None:
        texts = readable_texts(lens.model, lens.prepend_bos, _EVERY)
    if texts is None:
        raise PromptError(
            "the model has no tokenizer that reads the neutral texts",
            remedy="pass texts= of your own.",
        )
    return texts
