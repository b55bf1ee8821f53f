"""`lens-lora demo`: how a LoRA moves one fact, on the embedded model and adapter."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from lens_lora.adapters.adapter import Adapter, load_adapter
from lens_lora.analyses.first_order import first_order
from lens_lora.analyses.logit_shift import LogitShift, logit_shift
from lens_lora.analyses.margin import FactMargin, fact_margin
from lens_lora.commands.loading import (
    announce,
    lens_over,
    load_model,
    load_model_of,
    require_writable,
    say,
    shipped_adapter,
    step,
)
from lens_lora.commands.options import AdapterOption, ModelOption, Quiet, Report
from lens_lora.errors import LensLoraError
from lens_lora.lens import LoraLens
from lens_lora.readouts.readout import Margin
from lens_lora.results.attribution import Attribution
from lens_lora.show.page.report import margin_report
from lens_lora.show.tables.attribution import modules_table
from lens_lora.show.tables.logit_shift import tokens_table
from lens_lora.show.tables.margin import margin_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["demo"]


@dataclasses.dataclass(frozen=True)
class _Analysis:
    margin: FactMargin
    positions: Attribution
    shift: LogitShift


def demo(
    model: ModelOption = None,
    adapter: AdapterOption = None,
    prompt: Annotated[
        str, typer.Option(help="Read at its last token.")
    ] = "The capital of France is",
    doc: Annotated[str, typer.Option(help="The document's fact, one token.")] = " Lyon",
    pre: Annotated[str, typer.Option(help="The pretrained fact, one token.")] = " Paris",
    report: Report = Path("lens_lora_demo.html"),
    train: Annotated[
        bool, typer.Option("--train", help="Train a new adapter, about half a minute, and use it.")
    ] = False,
    train_out: Annotated[
        Path, typer.Option(help="Folder for the adapter of --train.", file_okay=False)
    ] = Path("lens_lora_adapter"),
    quiet: Quiet = False,
) -> None:
    """Explain how a LoRA moves one fact: the story, the numbers, and a page of figures."""
    if train and adapter is not None:
        raise typer.BadParameter("--train makes an adapter; leave --adapter out.")
    if not prompt:
        raise typer.BadParameter(
            "it is empty: there is no token to read at.", param_hint="--prompt"
        )
    require_writable(report, "--report")
    started, progress = time.perf_counter(), Console(stderr=True, quiet=quiet)
    if train:
        base, tokenizer = load_model(model, progress)
        chosen = _train(base, tokenizer, model, train_out, quiet)
    else:
        chosen = load_adapter(adapter or shipped_adapter())
        base, tokenizer = load_model_of(chosen, model, progress)
    lens = lens_over(base, tokenizer, chosen, progress)
    announce(lens)
    analysis = _analyse(lens, prompt, doc, pre, progress)
    _print(analysis)
    page = margin_report(analysis.margin, logit_shift=analysis.shift, positions=analysis.positions)
    report.write_text(page, encoding="utf-8")
    say(f"Report: {report.absolute()}")
    progress.print(f"Done in {time.perf_counter() - started:.0f} seconds.", highlight=False)


def _train(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    model: str | None,
    out: Path,
    quiet: bool,
) -> Adapter:
    from lens_lora.demonstration.embedded import EMBEDDED_HUB_ID
    from lens_lora.demonstration.train import LYON_SENTENCES, train_adapter
    from lens_lora.loading import quiet_libraries

    base_name = model or EMBEDDED_HUB_ID
    try:
        with quiet_libraries():
            train_adapter(
                hf_model, tokenizer, LYON_SENTENCES, out, base_name=base_name, quiet=quiet
            )
    except ValueError as error:
        raise LensLoraError(f"{base_name}: the demo cannot train on it ({error}).") from error
    return load_adapter(out)


def _analyse(lens: LoraLens, prompt: str, doc: str, pre: str, progress: Console) -> _Analysis:
    readout, shown = Margin(doc, pre), not progress.quiet
    with step("The margin along the path", progress):
        margin = fact_margin(lens, prompt, doc, pre, progress=False)
        positions = first_order(lens, prompt, readout, by="position")
    shift = logit_shift(lens, prompt, by_site=True, progress=shown)
    return _Analysis(margin, positions, shift)


def _print(analysis: _Analysis) -> None:
    console = Console()
    for paragraph in analysis.margin.story().split("\n"):
        console.print(Text(f"\n{paragraph}"))
    console.print()
    console.print(margin_table(analysis.margin))
    console.print(modules_table(analysis.margin.attribution, k=10, prompt=0))
    console.print(tokens_table(analysis.shift, k=10))
