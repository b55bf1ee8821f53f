"""Σ_t KL of each text between one model and others, over the tokens that count."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.engine.distribution_shift import distribution_shift
from lens_lora.engine.function import gated_logits, require_finite
from lens_lora.engine.texts import by_length
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts

__all__ = ["text_divergences"]

_TOKENS = 512
Gated = tuple[LoraLens, Float[Tensor, "site"]]


def text_divergences(
    reference: Gated,
    others: Sequence[Gated],
    texts: Prompts,
    counted: Bool[Tensor, "text pos"],
    *,
    progress: bool,
) -> Float[Tensor, "other text"]:
    """Σ_t KL(reference ‖ other), in nats. A forward pass of each model, 512 tokens at a time.

    Args:
        reference: a lens and its gates.
        others: the same, over the same model.
        texts: as tokens.
        counted: which tokens of each.
        progress: show a bar.

    Raises:
        NumericsError: non-finite logits.
    """
    found = torch.zeros(len(others), texts.batch, dtype=torch.float64)
    bar = tqdm(total=texts.batch, desc="the models' logits", leave=False, disable=not progress)
    with bar, torch.no_grad():
        for index, some in by_length(texts, _TOKENS):
            rows = dataclasses.replace(some, reads=some.lengths)
            base = _logits(reference, rows)
            p, room = base.softmax(-1), torch.empty_like(base)
            own = counted[index, : rows.tokens.shape[1]].to(base.device)
            for slot, other in enumerate(others):
                shift = torch.sub(_logits(other, rows), base, out=room)
                kl = distribution_shift(base, p, shift).kl
                found[slot, index] = kl.masked_fill(~own, 0.0).cpu().double().sum(1)
            bar.update(len(index))
    return found


def _logits(gated: Gated, rows: Prompts) -> Float[Tensor, "row pos vocab"]:
    lens, gates = gated
    logits = gated_logits(lens, rows, gates)
    require_finite(logits.amax(), "a logit")
    return logits
