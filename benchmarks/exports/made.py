"""The folders of a shipment, and what the makers of exports share to load and save models."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from benchmarks.of_tests import models, no_ops

# Makes an export in a folder; returns the options by which `lens-lora verify` finds it.
Maker = Callable[[Path], list[str]]

# The token ids on which logits are compared.
ROWS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 25, 26, 27]])
# The folder of the export, beside `base` and `adapter`.
MADE = "made"
# The folder of the adapter as it was trained, if the export is `adapter` itself.
TRAINED = "trained"
# A chat template in the words of the tiny tokenizer, which ends with a token of its own.
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}w4"


def merged_options(out: Path) -> list[str]:
    """The options for a merged model in the folder of the export."""
    return ["--merged", str(out / MADE)]


def save_merge(model, out: Path) -> list[str]:
    """Save a model and the base's tokenizer as the export; return its options."""
    model.save_pretrained(out / MADE)
    models.tokenizer().save_pretrained(out / MADE)
    return merged_options(out)


def load_peft_model(out: Path, base=None, adapter: Path | None = None) -> PeftModel:
    """Load an adapter onto a base: by default those of the shipment."""
    if base is None:
        base = no_ops.base_of(out)
    if adapter is None:
        adapter = out / "adapter"
    return PeftModel.from_pretrained(base, adapter)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """The model's logits on ROWS, in float32."""
    return model.eval().float()(ROWS).logits


def keep_trained(out: Path) -> None:
    """Copy the adapter to TRAINED, before the one that `verify` is given is changed."""
    shutil.copytree(out / "adapter", out / TRAINED)


def replace_adapter(out: Path, folder: Path) -> None:
    """Let the adapter in this folder be the shipment's, with the shipment's base as its own."""
    shutil.rmtree(out / "adapter")
    shutil.copytree(folder, out / "adapter")
    no_ops.set_config(out / "adapter", base_model_name_or_path=str(out / "base"))


def with_own_template(make: Maker) -> Maker:
    """Give the adapter a chat template that the base lacks, and that a merge has to keep."""

    def make_with_template(out: Path) -> list[str]:
        tokenizer = models.tokenizer()
        tokenizer.save_pretrained(out / "base")
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(out / "adapter")
        return make(out)

    return make_with_template


@contextlib.contextmanager
def attribute_replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the block, the attribute has this value."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
