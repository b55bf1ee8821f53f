"""Warnings that are not shown, and progress bars: whether they show, and which are open."""

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

    `warnings.catch_warnings` puts a whole list of filters back, and where two threads' blocks
    overlap, the wrong one: a filter stays for good. Here one filter is put in, and the same one
    taken out of the list that it was put into and of the list in force.
    """
    quiet = _OneFilter(("ignore", re.compile(message, re.IGNORECASE), Warning, None, 0))
    filters: Any = warnings.filters

    def take_out() -> None:
        held: Any
        for held in (filters, warnings.filters):
            with contextlib.suppress(ValueError):
                held.remove(quiet)

    span.way_back(take_out)
    filters.insert(0, quiet)


class _OneFilter(tuple[Any, ...]):
    """An entry of `warnings.filters` that is not mixed up with another one that says the same."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def without_gguf_bar() -> AbstractContextManager[Any]:
    """Within the block, transformers' reader of GGUF files shows no bar, as no switch hides it."""
    from unittest import mock

    from tqdm import tqdm

    quiet = functools.partial(tqdm, disable=True)
    return mock.patch("transformers.modeling_gguf_pytorch_utils.tqdm", quiet, create=True)


def open_bars() -> list[Any]:
    """The bars of tqdm that have begun: it lists them nowhere, and moves one at a step alone."""
    from tqdm import tqdm

    with tqdm.get_lock():
        return [bar for bar in vars(tqdm)["_instances"] if hasattr(bar, "start_t")]
