"""The loss of the base on texts, as it is and as hooks of the caller's leave it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.core import (
    LoraLens,
    Prompts,
)
from lens_lora.texts.batches import (
    TOKENS_AT_ONCE,
    logits_of,
    over_texts,
)
from lens_lora.texts.distribution_shift import distribution_shift


@dataclasses.dataclass(frozen=True)
class Losses:
    """What the base makes of texts as it is, and as hooks of the caller's leave it.

    Of the distributions from which each token but the first comes.

    Attributes:
        plain, hooked: [text], Σ_t −log p(y_t) in nats.
        kl: [text], Σ_t KL(plain ‖ hooked) in nats.
        counts: [text], how many tokens.
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
        texts: each of two tokens at least.
        unhooked: begins a block in which the caller's hooks do nothing.
        progress: show a bar.

    Raises:
        NumericsError: a non-finite logit.
    """
    plain = torch.zeros(texts.batch, dtype=torch.float64)
    hooked = torch.zeros_like(plain)
    kl = torch.zeros_like(plain)

    def visit(index: list[int], rows: Prompts) -> None:
        base = lens, lens.gates(0.0)
        with unhooked():
            before = logits_of(base, rows)[:, :-1]
        after = logits_of(base, rows)[:, :-1]
        said = rows.tokens[:, 1:, None].to(before.device)
        counted = rows.after_first[:, 1:].to(before.device)

        def summed(values: Float[Tensor, "row pos"]) -> Float[Tensor, " row"]:
            return values.masked_fill(~counted, 0.0).cpu().double().sum(1)

        for sums, logits in ((plain, before), (hooked, after)):
            sums[index] = summed(-logits.log_softmax(-1).gather(2, said)[..., 0])
        shift = after - before
        kl[index] = summed(distribution_shift(before, before.softmax(-1), shift).kl)

    over_texts(lens, texts, TOKENS_AT_ONCE, visit, "the base's loss", progress)
    return Losses(plain, hooked, kl, (texts.lengths - 1).cpu())
