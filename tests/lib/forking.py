"""A process that has imported everything, and interrupts commands of lens-lora in forks of itself.

    python tests/lib/forking.py

Imports take seconds, which a fork need not spend. Each line of stdin is a JSON list of a moment,
the arguments of a command (both as in interrupted.py) and a file for what the command writes to
stderr. When the command has ended, its exit code is printed as one line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from interrupted import run_and_interrupt

MODULES = (
    "lens_lora.cli.adapters",
    "lens_lora.cli.sweeping",
    "lens_lora.loading",
    "lens_lora.show.page",
    "lens_lora.sweeps.batches",
    "lens_lora.sweeps.sweep",
)
# transformers imports the module of a class when the class is first asked for.
CLASSES_OF_TRANSFORMERS = ("AutoTokenizer", "LlamaForCausalLM", "PreTrainedTokenizerFast")


def import_everything() -> None:
    """Import what commands would import while they run."""
    package = import_module("lens_lora")
    for name in dir(package):
        getattr(package, name)
    for module in MODULES:
        import_module(module)
    transformers = import_module("transformers")
    for name in CLASSES_OF_TRANSFORMERS:
        getattr(transformers, name)


def leave_standard_streams(stderr: str) -> None:
    """Read nothing, print nothing, and write stderr into a file."""
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    os.dup2(nothing, 0)


def exit_code_of_fork(moment: str, arguments: Sequence[str], stderr: str) -> int:
    """Run and interrupt a command in a fork of this process, and wait for its end."""
    child = os.fork()
    if child == 0:
        leave_standard_streams(stderr)
        run_and_interrupt(moment, arguments)
        # `main` ends the process. If it ever returned, the fork would read the next command.
        os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def main() -> None:
    import_everything()
    for line in sys.stdin:
        moment, arguments, stderr = json.loads(line)
        print(exit_code_of_fork(moment, arguments, stderr), flush=True)


if __name__ == "__main__":
    main()
