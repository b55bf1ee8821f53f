"""What `lens-lora inspect` does once the adapter's files are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from lens_lora.adapters.adapter import Adapter, load_adapter
from lens_lora.adapters.peft_files import stated_fields
from lens_lora.analyses.spectra import lacking, summarise
from lens_lora.base_model import load_base
from lens_lora.commands.loading import EMBEDDED
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.lens import LoraLens
from lens_lora.loading import base_beside, hooked_model, quiet_libraries
from lens_lora.show.tables.adapter import adapter_table, spectra_table

__all__ = ["run"]


def run(folder: Path, model: str | None, top: int | None, *, quiet: bool) -> None:
    """Print what the adapter is, and the spectrum of each update.

    Args:
        folder: the adapter's.
        model, quiet: as the options of the same names.
        top: how many of the largest updates to list; None for all.
    """
    loaded = load_adapter(folder)
    config = stated_fields(folder)
    summary = summarise(loaded, None if model is None else _lens(loaded, model, quiet))
    console = Console()
    console.print(adapter_table(summary, config))
    console.print()
    console.print(spectra_table(summary, top))


def _lens(adapter: Adapter, model: str, quiet: bool) -> LoraLens:
    """The lens over those modules of the adapter that the model has; an error if it has none.

    Raises:
        LensLoraError: the model cannot be loaded or hooked, or the adapter does not fit it.
    """
    hooked, base = _hooked(model, quiet)
    left_out = lacking(adapter, hooked)
    is_partial = 0 < len(left_out) < len(adapter)
    chosen = adapter.without(*left_out) if is_partial else adapter
    return LoraLens(hooked, chosen, hf_model=base_beside(type(hooked).__name__, base, chosen))


def _hooked(model: str, quiet: bool) -> tuple[Any, Any]:
    """The hooked model, and the base that it was made from."""
    Console(stderr=True, quiet=quiet).print(f"Loading {model}", highlight=False, markup=False)
    with quiet_libraries():
        base, tokenizer = load_embedded(quiet=True) if model == EMBEDDED else load_base(model)
        return hooked_model(base, tokenizer)[0], base
