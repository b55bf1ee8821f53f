"""Tokenizers: what their fields do not say, and how a hooked model takes one as it is."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

from lens_lora.compat.quiet import without_warnings


def added_tokens(tokenizer: Any) -> dict[str, Any]:
    """Whether a tokenizer adds BOS and EOS, which some have under these names alone."""
    return {name: getattr(tokenizer, name, None) for name in ("_add_bos_token", "_add_eos_token")}


# Tokenizers that are as they were saved, whatever their fields say, with what is known of them.
_kept_tokenizers: weakref.WeakKeyDictionary[Any, object] = weakref.WeakKeyDictionary()


def tokenizer_for_host(tokenizer: Any, known: object = None) -> tuple[Any, Callable[[], None]]:
    """A copy that a host takes as it is, and what sets the copy's fields back afterwards.

    What is known of it can be asked for as long as the copy is there (`known_of_tokenizer`).

    TransformerLens reads a tokenizer again from the files that it names, so that it adds a BOS:
    what was set after loading is lost, one made in memory names no file, and a hub id may be
    fetched. It leaves alone what says that it adds a BOS.
    """
    kept = copy.deepcopy(tokenizer)
    fields = dict(kept.init_kwargs)
    kept.init_kwargs = {"name_or_path": "", **fields, "add_bos_token": True}
    _kept_tokenizers[kept] = known
    return kept, functools.partial(setattr, kept, "init_kwargs", fields)


def tokenizer_as_saved(tokenizer: Any) -> Any:
    """The tokenizer as its own files have it, None if they cannot be read. Fetches nothing.

    TransformerLens has read it from them with `add_bos_token=True`.
    """
    if tokenizer in _kept_tokenizers or not tokenizer.init_kwargs.get("add_bos_token"):
        return tokenizer
    return _read_again(str(tokenizer.name_or_path))


def known_of_tokenizer(tokenizer: Any) -> Any:
    """The note made of a hooked model's tokenizer when it was made; None for other tokenizers."""
    if tokenizer is None:
        return None
    return _kept_tokenizers.get(tokenizer)


# How a tokenizer is read again: from files that are there, and none of its own code is run.
_FROM_FILES_ALONE = {"local_files_only": True, "trust_remote_code": False}


@functools.lru_cache(maxsize=8)
def _read_again(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        with without_warnings():
            return AutoTokenizer.from_pretrained(name, **_FROM_FILES_ALONE)
    except Exception:  # files that are gone, or of another kind
        return None
