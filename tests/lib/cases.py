"""Test cases as data: a tiny hooked model, its adapter, and the PEFT model that is the oracle."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import models
import torch
from peft import PeftModel
from transformers import PreTrainedModel

import lens_lora as ll

# Ways to process a model: not at all, by one flag, by all.
FLAGS = {
    "raw": {},
    **{flag: {flag: True} for flag in models.RAW},
    "processed": models.PROCESSED,
}
# What most tests run on.
CASES = [
    (family, cls, flags)
    for family in models.CORE
    for cls in models.MAKERS
    for flags in ("raw", "processed")
]


@dataclass(frozen=True)
class Case:
    """A base, the oracle over it, its hooked model, and a lens of the same adapter."""

    base: PreTrainedModel
    peft: PeftModel
    model: Any
    lens: ll.LoraLens


@functools.cache
def case(family: str, cls: str, flags: str, targets: tuple[str, ...] | None = None) -> Case:
    """The case of a family, class and processing, built once, in float64.

    Of a processed model the lens has the base at hand.
    """
    with models.lifted():
        base = models.hf_model(family)
        peft = models.peft_model(family, base, targets=list(targets) if targets else None)
        model = models.MAKERS[cls](base, **FLAGS[flags])
        adapter = ll.Adapter.from_peft(peft)
        lens = ll.LoraLens(model, adapter, hf_model=base if FLAGS[flags] else None)
    return Case(base, peft, model, lens)


def centred(logits: torch.Tensor) -> torch.Tensor:
    """Logits up to the constant that a centred unembedding removes."""
    return logits - logits.mean(-1, keepdim=True)


def set_peft_scale(peft: PeftModel, module: str, factor: float) -> float:
    """Multiply one module's s in the PEFT model; return the old one."""
    layer = peft.base_model.model.get_submodule(module)
    old = layer.scaling["default"]
    layer.scaling["default"] = old * factor
    return old
