"""Warnings and progress bars: how to hide them, and which bars are open."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from contextlib import AbstractContextManager
from typing import Any

from lens_lora.spans import Temporary, temporary


@temporary
def without_warnings(span: Temporary, message: str = "") -> None:
    """Show no warning that begins with this message, until the span ends.

    `warnings.catch_warnings` restores a whole list of filters. If the blocks of two threads
    overlap, it restores the wrong list, and a filter stays for good. Here one filter is added, and
    exactly this one is removed, from the list that it was added to and from the list in force.
    """
    quiet = _OneFilter(("ignore", re.compile(message, re.IGNORECASE), Warning, None, 0))
    filters: Any = warnings.filters

    def take_out() -> None:
        current: Any = warnings.filters
        for listed in (filters, current):
            with contextlib.suppress(ValueError):
                listed.remove(quiet)

    span.way_back(take_out)
    filters.insert(0, quiet)


class _OneFilter(tuple[Any, ...]):
    """An entry of `warnings.filters` that is unequal to every other one, whatever they contain."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def without_gguf_bar() -> AbstractContextManager[Any]:
    """Within the block, transformers' reader of GGUF files shows no bar; no switch hides it."""
    from unittest import mock

    from tqdm import tqdm

    quiet = functools.partial(tqdm, disable=True)
    return mock.patch("transformers.modeling_gguf_pytorch_utils.tqdm", quiet, create=True)


def open_bars() -> list[Any]:
    """The bars of tqdm that have begun; tqdm lists them only under a private name."""
    from tqdm import tqdm

    with tqdm.get_lock():
        return [bar for bar in vars(tqdm)["_instances"] if hasattr(bar, "start_t")]
