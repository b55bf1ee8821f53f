"""`lens-lora inspect` and `diff`: what an adapter is, and what it changed with nothing asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import lens_lora as ll
from lens_lora.adapters.peft_files import stated_fields
from lens_lora.commands import options, running


@dataclasses.dataclass(frozen=True)
class ModelBeside(options.BaseModel):
    """A base model that is loaded only if it is named."""

    model: Annotated[
        str | None,
        "Base model, a folder or hub id, or 'embedded' for SmolLM2-135M-Instruct: adds "
        "the sites and ‖ΔW‖/‖W‖. Default: none.",
    ] = None


@options.with_options
def inspect(
    adapter: options.AdapterArgument,
    *,
    top: Annotated[int, typer.Option(min=1, help="How many of the largest to list.")] = 10,
    every: Annotated[bool, typer.Option("--all", help="List every one.")] = False,
    quiet: options.QuietOption = False,
    base: ModelBeside,
) -> None:
    """What an adapter is: its targets, ranks and scales, and the spectrum of each update."""
    folder = options.folder_of(adapter, quiet=quiet)
    with running.at_work(base, quiet=quiet) as progress:
        from lens_lora.analyses.spectra import summarise
        from lens_lora.show.adapters import adapter_table, spectra_table

        loaded, lens = ll.load_adapter(folder), None
        if base.model is not None:
            lens = running.lens_for(base, loaded, progress, leaves_out=True)
        summary = summarise(loaded, lens)
    console = Console()
    console.print(adapter_table(summary, stated_fields(folder)))
    console.print()
    console.print(spectra_table(summary, None if every else top))


@options.with_options
def diff(
    adapter: options.AdapterArgument,
    *,
    texts: Annotated[
        Path | None,
        options.input_file("A .txt, a text a line. Default: neutral sentences and conversations."),
    ] = None,
    unrelated: Annotated[
        list[str] | None, "An adapter trained for something else, as a control; may be repeated."
    ] = None,
    nulls: Annotated[
        int, typer.Option(min=0, help="Controls in random directions, of the adapter's KL.")
    ] = 2,
    fast: Annotated[bool, "Without the split by module."] = False,
    report: options.ReportOption = Path("lens_lora_diff.html"),
    save: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, help="Also the numbers: a table (.csv), or all of them (.safetensors)."
        ),
    ] = None,
    quiet: options.QuietOption = False,
    base: options.BaseModel,
) -> None:
    """What did this fine-tune change? Unrelated texts, no question, and controls beside.

    lens-lora diff path/to/adapter --report diff.html
    """
    options.require_writable(report, "--report")
    outputs = {"--report": report}
    if save is not None:
        if save.suffix not in (".csv", ".safetensors"):
            raise typer.BadParameter(f"{save}: a .csv or .safetensors file.", param_hint="--save")
        options.require_writable(save, "--save")
        outputs["--save"] = save
    lines = None if texts is None else options.texts_of(texts)
    names = (adapter, *(unrelated or []))
    folder, *controls = [options.folder_of(name, quiet=quiet) for name in names]
    options.require_apart(outputs, base, [folder, *controls], texts)

    with running.at_work(base, quiet=quiet) as progress:
        from lens_lora.loading import quiet_libraries
        from lens_lora.show.adapters import what_changed_tables

        others = [ll.load_adapter(control) for control in controls]
        lens = running.announced(running.lens_for(base, folder, progress))
        with quiet_libraries():
            how: Any = {"nulls": nulls, "split": not fast, "progress": not quiet}
            changes = ll.what_changed(lens, lines, others, **how)
        changes.save_report(report)
        running.tell(changes.story()).print(what_changed_tables(changes))
        running.say(f"\nReport: {report.absolute()}")
        if save is not None:
            if save.suffix == ".csv":
                changes.to_frame().to_csv(save, index=False)
            else:
                changes.save(save)
            running.say(f"Numbers: {save.absolute()}")
