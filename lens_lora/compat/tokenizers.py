"""Tokenizers: settings without a public name, and how a hooked model uses one unchanged."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

from lens_lora.compat.quiet import without_warnings


def added_tokens(tokenizer: Any) -> dict[str, Any]:
    """Whether a tokenizer adds BOS and EOS; some only have it under these private names."""
    return {name: getattr(tokenizer, name, None) for name in ("_add_bos_token", "_add_eos_token")}


# Tokenizers that are as they were saved, whatever their fields say, each with a note about it.
_kept_tokenizers: weakref.WeakKeyDictionary[Any, object] = weakref.WeakKeyDictionary()


def tokenizer_for_host(tokenizer: Any, known: object = None) -> tuple[Any, Callable[[], None]]:
    """A copy that a host uses unchanged, and a function that restores the copy's fields afterwards.

    The note `known` can be read as long as the copy exists (`known_of_tokenizer`).

    TransformerLens reads a tokenizer again from the files that it names, so that it adds a BOS.
    Then everything that was set after loading is lost, a tokenizer made in memory has no files, and
    a hub id may be fetched. A tokenizer that claims to add a BOS is not read again.
    """
    unchanged = copy.deepcopy(tokenizer)
    fields = dict(unchanged.init_kwargs)
    unchanged.init_kwargs = {"name_or_path": "", **fields, "add_bos_token": True}
    _kept_tokenizers[unchanged] = known
    return unchanged, functools.partial(setattr, unchanged, "init_kwargs", fields)


def tokenizer_as_saved(tokenizer: Any) -> Any:
    """The tokenizer as its own files have it; None if they cannot be read. Nothing is fetched.

    TransformerLens has read it from these files with `add_bos_token=True`.
    """
    if tokenizer in _kept_tokenizers or not tokenizer.init_kwargs.get("add_bos_token"):
        return tokenizer
    return _read_again(str(tokenizer.name_or_path))


def known_of_tokenizer(tokenizer: Any) -> Any:
    """The note that `tokenizer_for_host` stored for a tokenizer; None for other tokenizers."""
    if tokenizer is None:
        return None
    return _kept_tokenizers.get(tokenizer)


# How a tokenizer is read again: only from files on this machine, and without running its own code.
_FROM_FILES_ALONE = {"local_files_only": True, "trust_remote_code": False}


@functools.lru_cache(maxsize=8)
def _read_again(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        with without_warnings():
            return AutoTokenizer.from_pretrained(name, **_FROM_FILES_ALONE)
    except Exception:  # The files are gone, or are of another kind.
        return None
