"""What `lens-lora sweep` does once its options are checked."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lens_lora.adapters.adapter import load_adapter
from lens_lora.commands.loading import lens_for, shipped_adapter
from lens_lora.commands.options import Subject
from lens_lora.commands.terminal import say, told_if_interrupted
from lens_lora.errors import ArgumentError
from lens_lora.readouts.answers import AnswerLogProb
from lens_lora.readouts.divergence import KL
from lens_lora.sweeps.batches import Make
from lens_lora.sweeps.processes import launched
from lens_lora.sweeps.records import Record
from lens_lora.sweeps.result import SweepResult
from lens_lora.sweeps.sweep import require_resumable, require_slopes, sweep
from lens_lora.sweeps.token_file import ActivationsFile

__all__ = ["run"]

_SHOWN_ERRORS = 10
_READOUTS: dict[str, Make] = {"log-prob": AnswerLogProb, "kl": KL}


def run(
    subject: Subject,
    records: Iterable[Record],
    analyses: Sequence[str],
    out: Path,
    *,
    response: str | None,
    batch_size: int,
    resume: bool,
    quiet: bool,
) -> None:
    """Run the sweep and print what is in its files.

    Args:
        subject: the adapter and the model.
        records: as they were read.
        analyses: names from `ANALYSES`.
        out, response, batch_size, resume, quiet: as the options of the same names.

    Raises:
        ArgumentError: a device map for several processes.
        SweepError: derivatives of a KL, or results at `out` of another sweep.
        typer.Exit: code 1 if no prompt has numbers.
    """
    adapter = load_adapter(subject.adapter or shipped_adapter())
    readout = None if response is None else _READOUTS[response]
    require_slopes(analyses, None if readout is None else readout(["", ""]))
    if resume:
        require_resumable(out, adapter, analyses, readout)
    processes = launched()
    if processes.count > 1 and subject.how.device_map is not None:
        raise ArgumentError(
            f"--device-map and {processes.count} processes: each would place a model of its own on "
            "the same devices. Launch one process for a model over several devices, or leave "
            "--device-map out: each process then takes the device of its number."
        )
    progress = Console(stderr=True, quiet=quiet or not processes.is_main)
    lens = lens_for(subject, adapter, processes.device, progress)
    kept = f"Finished prompts are kept beside {out}; run the same command again to resume."
    with warnings.catch_warnings(), told_if_interrupted(lambda: kept):
        warnings.simplefilter("ignore")  # bad records are listed below
        result = sweep(
            lens,
            records,
            analyses,
            out=out,
            readout=readout,
            batch_size=batch_size,
            resume=resume,
            progress=not progress.quiet,
        )
    if isinstance(result, ActivationsFile):
        if processes.is_main:
            _print_file(result)
        if result.errors == result.texts:
            raise typer.Exit(1)
        return
    if processes.is_main:
        _print(result, processes.count)
    if not result.done:
        raise typer.Exit(1)


def _print_file(found: ActivationsFile) -> None:
    table = Table(title="Sweep of activations", title_justify="left", show_header=False)
    table.add_row("texts", f"{found.texts}, with {found.tokens} tokens")
    table.add_row("records with errors", str(found.errors))
    table.add_row("sites", f"{len(found.sites)} of rank {max(found.ranks)}, gauge {found.gauge}")
    table.add_row("model", f"{found.meta['model']} as {found.meta['model_class']}")
    table.add_row("adapter", Text(found.meta["adapter"]))
    Console().print(table)
    for _, row in found.bad().head(_SHOWN_ERRORS).iterrows():
        say(f"  {row['id']}: {row['error']}")
    say(f"One row per token: {found.path.absolute()}")


def _print(result: SweepResult, processes: int) -> None:
    table = Table(title=f"Sweep of {result.readout}", title_justify="left", show_header=False)
    again = f", {result.resumed} of them before this run" if result.resumed else ""
    table.add_row("prompts done", f"{result.done} of {result.records}{again}")
    if processes > 1:
        table.add_row("processes", str(processes))
    if "margin" in result.readout:
        table.add_row("margins that flip, beyond rounding", f"{result.flips} of {result.done}")
    table.add_row("records with errors", str(len(result.errors)))
    table.add_row("analyses", f"{', '.join(result.analyses)}, in {result.units or 'no units'}")
    table.add_row("model", f"{result.meta['model']} as {result.meta['model_class']}")
    table.add_row("adapter", Text(f"{result.meta['adapter']}, {len(result.sites)} sites"))
    Console().print(table)
    for identity, error in result.errors[:_SHOWN_ERRORS]:
        say(f"  {identity}: {error}")
    if len(result.errors) > _SHOWN_ERRORS:
        say(f"  … and {len(result.errors) - _SHOWN_ERRORS} more, in the column 'error'")
    for damage in result.damaged:
        say(f"  run again, as its file could not be read: {damage}")
    say(f"One row per prompt and site: {result.path.absolute()}")
    say(f"One row per prompt:          {result.prompts_path.absolute()}")
