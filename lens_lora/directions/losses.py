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
from jaxtyping import Float, Int
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
        # The logits at a token predict the next one; after the last token there is none.
        with unhooked():
            before = logits_of(base, rows)[:, :-1]
        after = logits_of(base, rows)[:, :-1]
        is_predicted = rows.after_first[:, 1:].to(before.device)
        next_ids = rows.tokens[:, 1:].to(before.device)

        def summed(values: Float[Tensor, "row pos"]) -> Float[Tensor, " row"]:
            return values.masked_fill(~is_predicted, 0.0).cpu().double().sum(1)

        plain[index] = summed(surprisal(before, next_ids))
        hooked[index] = summed(surprisal(after, next_ids))
        shift = distribution_shift(before, before.softmax(-1), after - before)
        kl[index] = summed(shift.kl)

    over_texts(lens, texts, TOKENS_AT_ONCE, visit, "the base's loss", progress)
    return Losses(plain, hooked, kl, (texts.lengths - 1).cpu())


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


def surprisal(
    logits: Float[Tensor, "row pos vocab"], ids: Int[Tensor, "row pos"]
) -> Float[Tensor, "row pos"]:
    """The surprisal −log p of these tokens, in nats."""
    log_p = logits.log_softmax(-1)
    return -log_p.gather(2, ids[..., None])[..., 0]
