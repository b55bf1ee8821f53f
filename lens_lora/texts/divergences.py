"""The KL between one model and others, summed over the tokens of many texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.core import HookFn, Prompts
from lens_lora.texts.batches import TOKENS_AT_ONCE, Gated, logits_of, over_texts
from lens_lora.texts.distribution_shift import distribution_shift


def text_divergences(
    reference: Gated,
    others: Sequence[Gated],
    texts: Prompts,
    counted: Bool[Tensor, "text pos"],
    *,
    hooks: Sequence[tuple[str, HookFn]] = (),
    progress: bool,
) -> Float[Tensor, "other text"]:
    """Sum KL(reference ‖ other) over the counted tokens, in nats.

    Cost: one forward pass of each model.

    Args:
        reference: a lens and its gates, whose distributions come first in the KL.
        others: lenses and their gates.
        texts: all texts.
        counted: True at the tokens that are summed over.
        hooks: further hooks for every pass, such as noise, by the names of their hook points.
        progress: show a bar.

    Raises:
        NumericsError: a logit is not finite.
    """
    sums = torch.zeros(len(others), texts.batch, dtype=torch.float64)
    first_lens, _ = reference

    def visit(index: list[int], rows: Prompts) -> None:
        base = logits_of(reference, rows, hooks)
        p = base.softmax(-1)
        # One tensor of the size of the logits holds every model's shift in turn.
        room = torch.empty_like(base)
        is_counted = counted[index, : rows.tokens.shape[1]].to(base.device)
        for slot, other in enumerate(others):
            shift = torch.sub(logits_of(other, rows, hooks), base, out=room)
            kl = distribution_shift(base, p, shift).kl
            sums[slot, index] = kl.masked_fill(~is_counted, 0.0).cpu().double().sum(1)

    over_texts(first_lens, texts, TOKENS_AT_ONCE, visit, "the models' logits", progress)
    return sums
