"""What `lens-lora checkpoints` does once the folders are found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lens_lora.adapters.adapter import load_adapter
from lens_lora.analyses.checkpoints import checkpoints
from lens_lora.commands.loading import announce, lens_for
from lens_lora.commands.options import Subject
from lens_lora.commands.terminal import say
from lens_lora.errors import AdapterError
from lens_lora.loading import quiet_libraries
from lens_lora.readouts.answers import margin_between
from lens_lora.show.page.checkpoints import checkpoints_report
from lens_lora.show.tables.checkpoints import checkpoints_table

__all__ = ["run"]


def run(
    subject: Subject,
    folder: Path,
    prompts: Sequence[str],
    doc: str,
    pre: str,
    report: Path,
    progress: Console,
) -> None:
    """Print the table, and write the page.

    Args:
        subject: the last checkpoint and the model.
        folder: of the run.
        prompts, doc, pre, report: as the options of the same names.
        progress: where progress is shown.
    """
    if subject.adapter is None:
        raise AdapterError(f"{folder}: no checkpoint.")
    lens = lens_for(subject, load_adapter(subject.adapter), "cpu", progress)
    announce(lens)
    ready = lens.prompts(list(prompts))
    readout = margin_between(lens.model, doc, pre, ready)
    with quiet_libraries():
        found = checkpoints(lens, folder, ready, readout, progress=not progress.quiet)
    Console().print(checkpoints_table(found))
    report.write_text(checkpoints_report(found), encoding="utf-8")
    say(f"\nReport: {report.absolute()}")
