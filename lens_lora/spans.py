"""Changes for a span of time, which are taken back however the span ends.

    with Temporary(change):  # calls change(span), which registers how it is taken back
        …

A change is taken back at the end of its span, whatever interrupts it. A Ctrl-C may fall between any
two lines, also into those that take a change back.

1. Before a change is made, the function that takes it back is registered, twice. It must be able to
   run when nothing was changed yet, and again when everything is back. If its first run is
   interrupted, `contextlib.ExitStack` goes on to the second.
2. A span whose end was never reached, because the interrupt came just before it, stays listed as
   open in its thread, and a span that began earlier closes it (`open_spans`, `close_but`).
3. Nothing waits in a suspended generator: the garbage collector would end it at a moment of its own
   choice, in the middle of another span.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any, Concatenate, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Temporary(contextlib.ExitStack):
    """A change for a span of time: `with Temporary(change):` calls change(span).

    What `change` registered is taken back at the end of the block. What it returns is bound by
    `as`. `enter_context` and `push` are those of ExitStack.

    Attributes:
        about: the object that the span changes, by which others find it among `open_spans`.
    """

    about: object = None
    _is_open = False

    def __init__(self, change: Callable[[Temporary], Any]) -> None:
        super().__init__()
        self._change = change

    def way_back(self, back: Callable[[], object]) -> None:
        """Register how a change is taken back, before it is made."""
        self.callback(back)
        self.callback(back)

    def __enter__(self) -> Any:
        others = open_spans()
        if self._is_open:  # perhaps in another thread
            raise RuntimeError("this span is open already; make another one")
        self._is_open = True
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


def temporary(
    change: Callable[Concatenate[Temporary, _P], _R],
) -> Callable[_P, AbstractContextManager[_R]]:
    """Decorate change(span, …) as a function of its other arguments, to be used in a `with`."""

    @functools.wraps(change)
    def begin(*args: _P.args, **kwargs: _P.kwargs) -> AbstractContextManager[_R]:
        return Temporary(lambda span: change(span, *args, **kwargs))

    return begin


class _Open(threading.local):
    """The spans that are open in this thread, the newest last."""

    def __init__(self) -> None:
        self.spans: list[weakref.ref[Temporary]] = []


_OPEN = _Open()


def _forget(span: weakref.ref[Temporary]) -> None:
    """Remove a span from the list of open ones, and with it those that no longer exist."""
    ended = span()
    if ended is not None:
        ended._is_open = False
    _OPEN.spans = [other for other in _OPEN.spans if other is not span and other() is not None]


def open_spans() -> list[Temporary]:
    """The open spans of this thread, the newest last."""
    spans = [ref() for ref in _OPEN.spans]
    return [span for span in spans if span is not None]


def close_but(others: Collection[Temporary]) -> None:
    """Close the open spans of this thread except these, the newest first."""
    for span in reversed(open_spans()):
        if span not in others:
            span.close()
