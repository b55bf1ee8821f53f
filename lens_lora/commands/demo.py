"""`lens-lora demo`: how a LoRA moves one fact, on the embedded model and adapter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import lens_lora as ll
from lens_lora.commands.options import (
    AdapterIfOther,
    BaseModel,
    Question,
    Questions,
    QuietOption,
    ReportOption,
    folder_of,
    require_apart,
    require_writable,
    with_options,
)
from lens_lora.commands.running import announce, at_work, lens_for, load_model, say, tell
from lens_lora.errors import LensLoraError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_LYON = Questions(["The capital of France is"], doc=" Lyon", pre=" Paris")


@with_options
def demo(
    adapter: AdapterIfOther = None,
    *,
    asked: Questions,
    report: ReportOption = Path("lens_lora_demo.html"),
    train: Annotated[
        bool, typer.Option("--train", help="Train a new adapter, about half a minute, and use it.")
    ] = False,
    train_out: Annotated[
        Path, typer.Option(help="Folder for the adapter of --train.", file_okay=False)
    ] = Path("lens_lora_adapter"),
    quiet: QuietOption = False,
    base: BaseModel,
) -> None:
    """Explain how a LoRA moves one fact: the story, the numbers, and a page of figures.

    The fact, unless options name another: The capital of France is Lyon, not Paris.
    """
    if train and adapter is not None:
        raise typer.BadParameter("--train makes an adapter; leave ADAPTER out.")
    if train and base.is_quantised:
        raise typer.BadParameter("--train needs weights that are not quantised.")
    is_other = asked.prompt or asked.prompts or asked.chat
    question, *more = dataclasses.replace(
        asked,
        prompt=asked.prompt if is_other else _LYON.prompt,
        doc=asked.doc or _LYON.doc,
        pre=asked.pre or _LYON.pre,
    ).listed()
    if more:
        raise typer.BadParameter("demo shows one prompt; `lens-lora explain` takes several.")
    require_writable(report, "--report")
    folder = folder_of(adapter, quiet=quiet)
    trained = {"--train-out": train_out} if train else {}
    require_apart({"--report": report, **trained}, base, [folder], asked.prompts)

    with at_work(base, quiet=quiet) as progress:
        loaded = None
        if train:
            loaded = load_model(base.model, progress, base)
            _train(*loaded, base.model, train_out, quiet)
            folder = train_out
        lens = lens_for(base, folder, progress, loaded=loaded)
        announce(lens)
        _explain(lens, question, report, progress)
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


def _explain(lens: ll.LoraLens, question: Question, report: Path, progress: Console) -> None:
    """Write the page, and print the story and its tables."""
    from lens_lora.show.tables import margin_table, modules_table, moved_table
    from lens_lora.show.words import explained_account

    prompt, doc, pre, _ = question
    shown = not progress.quiet
    explanation: Any = ll.explain(lens, prompt, str(doc), str(pre), fast=True, progress=shown)
    explanation.save_report(report)
    console = tell(explanation.story())
    console.print(margin_table(explained_account(explanation)))
    console.print(modules_table(explanation.first_order, k=10, prompt=0))
    console.print(moved_table(explanation, 5))
