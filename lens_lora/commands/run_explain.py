"""What `lens-lora explain` does once its options are checked.

With --fast, prompts that have answers share their passes: they are explained all at once, or one by
one where that fails. In full each takes a while, and the page is written after each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lens_lora.adapters.adapter import load_adapter
from lens_lora.analyses.explain import explain as explain_prompt
from lens_lora.analyses.explain_all import explain_all
from lens_lora.analyses.explain_margin import Explanation
from lens_lora.analyses.explain_response import ResponseExplanation
from lens_lora.commands.loading import announce, lens_for, shipped_adapter
from lens_lora.commands.options import Question, Subject, text_of
from lens_lora.commands.terminal import say, told_if_interrupted
from lens_lora.errors import LensLoraError, PromptError
from lens_lora.hooked.generates import require_room
from lens_lora.lens import LoraLens
from lens_lora.loading import quiet_libraries
from lens_lora.readouts.answers import AnswerLogProb, margin_between
from lens_lora.show.page.report import explanation_report
from lens_lora.show.tables.explanation import explanation_tables
from lens_lora.show.tables.response import response_tables

__all__ = ["run"]


def run(
    subject: Subject,
    questions: Sequence[Question],
    report: Path,
    progress: Console,
    *,
    max_new_tokens: int,
    fast: bool,
    null: int,
) -> None:
    """Print a summary of each question, and write the page after each.

    Args:
        subject: the adapter and the model.
        questions: prompts with their answers, or with a response to be generated or not.
        report: the page to write.
        progress: where progress is shown.
        max_new_tokens, fast, null: as the options of the same names.
    """
    started = time.perf_counter()
    adapter = load_adapter(subject.adapter or shipped_adapter())
    lens = lens_for(subject, adapter, "cpu", progress)
    announce(lens)
    _require_fit(lens, questions, max_new_tokens)
    explanations: list[Explanation | ResponseExplanation] = []
    with told_if_interrupted(lambda: _kept(report, len(explanations), len(questions))):
        options = {"fast": fast, "null": null, "progress": not progress.quiet}
        waiting = _together(questions, fast)
        while waiting:
            some = waiting.pop(0)
            first = len(explanations) + 1
            numbers = f"{first}" if len(some) == 1 else f"{first} to {first + len(some) - 1}"
            progress.print(f"Explaining prompt {numbers} of {len(questions)}", highlight=False)
            try:
                with quiet_libraries():
                    found = _explained(lens, some, max_new_tokens, options)
            except LensLoraError:
                if len(some) == 1:
                    raise
                waiting = [[question] for question in some]
                continue
            for number, (one, question) in enumerate(zip(found, some, strict=True), start=first):
                _print(one, question, f"{number} of {len(questions)}")
            explanations += found
            report.write_text(explanation_report(explanations), encoding="utf-8")
    say(f"\nReport: {report.absolute()}")
    progress.print(f"Done in {time.perf_counter() - started:.0f} seconds.", highlight=False)


def _together(questions: Sequence[Question], fast: bool) -> list[Sequence[Question]]:
    """Questions that are explained in one call."""
    conversations = {not isinstance(question.prompt, str) for question in questions}
    if fast and len(conversations) == 1 and all(question.doc for question in questions):
        return [questions]
    return [[question] for question in questions]


def _kept(report: Path, done: int, count: int) -> str:
    if not done:
        return f"No prompt was finished, and {report} is not written."
    return f"{report} holds the first {done} of {count} prompts."


def _require_fit(lens: LoraLens, questions: Sequence[Question], most: int) -> None:
    """Refuse what does not fit before the first prompt is explained.

    Raises:
        PromptError, TokenError: naming the prompt where there are several.
    """
    for number, question in enumerate(questions, start=1):
        try:
            ready = lens.prompts(question.prompt)
            if question.doc is not None and question.pre is not None:
                answers = margin_between(lens.model, question.doc, question.pre, ready)
                answers.over(lens.model, ready)
            elif question.response is not None:
                AnswerLogProb(question.response).over(lens.model, ready)
            else:
                require_room(lens, ready, most)
        except LensLoraError as error:
            if len(questions) == 1:
                raise
            raise PromptError(f"prompt {number}, {text_of(question.prompt)!r}: {error}") from error


def _explained(
    lens: LoraLens, questions: Sequence[Question], most: int, options: dict[str, Any]
) -> list[Explanation | ResponseExplanation]:
    """Several questions have answers; one may ask for a response."""
    if len(questions) > 1:
        prompts: Any = [question.prompt for question in questions]
        docs = [question.doc for question in questions if question.doc is not None]
        pres = [question.pre for question in questions if question.pre is not None]
        return list(explain_all(lens, prompts, docs, pres, **options))
    ((prompt, doc, pre, response),) = questions
    if doc is not None and pre is not None:
        return [explain_prompt(lens, prompt, doc, pre, **options)]
    asked = {name: options[name] for name in ("fast", "progress")}
    if response is not None:
        return [explain_prompt(lens, prompt, response=response, **asked)]
    said = lens.generate(prompt, most, progress=options["progress"])
    return [explain_prompt(lens, said.prompts, response=said, **asked)]


def _print(found: Explanation | ResponseExplanation, question: Question, which: str) -> None:
    """Its summary, as soon as it is known."""
    console = Console()
    if not which.endswith(" of 1"):
        console.rule(Text(f"{which}: {text_of(question.prompt)}"), align="left")
    for paragraph in found.story().split("\n"):
        console.print(Text(f"\n{paragraph}"))
    console.print()
    if isinstance(found, ResponseExplanation):
        console.print(response_tables(found))
    else:
        console.print(explanation_tables(found))
