"""`lens-lora inspect`: what an adapter is, and how large each of its updates is."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich.console import Console

import lens_lora as ll
from lens_lora.adapters.peft_files import stated_fields
from lens_lora.commands.options import (
    AdapterArgument,
    BaseModel,
    QuietOption,
    folder_of,
    with_options,
)
from lens_lora.commands.running import at_work, lens_for


@dataclasses.dataclass(frozen=True)
class ModelBeside(BaseModel):
    """A base model that is loaded only if it is named."""

    model: Annotated[
        str | None,
        typer.Option(
            help="Base model, a folder or hub id, or 'embedded' for SmolLM2-135M-Instruct: adds "
            "the sites and ‖ΔW‖/‖W‖. Default: none."
        ),
    ] = None


@with_options
def inspect(
    adapter: AdapterArgument,
    *,
    top: Annotated[int, typer.Option(min=1, help="How many of the largest to list.")] = 10,
    every: Annotated[bool, typer.Option("--all", help="List every one.")] = False,
    quiet: QuietOption = False,
    base: ModelBeside,
) -> None:
    """What an adapter is: its targets, ranks and scales, and the spectrum of each update."""
    folder = folder_of(adapter, quiet=quiet)
    with at_work(base, quiet=quiet) as progress:
        from lens_lora.analyses.spectra import summarise
        from lens_lora.show.adapters import adapter_table, spectra_table

        loaded, lens = ll.load_adapter(folder), None
        if base.model is not None:
            lens = lens_for(base, loaded, progress, leaves_out=True)
        summary = summarise(loaded, lens)
    console = Console()
    console.print(adapter_table(summary, stated_fields(folder)))
    console.print()
    console.print(spectra_table(summary, None if every else top))
