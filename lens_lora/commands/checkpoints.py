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
    DocOption,
    PreOption,
    QuietOption,
    ReportOption,
    require_apart,
    require_different,
    require_writable,
    with_base,
)
from lens_lora.commands.running import announce, lens_for, say


@with_base
def checkpoints(
    run_folder: Annotated[
        Path, typer.Argument(help="A trainer's folder, with checkpoint-<step> folders in it.")
    ],
    prompt: Annotated[list[str], typer.Option(help="Read at its last token; may be repeated.")],
    doc: DocOption,
    pre: PreOption,
    base: BaseModel,
    report: ReportOption = Path("lens_lora_checkpoints.html"),
    quiet: QuietOption = False,
) -> None:
    """A margin, its first order and flip at every checkpoint, and which modules move when."""
    *_, last = folders = list(checkpoint_folders(run_folder).values())
    require_writable(report, "--report")
    require_apart({"--report": report}, base, folders)
    require_different(doc, pre)

    from lens_lora.loading import quiet_libraries
    from lens_lora.readouts.answers import margin_between
    from lens_lora.show.trainings import checkpoints_table

    lens = lens_for(base, ll.load_adapter(last), Console(stderr=True, quiet=quiet))
    announce(lens)
    prompts = lens.prompts(prompt)
    readout = margin_between(lens.model, doc, pre, prompts)
    with quiet_libraries():
        training = ll.checkpoints(lens, run_folder, prompts, readout, progress=not quiet)
    training.save_report(report)
    Console().print(checkpoints_table(training))
    say(f"\nReport: {report.absolute()}")
