"""`lens-lora repair`: the part of an adapter that keeps one fact and drops what it spills."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lens_lora.adapters.peft_files import adapter_folder
from lens_lora.commands.options import AdapterOption, ClassOption, ModelOption, Quiet, Subject
from lens_lora.commands.terminal import require_different, require_place
from lens_lora.errors import LensLoraError

__all__ = ["GateOf", "repair"]


class GateOf(str, enum.Enum):
    """What a gate is of."""

    rank = "rank"
    site = "site"


def repair(
    prompt: Annotated[
        list[str], typer.Option(help="On which the margin is kept; may be repeated.")
    ],
    doc: Annotated[str, typer.Option(help="The document's answer, with its leading space.")],
    pre: Annotated[str, typer.Option(help="The pretrained answer, with its leading space.")],
    drop: Annotated[
        Path,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A file with a text a line, on which the model is to stay the base.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The repaired adapter's folder, in PEFT's format.")],
    test_prompt: Annotated[
        list[str] | None, typer.Option(help="Held out, to judge what is kept; may be repeated.")
    ] = None,
    test_drop: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Held-out texts, to judge what is left."),
    ] = None,
    keep_share: Annotated[float, typer.Option(help="Of the margin's shift, that must stay.")] = 0.9,
    of: Annotated[GateOf, typer.Option(help="What is kept or not.")] = GateOf.rank,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimiser.")] = 40,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    model_class: ClassOption = None,
    quiet: Quiet = False,
) -> None:
    """Keep a fact, drop what else the adapter does; judged beside scaling the whole adapter."""
    require_different(doc, pre)
    require_place(out / "adapter_config.json", "--out")
    texts, held_out = _texts(drop), _texts(test_drop) if test_drop else []
    if bool(test_prompt) != bool(held_out):
        raise typer.BadParameter(
            "--test-prompt and --test-drop go together: a repair is judged on both kinds."
        )
    folder = adapter_folder(adapter) if adapter else None
    from lens_lora.commands.run_repair import Behaviours, run

    asked = Behaviours(prompt, doc, pre, texts, test_prompt or [], held_out)
    subject = Subject(folder, model, model_class)
    run(subject, asked, out, keep_share, of.value, steps, Console(stderr=True, quiet=quiet))


def _texts(file: Path) -> list[str]:
    try:
        lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise LensLoraError(f"{file}: not UTF-8 ({error}); save it as UTF-8.") from error
    if not lines:
        raise LensLoraError(f"{file} holds no text; give one a line.")
    return lines
