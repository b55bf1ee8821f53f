"""What `lens-lora demo` does once its options are checked."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lens_lora.adapters.adapter import Adapter, load_adapter
from lens_lora.analyses.first_order import first_order
from lens_lora.analyses.logit_shift import LogitShift, logit_shift
from lens_lora.analyses.margin import FactMargin, fact_margin
from lens_lora.commands.loading import (
    announce,
    lens_over,
    load_model,
    load_model_of,
    shipped_adapter,
    step,
)
from lens_lora.commands.options import Subject
from lens_lora.commands.terminal import say
from lens_lora.demonstration.embedded import EMBEDDED_HUB_ID
from lens_lora.demonstration.train import LYON_SENTENCES, train_adapter
from lens_lora.errors import LensLoraError
from lens_lora.lens import LoraLens
from lens_lora.loading import quiet_libraries
from lens_lora.readouts.answers import margin_between
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.results.attribution import Attribution
from lens_lora.show.page.report import margin_report
from lens_lora.show.tables.attribution import modules_table
from lens_lora.show.tables.logit_shift import tokens_table
from lens_lora.show.tables.margin import margin_table

__all__ = ["run"]


@dataclasses.dataclass(frozen=True)
class _Analysis:
    margin: FactMargin
    positions: Attribution
    shift: LogitShift


def run(
    subject: Subject,
    prompt: PromptsLike,
    doc: str,
    pre: str,
    *,
    report: Path,
    train_out: Path | None,
    quiet: bool,
) -> None:
    """Print the story, the numbers and the tables, and write the page.

    Args:
        subject: the adapter and the model.
        prompt, doc, pre, report, quiet: as the options of the same names.
        train_out: train an adapter, write it to this folder, and use it.
    """
    started, progress = time.perf_counter(), Console(stderr=True, quiet=quiet)
    if train_out is not None:
        base, tokenizer = load_model(subject.model, progress, subject.how)
        adapter = _train(base, tokenizer, subject.model, train_out, quiet)
    else:
        adapter = load_adapter(subject.adapter or shipped_adapter())
        base, tokenizer = load_model_of(adapter, subject.model, progress, subject.how)
    kind = "TransformerBridge" if subject.how.says_how_to_load else None
    lens = lens_over(base, tokenizer, adapter, progress, kind=kind)
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
    base_name = model or EMBEDDED_HUB_ID
    try:
        with quiet_libraries():
            train_adapter(
                hf_model, tokenizer, LYON_SENTENCES, out, base_name=base_name, quiet=quiet
            )
    except ValueError as error:
        raise LensLoraError(f"{base_name}: the demo cannot train on it ({error}).") from error
    return load_adapter(out)


def _analyse(
    lens: LoraLens, prompt: PromptsLike, doc: str, pre: str, progress: Console
) -> _Analysis:
    readout = margin_between(lens.model, doc, pre, lens.prompts(prompt))
    with step("The margin along the path", progress):
        margin = fact_margin(lens, prompt, doc, pre, progress=False)
        positions = first_order(lens, prompt, readout, by="position")
    shift = logit_shift(lens, prompt, by_site=True, progress=not progress.quiet)
    return _Analysis(margin, positions, shift)


def _print(analysis: _Analysis) -> None:
    console = Console()
    for paragraph in analysis.margin.story().split("\n"):
        console.print(Text(f"\n{paragraph}"))
    console.print()
    console.print(margin_table(analysis.margin))
    console.print(modules_table(analysis.margin.attribution, k=10, prompt=0))
    console.print(tokens_table(analysis.shift, k=10))
