"""`lens-lora checkpoints`: one fine-tune through its training, as a table and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import lens_lora as ll
from lens_lora.adapters.peft_files import checkpoint_folders
from lens_lora.commands.options import (
    BaseModel,
    Questions,
    QuietOption,
    ReportOption,
    require_apart,
    require_writable,
    with_options,
)
from lens_lora.commands.running import announce, at_work, lens_for, margin_of, note_spaces, say


@with_options
def checkpoints(
    run_folder: Annotated[
        Path, typer.Argument(help="A trainer's folder, with checkpoint-<step> folders in it.")
    ],
    *,
    asked: Questions,
    report: ReportOption = Path("lens_lora_checkpoints.html"),
    quiet: QuietOption = False,
    base: BaseModel,
) -> None:
    """A margin, its first order and flip at every checkpoint, and which modules move when."""
    *_, last = folders = list(checkpoint_folders(run_folder).values())
    require_writable(report, "--report")
    require_apart({"--report": report}, base, folders, asked.prompts)
    questions = asked.listed()

    with at_work(base, quiet=quiet) as progress:
        from lens_lora.loading import quiet_libraries
        from lens_lora.show.trainings import checkpoints_table

        note_spaces(questions, progress)
        lens = lens_for(base, ll.load_adapter(last), progress)
        announce(lens)
        prompts, readout = margin_of(lens, questions)
        with quiet_libraries():
            training = ll.checkpoints(lens, run_folder, prompts, readout, progress=not quiet)
        training.save_report(report)
        Console().print(checkpoints_table(training))
        say(f"\nReport: {report.absolute()}")
