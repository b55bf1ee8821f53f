"""Changes for a span of time, taken back at its end whatever interrupts them.

A Ctrl-C may fall between any two lines, also into those that take a change back.

1. The way back is registered before the way in, twice. It may run when nothing was changed yet, and
   again when all is back; `contextlib.ExitStack` goes on to the second where the first is
   interrupted.
2. A span whose end was never reached, as the interrupt fell just before it, stays listed as open in
   its thread, and whoever began earlier closes it (`open_spans`, `close_but`).
3. Nothing waits in a suspended generator, whose end would come at a moment of the garbage
   collector's choice, in the middle of another span.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Collection
from typing import Any

__all__ = ["Temporary", "close_but", "open_spans", "without_warnings"]


class Temporary(contextlib.ExitStack):
    """`with Temporary(change):` calls change(span), and at its end takes back what that registered.

    What `change` returns is bound by `as`. `enter_context` and `push` are those of ExitStack.

    Args:
        change: makes changes, each after its way back was registered with `way_back`.
    """

    def __init__(self, change: Callable[[Temporary], Any]) -> None:
        super().__init__()
        self._change = change

    def way_back(self, back: Callable[[], object]) -> None:
        """Register how a change is taken back, before it is made.

        Args:
            back: may run at any time and any number of times.
        """
        self.callback(back)
        self.callback(back)

    def __enter__(self) -> Any:
        others = open_spans()
        if self in others:
            raise RuntimeError("this span is open already; make another one")
        _OPEN.spans.append(weakref.ref(self))
        self.way_back(functools.partial(_forget, weakref.ref(self)))
        try:
            return self._change(self)
        except BaseException:
            try:
                close_but(others)
            finally:
                close_but(others)
            raise

    def __del__(self) -> None:
        if "_change" in vars(self):
            self.close()


class _Open(threading.local):
    """The spans that are open in this thread, the newest last."""

    def __init__(self) -> None:
        self.spans: list[weakref.ref[Temporary]] = []


_OPEN = _Open()


def _forget(span: weakref.ref[Temporary]) -> None:
    _OPEN.spans = [other for other in _OPEN.spans if other is not span and other() is not None]


def open_spans() -> list[Temporary]:
    """Those of this thread, the newest last."""
    return [span for span in (ref() for ref in _OPEN.spans) if span is not None]


def close_but(others: Collection[Temporary]) -> None:
    """Close every open span of this thread, the newest first.

    Args:
        others: spans that stay open.
    """
    for span in reversed(open_spans()):
        if span not in others:
            span.close()


def without_warnings(span: Temporary, message: str = "") -> None:
    """No warning that begins so is shown until the span ends.

    `warnings.catch_warnings` puts a whole list of filters back, and where two threads' blocks
    overlap, the wrong one: a filter stays for good. Here one filter is put in, and the same one
    taken out of the list that it was put into and of the list in force.

    Args:
        span: how long.
        message: a regular expression; without one, every warning.
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
