"""The cost of `lens.ablate_directions` is the rise of the base model's own loss on ordinary texts.

The texts have nothing to do with the direction that is removed. A removal that breaks the model on
them breaks it on other prompts, too, so its effect there says nothing about the direction.
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
from lens_lora.directions.removal import Ablation, open_ablations, without_ablations
from lens_lora.errors import ModelStateError
from lens_lora.texts.batches import require_second_token


@final
class RemovalCost(Described):
    """The cost of removing directions from the base model, on texts, in nats per token.

    All means are over the tokens after each text's first.

    Attributes:
        base: [text], the mean of −log p(y_t) of the unchanged base.
        removed: [text], the mean of −log p(y_t) of the base within the block.
        kl: [text], the mean of KL(base ‖ base within the block).
        counts: [text], the number of tokens that the means are over.
        what: in words, the directions that are removed and the points and tokens.
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

    Call it within the block. If a removal costs little and undoes a behaviour, the direction
    carries the behaviour. If a removal breaks the base, it shows nothing.

    Cost: two forward passes over the texts.

    Args:
        lens: the adapter over the model; the adapter is off.
        texts: strings, conversations, ids, or `Prompts` of at least two tokens; None for every
            eighth of the package's neutral texts.
        progress: show a bar.

    Returns:
        RemovalCost; `.cost` is the rise of the loss over all texts.

    Raises:
        ModelStateError: no block of `lens.ablate_directions` is open on this model; its positions
            include no token before the texts' last ones, such as 'response' or −1 on neutral
            texts.
        PromptError: a text does not fit the model, or has one token.
        NumericsError: a logit is not finite.
    """
    removed = open_ablations(lens.model)
    if not removed:
        raise ModelStateError(
            "no direction is removed from this model at the moment",
            remedy="make the call within the block: "
            "`with lens.ablate_directions(direction): ll.removal_cost(lens)`.",
        )
    rows = lens.function(texts_or_neutral(lens, texts)).prompts
    require_second_token(rows, "the loss")
    _require_counted(rows, removed)
    sums = losses(lens, rows, functools.partial(without_ablations, lens.model), progress=progress)
    return RemovalCost(
        base=sums.plain / sums.counts,
        removed=sums.hooked / sums.counts,
        kl=sums.kl / sums.counts,
        counts=sums.counts,
        what="; ".join(block.says for block in removed),
        meta=lens.describe(rows),
    )


def _require_counted(rows: Prompts, removed: Sequence[Ablation]) -> None:
    """Refuse texts in which directions are removed only at tokens that predict no next token.

    No number would change, and a cost of 0 would make the removal look harmless.
    """
    positions = torch.arange(rows.tokens.shape[1])[None]
    has_next = positions < rows.lengths.cpu()[:, None] - 1
    if not any(bool((block.where.among(rows) & has_next).any()) for block in removed):
        raise ModelStateError(
            f"{removed[-1].says}: in these texts no such token is followed by another one, so "
            "their loss says nothing about the removal",
            remedy="Make the call in a block without positions=, or pass texts that have such "
            "tokens: lens.prompts(prompts, responses).",
        )
