"""`lens-lora sweep`: a file of prompts through chosen analyses, into Parquet."""

from __future__ import annotations

import contextlib
import enum
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lens_lora.adapter import Adapter, load_adapter
from lens_lora.commands.loading import load_model, say, shipped_adapter, step
from lens_lora.lens import LoraLens
from lens_lora.sweeps.analyses import ANALYSES, chosen
from lens_lora.sweeps.processes import launched
from lens_lora.sweeps.records import read_records
from lens_lora.sweeps.result import SweepResult
from lens_lora.sweeps.sweep import sweep as run_sweep

__all__ = ["sweep"]

_SHOWN_ERRORS = 10


class ModelClass(str, enum.Enum):
    """The classes of hooked models."""

    HookedTransformer = "HookedTransformer"
    TransformerBridge = "TransformerBridge"


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
    model: Annotated[
        str | None,
        typer.Option(help="Base model, a hub id or folder. Default: SmolLM2-135M-Instruct."),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="LoRA, a hub id or folder. Default: one that moves a capital to Lyon."),
    ] = None,
    analysis: Annotated[
        list[str] | None,
        typer.Option(help=f"Any of {', '.join(ANALYSES)}; may be repeated. Default: first_order."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts run together.")] = 8,
    model_class: Annotated[
        ModelClass | None, typer.Option("--class", help="Hooked class. Default: what there is.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Default: the CPU, or what accelerate launch gives.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many records.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with what is at --out, or remove it and start over.")
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Run hundreds of prompts; one row per prompt and site. The same command goes on after a kill.

    Over several processes: accelerate launch --num_processes 2 -m lens_lora sweep …
    """
    if out.suffix != ".parquet":
        raise typer.BadParameter(f"--out {out}: expected a name that ends in .parquet.")
    names, rows = chosen(analysis or ["first_order"]), read_records(records)[:limit]
    loaded, processes = load_adapter(adapter or shipped_adapter()), launched()
    progress = Console(stderr=True, quiet=quiet or not processes.is_main)
    lens = _lens(model, loaded, model_class, device or processes.device, progress)
    with warnings.catch_warnings(), _told_how_to_go_on(out, progress):
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


@contextlib.contextmanager
def _told_how_to_go_on(out: Path, progress: Console) -> Generator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        progress.print(
            f"Interrupted. What is done is kept beside {out}; the same command goes on with it.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(130) from error


def _lens(
    model: str | None,
    adapter: Adapter,
    model_class: ModelClass | None,
    device: str,
    progress: Console,
) -> LoraLens:
    from lens_lora.demo.hooked import hooked_model

    base: Any
    base, tokenizer = load_model(model, progress)
    with step("Building the hooked model", progress):
        kind = None if model_class is None else model_class.value
        hooked, _ = hooked_model(base.to(device), tokenizer, kind=kind)
    return LoraLens(hooked, adapter)


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
