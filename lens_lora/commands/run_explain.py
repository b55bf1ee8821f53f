"""What `lens-lora explain` does once its options are checked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lens_lora.adapters.adapter import load_adapter
from lens_lora.analyses.explain import Explanation
from lens_lora.analyses.explain import explain as explain_prompt
from lens_lora.commands.loading import announce, lens_for, shipped_adapter
from lens_lora.commands.options import Question, Subject
from lens_lora.commands.terminal import say, told_if_interrupted
from lens_lora.errors import LensLoraError, PromptError
from lens_lora.lens import LoraLens
from lens_lora.loading import quiet_libraries
from lens_lora.readouts.answers import margin_between
from lens_lora.show.page.report import explanation_report
from lens_lora.show.tables.explanation import explanation_tables

__all__ = ["run"]


def run(
    subject: Subject,
    questions: Sequence[Question],
    report: Path,
    progress: Console,
    *,
    fast: bool,
    null: int,
) -> None:
    """Print a summary of each question, and write the page after each.

    Args:
        subject: the adapter and the model.
        questions: prompts with their answers.
        report: the page to write.
        progress: where progress is shown.
        fast, null: as the options of the same names.
    """
    started = time.perf_counter()
    adapter = load_adapter(subject.adapter or shipped_adapter())
    lens = lens_for(subject, adapter, "cpu", progress)
    announce(lens)
    _require_fit(lens, questions)
    explanations: list[Explanation] = []
    with told_if_interrupted(lambda: _kept(report, len(explanations), len(questions))):
        for number, question in enumerate(questions, start=1):
            which = f"{number} of {len(questions)}"
            explanations.append(_explained(lens, question, which, fast, null, progress))
            report.write_text(explanation_report(explanations), encoding="utf-8")
    say(f"\nReport: {report.absolute()}")
    progress.print(f"Done in {time.perf_counter() - started:.0f} seconds.", highlight=False)


def _kept(report: Path, done: int, count: int) -> str:
    if not done:
        return f"No prompt was finished, and {report} is not written."
    return f"{report} holds the first {done} of {count} prompts."


def _require_fit(lens: LoraLens, questions: Sequence[Question]) -> None:
    """Refuse a prompt or an answer that does not fit before the first is explained.

    Raises:
        PromptError, TokenError: naming the prompt where there are several.
    """
    for number, question in enumerate(questions, start=1):
        try:
            ready = lens.prompts(question.prompt)
            margin_between(lens.model, question.doc, question.pre, ready).over(lens.model, ready)
        except LensLoraError as error:
            if len(questions) == 1:
                raise
            raise PromptError(f"prompt {number}, {question.prompt!r}: {error}") from error


def _explained(
    lens: LoraLens, question: Question, which: str, fast: bool, null: int, progress: Console
) -> Explanation:
    """One prompt, its summary printed as soon as it is known."""
    progress.print(f"Explaining prompt {which}", highlight=False)
    with quiet_libraries():
        found = explain_prompt(lens, *question, fast=fast, null=null, progress=not progress.quiet)
    console = Console()
    if not which.endswith(" of 1"):
        console.rule(Text(f"{which}: {question.prompt}"), align="left")
    for paragraph in found.story().split("\n"):
        console.print(Text(f"\n{paragraph}"))
    console.print()
    console.print(explanation_tables(found))
    return found
