"""`lens-lora inspect`: what an adapter is, and how large each of its updates is.

An adapter or a model that cannot be used raises an error; the command line prints it as one line.
"""

from __future__ import annotations

from typing import Annotated

import typer

from lens_lora.adapters.peft_files import adapter_folder
from lens_lora.commands.options import Quiet

__all__ = ["inspect"]


def inspect(
    adapter: Annotated[str, typer.Argument(help="LoRA, a folder or hub id.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model, a folder or hub id, or 'embedded' for SmolLM2-135M-Instruct: adds "
            "the sites and ‖ΔW‖/‖W‖."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of the largest to list.")] = 10,
    quiet: Quiet = False,
    every: Annotated[bool, typer.Option("--all", help="List every one.")] = False,
) -> None:
    """What an adapter is: its targets, ranks and scales, and the spectrum of each update."""
    folder = adapter_folder(adapter)
    from lens_lora.commands.run_inspect import run

    run(folder, model, None if every else top, quiet=quiet)
