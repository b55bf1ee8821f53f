"""`lens-lora`, and `python -m lens_lora` as `accelerate launch -m lens_lora` and torchrun need it.

1. Ctrl-C ends the process at once, with one line and exit code 130, until a command begins its
   work and after it (`running.one_line_errors`): while modules are imported, say.
2. A character that the terminal's encoding lacks is replaced; a minus sign stays one.
"""

from __future__ import annotations

import atexit
import codecs
import io
import os
import signal
import sys

from lens_lora.runs.processes import rank

_ASCII = dict(zip("\N{MINUS SIGN}–—“”’…·×→‖█", '---""\'..x>|#', strict=True))
_CLEAR = b"\r\x1b[K\x1b[?25h"  # the line of a spinner, and the cursor that it hides


def main() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
        # Registered first, so called last: then the interpreter takes its handlers away.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    print_in_any_encoding()

    from lens_lora.cli import app

    app(prog_name="lens-lora")


def print_in_any_encoding() -> None:
    """Replace what the encodings of stdout and stderr lack, in place of an error."""
    codecs.register_error("lens_lora", _replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="lens_lora")


def _end(*_signal: object) -> None:
    if rank() == 0:
        os.write(2, (_CLEAR if os.isatty(2) else b"") + b"Interrupted.\n")
    os._exit(130)


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_ASCII.get(character, "?") for character in lacking), error.end


if __name__ == "__main__":
    main()
