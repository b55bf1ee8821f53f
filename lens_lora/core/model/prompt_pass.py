"""The model's own forward pass over prompts, each row of which is computed as it is alone."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core.model.lengths import Rotary
from lens_lora.core.model.passes import OpenBlock, Rows
from lens_lora.core.readout.prompts import Prompts


def logits_of_prompts(
    model: Any, rotary: Rotary, prompts: Prompts
) -> Float[Tensor, "batch pos d_vocab"]:
    """Run the model over prompts, with the hooks that it has at the moment.

    Args:
        model: the hooked model.
        rotary: its rotary tables that depend on how long the longest row is.
        prompts: the prompts as tokens.
    """
    tables: AbstractContextManager[Any] = contextlib.nullcontext()
    if rotary:
        tables = rotary.by_row(prompts.lengths.tolist())
    # An open block that removes something asks which token is which, and nothing else does:
    # without one, lengths on a GPU are not waited for.
    rows: AbstractContextManager[Any] = contextlib.nullcontext()
    if OpenBlock.open_on(model):
        rows = Rows.of(prompts).told(model)
    with tables, rows:
        return model(prompts.tokens, return_type="logits", **_mask(model, prompts.tokens))


def _mask(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """A mask without padding, where TransformerLens would take tokens on the left for padding."""
    tokenizer = getattr(model, "tokenizer", None)
    if getattr(tokenizer, "padding_side", None) != "left":
        return {}
    return {"attention_mask": torch.ones_like(tokens)}
