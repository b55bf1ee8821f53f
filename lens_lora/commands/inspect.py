"""`lens-lora inspect`: what an adapter is, and how large each of its updates.

What the adapter or the model is refused for is raised; the command line prints it as one line.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from lens_lora.adapters.adapter import Adapter, load_adapter
from lens_lora.adapters.peft_folder import local_folder, stated_fields
from lens_lora.analyses.spectra import lacking, summarise
from lens_lora.commands.loading import EMBEDDED
from lens_lora.commands.options import Quiet
from lens_lora.lens import LoraLens
from lens_lora.show.tables.adapter import adapter_table, spectra_table

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
    loaded = load_adapter(adapter)
    config = stated_fields(local_folder(adapter))
    summary = summarise(loaded, None if model is None else _lens(loaded, model, quiet))
    console = Console()
    console.print(adapter_table(summary, config))
    console.print()
    console.print(spectra_table(summary, None if every else top))


def _lens(adapter: Adapter, model: str, quiet: bool) -> LoraLens:
    """The lens of what the model has of the adapter; of all of it, to be refused, if it has none.

    Raises:
        LensLoraError: the model cannot be loaded or hooked, or the adapter does not fit it.
    """
    hooked = _hooked(model, quiet)
    left_out = lacking(adapter, hooked)
    is_partial = 0 < len(left_out) < len(adapter)
    return LoraLens(hooked, adapter.without(*left_out) if is_partial else adapter)


def _hooked(model: str, quiet: bool) -> Any:
    from lens_lora.demonstration.embedded import load_embedded
    from lens_lora.loading import hooked_model, load_base, quiet_libraries

    Console(stderr=True, quiet=quiet).print(f"Loading {model}", highlight=False, markup=False)
    with quiet_libraries():
        loaded = load_embedded(quiet=True) if model == EMBEDDED else load_base(model)
        return hooked_model(*loaded)[0]
