"""`lens-lora demo`: how a LoRA moves one fact, on the embedded model and adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import lens_lora as ll
from lens_lora.commands.options import (
    AdapterOption,
    BaseModel,
    DocOption,
    PreOption,
    Prompt,
    QuietOption,
    ReportOption,
    SystemOption,
    conversation,
    folder_of,
    require_apart,
    require_different,
    require_writable,
    with_base,
)
from lens_lora.commands.running import announce, lens_for, load_model, say, tell, timed
from lens_lora.errors import LensLoraError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@with_base
def demo(
    base: BaseModel,
    adapter: AdapterOption = None,
    prompt: Annotated[
        str, typer.Option(help="Read at its last token.")
    ] = "The capital of France is",
    chat: Annotated[
        str | None,
        typer.Option(help="What a user says, by the model's chat template; in place of --prompt."),
    ] = None,
    system: SystemOption = None,
    doc: DocOption = " Lyon",
    pre: PreOption = " Paris",
    report: ReportOption = Path("lens_lora_demo.html"),
    train: Annotated[
        bool, typer.Option("--train", help="Train a new adapter, about half a minute, and use it.")
    ] = False,
    train_out: Annotated[
        Path, typer.Option(help="Folder for the adapter of --train.", file_okay=False)
    ] = Path("lens_lora_adapter"),
    quiet: QuietOption = False,
) -> None:
    """Explain how a LoRA moves one fact: the story, the numbers, and a page of figures."""
    if train and adapter is not None:
        raise typer.BadParameter("--train makes an adapter; leave --adapter out.")
    if train and base.is_quantised:
        raise typer.BadParameter("--train needs weights that are not quantised.")
    if not prompt:
        raise typer.BadParameter(
            "it is empty: there is no token to read at.", param_hint="--prompt"
        )
    if system is not None and chat is None:
        raise typer.BadParameter("it stands before a --chat; give one.", param_hint="--system")
    question = prompt if chat is None else conversation(chat, system)
    require_different(doc, pre)
    require_writable(report, "--report")
    folder = folder_of(adapter)
    trained = {"--train-out": train_out} if train else {}
    require_apart({"--report": report, **trained}, base, [folder])

    progress, loaded = Console(stderr=True, quiet=quiet), None
    with timed(progress):
        if train:
            loaded = load_model(base.model, progress, base)
            _train(*loaded, base.model, train_out, quiet)
            folder = train_out
        lens = lens_for(base, ll.load_adapter(folder), progress, loaded=loaded)
        announce(lens)
        _explain(lens, question, doc, pre, report, progress)
        say(f"Report: {report.absolute()}")


def _train(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    model: str | None,
    out: Path,
    quiet: bool,
) -> None:
    from lens_lora.demonstration.embedded import EMBEDDED_HUB_ID, LYON_SENTENCES, train_adapter
    from lens_lora.loading import quiet_libraries

    base_name = model or EMBEDDED_HUB_ID
    try:
        with quiet_libraries():
            train_adapter(
                hf_model, tokenizer, LYON_SENTENCES, out, base_name=base_name, quiet=quiet
            )
    except ValueError as error:
        raise LensLoraError(f"{base_name}: the demo cannot train on it ({error}).") from error


def _explain(
    lens: ll.LoraLens, prompt: Prompt, doc: str, pre: str, report: Path, progress: Console
) -> None:
    """Write the page, and print the story and its tables."""
    from lens_lora.show.tables import margin_table, modules_table, moved_table
    from lens_lora.show.words import explained_account

    shown = not progress.quiet
    explanation: Any = ll.explain(lens, prompt, doc, pre, fast=True, progress=shown)
    explanation.save_report(report)
    console = tell(explanation.story())
    console.print(margin_table(explained_account(explanation)))
    console.print(modules_table(explanation.first_order, k=10, prompt=0))
    console.print(moved_table(explanation, 5))
