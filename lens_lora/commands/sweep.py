"""`lens-lora sweep`: a file of prompts through chosen analyses, into Parquet."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lens_lora.adapters.adapter import load_adapter
from lens_lora.commands.loading import (
    lens_over,
    load_model_of,
    require_place,
    say,
    shipped_adapter,
    told_if_interrupted,
)
from lens_lora.commands.options import AdapterOption, ClassOption, ModelOption, Quiet
from lens_lora.sweeps.analyses import ANALYSES, chosen
from lens_lora.sweeps.processes import launched
from lens_lora.sweeps.records import read_records
from lens_lora.sweeps.result import SweepResult
from lens_lora.sweeps.sweep import require_resumable
from lens_lora.sweeps.sweep import sweep as run_sweep

__all__ = ["sweep"]

_SHOWN_ERRORS = 10


def sweep(
    records: Annotated[
        Path,
        typer.Option(
            exists=True, dir_okay=False, help="JSONL or CSV with prompt, doc, pre, perhaps id."
        ),
    ],
    out: Annotated[
        Path, typer.Option(dir_okay=False, help="Ends in .parquet; its folder is made.")
    ] = Path("results.parquet"),
    model: ModelOption = None,
    adapter: AdapterOption = None,
    analysis: Annotated[
        list[str] | None,
        typer.Option(help=f"Any of {', '.join(ANALYSES)}; may be repeated. Default: first_order."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts run together.")] = 8,
    model_class: ClassOption = None,
    device: Annotated[
        str | None, typer.Option(help="Default: the CPU, or what accelerate launch gives.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many records.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with what is at --out, or remove it and start over.")
    ] = True,
    quiet: Quiet = False,
) -> None:
    """Run hundreds of prompts; one row per prompt and site. The same command goes on after a kill.

    Over several processes: accelerate launch --num_processes 2 -m lens_lora sweep …
    """
    if out.suffix != ".parquet":
        raise typer.BadParameter(f"--out {out}: expected a name that ends in .parquet.")
    names, rows = chosen(analysis or ["first_order"]), read_records(records)[:limit]
    loaded = load_adapter(adapter or shipped_adapter())
    if resume:
        require_resumable(out, loaded, names)
    processes = launched()
    if processes.is_main:
        require_place(out, "--out")
    progress = Console(stderr=True, quiet=quiet or not processes.is_main)
    base, tokenizer = load_model_of(loaded, model, progress)
    kind = None if model_class is None else model_class.value
    place = device or processes.device
    lens = lens_over(base, tokenizer, loaded, progress, kind=kind, device=place)
    kept = f"What is done is kept beside {out}; the same command goes on with it."
    with warnings.catch_warnings(), told_if_interrupted(lambda: kept):
        warnings.simplefilter("ignore")  # bad records are listed below
        result = run_sweep(
            lens,
            rows,
            names,
            out=out,
            batch_size=batch_size,
            resume=resume,
            progress=not progress.quiet,
        )
    if processes.is_main:
        _print(result, processes.count)
    if not result.done:
        raise typer.Exit(1)


def _print(result: SweepResult, processes: int) -> None:
    table = Table(title=f"Sweep of {result.readout}", title_justify="left", show_header=False)
    again = f", {result.resumed} of them before this run" if result.resumed else ""
    table.add_row("prompts done", f"{result.done} of {result.records}{again}")
    if processes > 1:
        table.add_row("processes", str(processes))
    table.add_row("margins that flip", f"{result.flips} of {result.done}")
    table.add_row("records with errors", str(len(result.errors)))
    table.add_row("analyses", f"{', '.join(result.analyses)}, in {result.units or 'no units'}")
    table.add_row("model", f"{result.meta['model']} as {result.meta['model_class']}")
    table.add_row("adapter", Text(f"{result.meta['adapter']}, {len(result.sites)} sites"))
    Console().print(table)
    for identity, error in result.errors[:_SHOWN_ERRORS]:
        say(f"  {identity}: {error}")
    if len(result.errors) > _SHOWN_ERRORS:
        say(f"  … and {len(result.errors) - _SHOWN_ERRORS} more, in the column 'error'")
    say(f"One row per prompt and site: {result.path.absolute()}")
    say(f"One row per prompt:          {result.prompts_path.absolute()}")
