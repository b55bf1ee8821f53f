"""`lens-lora checkpoints`: one fine-tune through its training, as a table and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lens_lora.adapters.run_folder import checkpoint_folders
from lens_lora.commands.options import ClassOption, ModelOption, Quiet, Report, Subject
from lens_lora.commands.terminal import require_different, require_writable

__all__ = ["checkpoints"]


def checkpoints(
    run_folder: Annotated[
        Path, typer.Argument(help="A trainer's folder, with checkpoint-<step> folders in it.")
    ],
    prompt: Annotated[list[str], typer.Option(help="Read at its last token; may be repeated.")],
    doc: Annotated[str, typer.Option(help="The document's answer, with its leading space.")],
    pre: Annotated[str, typer.Option(help="The pretrained answer, with its leading space.")],
    model: ModelOption = None,
    report: Report = Path("lens_lora_checkpoints.html"),
    model_class: ClassOption = None,
    quiet: Quiet = False,
) -> None:
    """A margin, its first order and flip at every checkpoint, and which modules move when."""
    folders = checkpoint_folders(run_folder)
    require_writable(report, "--report")
    require_different(doc, pre)
    from lens_lora.commands.run_checkpoints import run

    subject = Subject(list(folders.values())[-1], model, model_class)
    run(subject, run_folder, prompt, doc, pre, report, Console(stderr=True, quiet=quiet))
