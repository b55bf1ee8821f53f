"""A command of lens-lora that is interrupted, as by Ctrl-C, at one moment of its run.

    python tests/lib/interrupted.py MOMENT ARGUMENT …

MOMENT is `event:ending:count`, such as `open:r.jsonl:1`: the count-th time that Python raises this
audit event with a first argument that ends so. The event `end` stands for the end of the command.
The arguments are those of `lens-lora`.

Nothing is imported before the moment but what Python itself needs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any


def run_and_interrupt(moment: str, arguments: Sequence[str]) -> None:
    """Run lens-lora with these arguments in this process, and interrupt it at a moment."""
    # A shell lets what it runs in the background ignore Ctrl-C, and Python would leave it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    awaited_event, ending, count = moment.split(":")
    seen = 0

    def interrupt_at_the_moment(event: str, details: tuple[Any, ...]) -> None:
        nonlocal seen
        if event != awaited_event or not str(details[0]).endswith(ending):
            return
        seen += 1
        if seen == int(count):
            os.kill(os.getpid(), signal.SIGINT)

    sys.addaudithook(interrupt_at_the_moment)
    sys.argv[1:] = arguments
    # This import is a part of the run: it may be what is interrupted.
    from lens_lora.__main__ import main

    try:
        main()
    finally:
        interrupt_at_the_moment("end", ("",))


if __name__ == "__main__":
    run_and_interrupt(sys.argv[1], sys.argv[2:])
