"""Start the command line, as `lens-lora` or `python -m lens_lora` (accelerate, torchrun).

1. Before a command begins its work (while modules are imported), and after it has ended, Ctrl-C
   ends the process at once, with one line and exit code 130. In between
   `running.one_line_errors` decides what Ctrl-C does.
2. A character that the terminal's encoding lacks is replaced by one that looks like it, such as a
   minus sign by '-'.
3. An unexpected error prints its traceback and ends with exit code 70, because exit code 1 means
   that a check failed.
"""

from __future__ import annotations

import atexit
import codecs
import io
import os
import signal
import sys
import traceback

from lens_lora.runs.processes import rank

# The replacement of a character that an encoding lacks.
_ASCII = {
    "\N{MINUS SIGN}": "-",
    "–": "-",
    "—": "-",
    "“": '"',
    "”": '"',
    "’": "'",
    "…": ".",
    "·": ".",
    "×": "x",
    "→": ">",
    "‖": "|",
    "█": "#",
}
# Clears the line of a spinner, and shows the cursor that it hides.
_CLEAR = b"\r\x1b[K\x1b[?25h"
# EX_SOFTWARE of sysexits.h: an error within the program.
_NOT_FORESEEN = 70


def main() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
        # atexit calls the function that was registered first as the last one, just before the
        # interpreter removes its signal handlers.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    print_in_any_encoding()

    from lens_lora.cli import app

    try:
        app(prog_name="lens-lora")
    except Exception:  # Any error that reaches this line is unexpected.
        traceback.print_exc()
        sys.exit(_NOT_FORESEEN)


def print_in_any_encoding() -> None:
    """Let stdout and stderr replace characters that their encodings lack, instead of failing."""
    codecs.register_error("lens_lora", _replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="lens_lora")


def _end(*_signal: object) -> None:
    """End the process with exit code 130; of several processes, only rank 0 prints a line."""
    if rank() == 0:
        clear = _CLEAR if os.isatty(2) else b""
        os.write(2, clear + b"Interrupted.\n")
    os._exit(130)


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """Return the replacement of characters that cannot be encoded, and where they end."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_ASCII.get(character, "?") for character in lacking), error.end


if __name__ == "__main__":
    main()
