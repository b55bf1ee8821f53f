"""The tokenizer of a lens's model: where it is from, and how it differs from the adapter's own."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from lens_lora import errors
from lens_lora.compat import known_of_tokenizer, tokenizer_as_saved
from lens_lora.core.adapter.adapter import Adapter
from lens_lora.core.model import extensions

# The adapters' folders whose tokenizers have been compared with a model's.
_COMPARED: weakref.WeakKeyDictionary[Any, set[Path]] = weakref.WeakKeyDictionary()


def tokenizer_origin(model: Any) -> str:
    """Where the tokenizer is from, and how it differs from the base's; '' for the base's own."""
    known = known_of_tokenizer(getattr(model, "tokenizer", None))
    return known.origin if known else ""


def note_other_tokenizer(model: Any, adapter: Adapter) -> None:
    """Warn once where the adapter was saved with a tokenizer that differs from the model's."""
    folder = adapter.tokenizer_folder
    compared = _COMPARED.setdefault(model, set())
    if folder is None or folder in compared:
        return
    known = known_of_tokenizer(getattr(model, "tokenizer", None))
    if known and known.folder == folder:
        return
    compared.add(folder)
    as_saved = tokenizer_as_saved(model.tokenizer)
    if as_saved is None:
        return
    differing = extensions.tokenizer_differences(as_saved, folder)
    if differing:
        errors.warn(
            f"{adapter.name}: the tokenizer saved with the adapter differs from the "
            f"model's, by which prompts are read: {'; '.join(differing)}.",
            remedy="ll.load(base, adapter) reads prompts by the adapter's.",
            in_shell="",
        )
