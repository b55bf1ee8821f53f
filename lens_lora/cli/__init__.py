"""The command line `lens-lora`, with a function for each command.

The commands are `demo`, `explain`, `diff`, `audit`, `inspect`, `compare`, `checkpoints`, `repair`,
`verify`, `forms`, `card`, `sweep`, `scan`, `gather` and `plan`.

Results go to stdout, progress and errors to stderr. An error of this package or of the system
prints one red line, with exit code 2. Ctrl-C prints one line, with exit code 130. An unforeseen
error prints its traceback, with exit code 70.

Each command checks its options without torch, and imports the heavy libraries only once the options
are valid.
"""

from __future__ import annotations

import logging
import platform
from typing import Annotated

import typer

from lens_lora._version import versions
from lens_lora.cli.adapters import checkpoints, compare, inspect, repair
from lens_lora.cli.auditing import audit, diff
from lens_lora.cli.carding import card
from lens_lora.cli.explaining import demo, explain
from lens_lora.cli.forming import forms
from lens_lora.cli.planning import plan
from lens_lora.cli.running import one_line_errors
from lens_lora.cli.sweeping import gather, scan, sweep
from lens_lora.cli.unknown import GuessingCommand, GuessingGroup
from lens_lora.cli.verifying import verify

app: typer.Typer = typer.Typer(
    name="lens-lora",
    cls=GuessingGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_versions(wanted: bool) -> None:
    if wanted:
        system = {"Python": platform.python_version(), "platform": platform.platform()}
        for name, version in {**versions(), **system}.items():
            typer.echo(f"{name} {version}")
        raise typer.Exit


_VERSION = typer.Option(
    "--version", callback=_print_versions, is_eager=True, help="Print all versions."
)


@app.callback()
def main(version: Annotated[bool | None, _VERSION] = False) -> None:
    """Find what a LoRA fine-tune changed in a model, which parts of it did that,
    and whether the answer can be trusted."""
    # PEFT imports bitsandbytes, which logs a hint about a faster kernel that could be installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


# In the order in which `lens-lora --help` lists them.
_COMMANDS = (
    demo,
    explain,
    diff,
    audit,
    inspect,
    compare,
    checkpoints,
    repair,
    verify,
    forms,
    card,
    sweep,
    scan,
    gather,
    plan,
)
for _command in _COMMANDS:
    _wrapped = one_line_errors(_command)(_command)
    app.command(_command.__name__, cls=GuessingCommand)(_wrapped)

if __name__ == "__main__":
    app()
