"""One thread at a time works with a model: the others wait until its spans have ended."""

from __future__ import annotations

import threading
import weakref

from torch import nn

from lens_lora.errors import warn
from lens_lora.spans import Temporary

# Seconds until a thread that waits for another one says so.
_PATIENCE = 60.0


class Lock:
    """A lock that one thread holds at a time, in any number of spans.

    Attributes:
        changed: is notified when a span ends.
        holders: the thread of each span, by a token of the span.
    """

    def __init__(self) -> None:
        self.changed: threading.Condition = threading.Condition()
        self.holders: dict[object, int] = {}

    def is_free(self) -> bool:
        """Whether no other thread holds it."""
        own = threading.get_ident()
        return all(thread == own for thread in self.holders.values())


# For what a process has once: torch's dual level and its choice of attention kernels. A thread that
# takes it has its model's lock already.
ONE_IN_A_PROCESS = Lock()
_LOCKS: weakref.WeakKeyDictionary[nn.Module, Lock] = weakref.WeakKeyDictionary()


def lock_of(model: nn.Module) -> Lock:
    """The model's lock, to be taken with `hold`."""
    return _LOCKS.setdefault(model, Lock())


def hold(span: Temporary, lock: Lock) -> None:
    """Take the lock for this thread, until the last of its spans that asked for it ends."""
    token = object()

    # A span may end in another thread: that of the garbage collector, or the next one of a server
    # that resumes a suspended generator in whichever is free.
    def leave() -> None:
        with lock.changed:
            lock.holders.pop(token, None)
            lock.changed.notify_all()

    span.way_back(leave)
    with lock.changed:
        while not lock.changed.wait_for(lock.is_free, _PATIENCE):
            warn(
                f"{threading.current_thread().name} has waited a minute for a thread that runs a "
                "lens on the same model. If that thread waits for this one, neither will go on: "
                "leave its `with lens.applied():` first."
            )
        lock.holders[token] = threading.get_ident()
