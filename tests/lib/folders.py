"""Tiny models and adapters as folders, as a user of commands has them."""

from __future__ import annotations

import warnings
from pathlib import Path

import models
import torch
from peft import PeftModel
from transformers import PreTrainedModel

import lens_lora as ll


def save_base(model: PreTrainedModel, folder: Path) -> None:
    """Save a model and the tiny tokenizer, so that transformers loads both from the folder."""
    model.save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)


def saved_llama(folder: Path) -> PreTrainedModel:
    """Save the tiny Llama in float32 with its tokenizer, and return it."""
    base = models.hf_model("llama", dtype=torch.float32)
    save_base(base, folder)
    return base


def adapter_of(base: PreTrainedModel, folder: Path) -> ll.Adapter:
    """A random adapter of the tiny Llama, which names the folder as its base."""
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base))
    return ll.Adapter(adapter.modules, base_model=str(folder))


def save_naming(peft: PeftModel, folder: Path, base: Path | str, **options: object) -> None:
    """Save an adapter as PEFT does, naming this folder or hub id as its base."""
    peft.peft_config["default"].base_model_name_or_path = str(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.save_pretrained(folder, **options)
