"""Changes for the length of a block, taken back whatever interrupts them.

A Ctrl-C may fall between any two lines, also into those that take a change back.

1. The way back is registered before the way in, twice. It may run when nothing was changed yet, and
   again when all is back; `contextlib.ExitStack` goes on to the second where the first is
   interrupted.
2. A block that could not end, because the interrupt fell before its end began, stays listed as open
   in its thread, and whoever began before it closes it (`open_blocks`, `close_but`).
3. Nothing waits in a suspended generator, whose end would come at a moment of the garbage
   collector's choice, in the middle of another block.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Collection
from typing import Any

__all__ = ["Temporary", "close_but", "open_blocks"]


class Temporary(contextlib.ExitStack):
    """`with Temporary(change):` calls change(block), and at the end takes back what it registered.

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
        others = open_blocks()
        if self in others:
            raise RuntimeError("this block is open already; make another one")
        _OPEN.blocks.append(weakref.ref(self))
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
    """The blocks that are open in this thread, the newest last."""

    def __init__(self) -> None:
        self.blocks: list[weakref.ref[Temporary]] = []


_OPEN = _Open()


def _forget(block: weakref.ref[Temporary]) -> None:
    _OPEN.blocks = [other for other in _OPEN.blocks if other is not block and other() is not None]


def open_blocks() -> list[Temporary]:
    """Those of this thread, the newest last."""
    return [block for block in (ref() for ref in _OPEN.blocks) if block is not None]


def close_but(others: Collection[Temporary]) -> None:
    """Close every open block of this thread, the newest first.

    Args:
        others: blocks that stay open.
    """
    for block in reversed(open_blocks()):
        if block not in others:
            block.close()
