"""Modules, rows and biases that PEFT trained whole, at random values, and what PEFT computes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import cases
import models
import peft
import torch
from transformers import PreTrainedModel

import lens_lora as ll


def base_of(family: str, *, tied: bool) -> PreTrainedModel:
    """A tiny model whose head is tied to its embedding, or is not."""
    base = models.hf_model(family)
    embedding = base.get_input_embeddings()
    head = base.get_output_embeddings()
    base.config.tie_word_embeddings = tied
    if tied:
        head.weight = embedding.weight
    elif head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.flip(0).contiguous())
    return base


def trained(family: str, base: PreTrainedModel, **config) -> peft.PeftModel:
    """A copy of the base under PEFT, with everything that it trains at random values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = models.peft_model(family, base, **config)
    generator = models.seeded(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise)
    return model


def in_peft(base: PreTrainedModel, folder: Path) -> torch.Tensor:
    """Centred logits of the base with the saved adapter active: the oracle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    return logits(loaded)


def logits(model) -> torch.Tensor:
    """Logits of a Hugging Face model or a lens, up to the constant of each position."""
    tokens = models.tokens()
    if isinstance(model, ll.LoraLens):
        return cases.centred(model.logits(tokens))
    with torch.no_grad():
        return cases.centred(model(tokens).logits)
