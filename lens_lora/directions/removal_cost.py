"""The cost of `lens.ablate_directions` is the rise of the base model's own loss on ordinary texts.

The texts have nothing to do with the direction that is removed. A removal that breaks the model on
them also breaks whatever else one asks of it, so it says nothing about the direction.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import final

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.core import Described, LoraLens, Prompts, PromptsLike, alone
from lens_lora.directions.losses import losses, texts_or_neutral
from lens_lora.directions.removal import Removed, put_back, removed_from
from lens_lora.errors import ModelStateError
from lens_lora.texts.batches import require_second_token


@final
class RemovalCost(Described):
    """The cost of taking directions out of the base model, on texts, in nats per token.

    All means are over the tokens after each text's first.

    Attributes:
        base: [text], the mean of −log p(y_t) of the base as it is.
        removed: [text], the mean of −log p(y_t) of the base within the block.
        kl: [text], the mean of KL(base ‖ base within the block).
        counts: [text], how many tokens the means are over.
        what: which directions are removed where, in words.
        meta: model, adapter, dtype and versions.
    """

    base: Float[Tensor, " text"]
    removed: Float[Tensor, " text"]
    kl: Float[Tensor, " text"]
    counts: Int[Tensor, " text"]
    what: str

    @property
    def cost(self) -> float:
        """The rise of the base's loss, in nats per token over all texts."""
        return self._mean(self.removed) - self._mean(self.base)

    @property
    def mean_kl(self) -> float:
        """KL(base ‖ base within the block), in nats per token over all texts."""
        return self._mean(self.kl)

    def _mean(self, values: Float[Tensor, " text"]) -> float:
        return float((values * self.counts).sum() / self.counts.sum())

    def to_frame(self) -> pd.DataFrame:
        """One row per text: tokens, both losses, the cost and KL."""
        return pd.DataFrame(
            {
                "tokens": self.counts.tolist(),
                "base": self.base.tolist(),
                "removed": self.removed.tolist(),
                "cost": (self.removed - self.base).tolist(),
                "kl": self.kl.tolist(),
            }
        )


@alone
def removal_cost(
    lens: LoraLens, texts: PromptsLike | None = None, *, progress: bool = True
) -> RemovalCost:
    """The cost of an open `lens.ablate_directions` to the base model itself, in nats per token.

    Call it within the block. A direction whose removal costs little and undoes a behaviour carries
    it; one whose removal breaks the base shows nothing.

    Cost: two forward passes over the texts.

    Args:
        lens: the adapter over the model; the adapter takes no part.
        texts: strings, conversations, ids, or `Prompts` of two tokens at least; None for every
            eighth of the package's neutral texts.
        progress: show a bar.

    Returns:
        RemovalCost; `.cost` is the rise of the loss over all texts.

    Raises:
        ModelStateError: no block of `lens.ablate_directions` is open on this model; its positions
            are none of the tokens before the texts' last ones, as of 'response' or −1 on neutral
            texts.
        PromptError: a text that does not fit the model, or of one token.
        NumericsError: a non-finite logit.
    """
    removed = removed_from(lens.model)
    if not removed:
        raise ModelStateError(
            "no direction is removed from this model at the moment",
            remedy="make the call within the block: "
            "`with lens.ablate_directions(direction): ll.removal_cost(lens)`.",
        )
    rows = lens.function(texts_or_neutral(lens, texts)).prompts
    require_second_token(rows, "the loss")
    _require_counted(rows, removed)
    found = losses(lens, rows, functools.partial(put_back, lens.model), progress=progress)
    return RemovalCost(
        base=found.plain / found.counts,
        removed=found.hooked / found.counts,
        kl=found.kl / found.counts,
        counts=found.counts,
        what="; ".join(block.says for block in removed),
        meta=lens.describe(rows),
    )


def _require_counted(rows: Prompts, removed: Sequence[Removed]) -> None:
    """Refuse texts in which directions are removed at no token from which the next is predicted.

    No number would change, and a cost of 0 would say that the removal is harmless.
    """
    positions = torch.arange(rows.tokens.shape[1])[None]
    has_next = positions < rows.lengths.cpu()[:, None] - 1
    if not any(bool((block.where.among(rows) & has_next).any()) for block in removed):
        raise ModelStateError(
            f"{removed[-1].says}: none of these tokens has another one behind it in the texts, so "
            "their loss says nothing of the removal",
            remedy="Make the call in a block without positions=, or pass texts in which they are: "
            "lens.prompts(prompts, responses).",
        )
