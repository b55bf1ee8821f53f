"""A shipment's folders, and what all exports share to load and save it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from benchmarks.of_tests import models, no_ops

ROWS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 25, 26, 27]])
# The folders of a shipment in which the export is, and the adapter as it was trained.
MADE = "made"
TRAINED = "trained"
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}w4"


def merged(out: Path) -> list[str]:
    return ["--merged", str(out / MADE)]


def saved(model, out: Path) -> list[str]:
    """Save a model and the base's tokenizer as the export."""
    model.save_pretrained(out / MADE)
    models.tokenizer().save_pretrained(out / MADE)
    return merged(out)


def loaded(out: Path, base=None, adapter: Path | None = None) -> PeftModel:
    base = no_ops.base_of(out) if base is None else base
    return PeftModel.from_pretrained(base, adapter or out / "adapter")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval().float()(ROWS).logits


def keep_trained(out: Path) -> None:
    """Keep the adapter as it was trained: what verify is given is another one."""
    shutil.copytree(out / "adapter", out / TRAINED)


def of_own_template(make: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
    """The adapter was trained with a chat template of its own, which a merge is to keep."""

    def made(out: Path) -> list[str]:
        tokenizer = models.tokenizer()
        tokenizer.save_pretrained(out / "base")
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(out / "adapter")
        return make(out)

    return made


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)
