"""`lens-lora inspect`: what an adapter is, and how large each of its updates is."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

import lens_lora as ll
from lens_lora.adapters.peft_files import adapter_folder, stated_fields
from lens_lora.commands.options import QuietOption
from lens_lora.commands.running import load_model


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
    quiet: QuietOption = False,
    every: Annotated[bool, typer.Option("--all", help="List every one.")] = False,
) -> None:
    """What an adapter is: its targets, ranks and scales, and the spectrum of each update."""
    folder = adapter_folder(adapter)

    from lens_lora.analyses.spectra import summarise
    from lens_lora.show.adapters import adapter_table, spectra_table

    loaded = ll.load_adapter(folder)
    summary = summarise(loaded, None if model is None else _lens(loaded, model, quiet))
    console = Console()
    console.print(adapter_table(summary, stated_fields(folder)))
    console.print()
    console.print(spectra_table(summary, None if every else top))


def _lens(adapter: ll.Adapter, model: str, quiet: bool) -> ll.LoraLens:
    """The lens over those modules of the adapter that the model has; an error if it has none.

    Raises:
        LensLoraError: the model cannot be loaded or hooked, or the adapter does not fit it.
    """
    from lens_lora.analyses.spectra import lacking
    from lens_lora.loading import base_beside

    hooked, base = _hooked(model, quiet)
    absent = lacking(adapter, hooked)
    has_some = 0 < len(absent) < len(adapter)
    kept = adapter.without(*absent) if has_some else adapter
    return ll.LoraLens(hooked, kept, hf_model=base_beside(type(hooked).__name__, base, kept))


def _hooked(model: str, quiet: bool) -> tuple[Any, Any]:
    """The hooked model, and the base that it was made from."""
    from lens_lora.loading import quiet_libraries
    from lens_lora.model.build import hooked_model

    base, tokenizer = load_model(model, Console(stderr=True, quiet=quiet))
    with quiet_libraries():
        return hooked_model(base, tokenizer)[0], base
