"""`lens-lora explain`: what an adapter did on a prompt, in the terminal and as a page.

What the model, the adapter, the prompts or the answers are refused for is raised before anything
long is run; the command line prints it as one line.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.text import Text

from lens_lora.adapters.adapter import load_adapter
from lens_lora.analyses.explain import Explanation
from lens_lora.analyses.explain import explain as explain_prompt
from lens_lora.commands.loading import (
    announce,
    lens_over,
    load_model_of,
    require_writable,
    say,
    shipped_adapter,
    told_if_interrupted,
)
from lens_lora.commands.options import AdapterOption, ClassOption, ModelOption, Quiet, Report
from lens_lora.errors import LensLoraError, PromptError
from lens_lora.lens import LoraLens
from lens_lora.readouts.answers import margin_between
from lens_lora.show.page.report import explanation_report
from lens_lora.show.tables.explanation import explanation_tables
from lens_lora.sweeps.records import read_records

__all__ = ["explain"]

_MOST = 10
_EXAMPLE = "--prompt 'The capital of France is' --doc ' Lyon' --pre ' Paris'"


class _Question(NamedTuple):
    prompt: str
    doc: str
    pre: str


def explain(
    prompt: Annotated[
        list[str] | None, typer.Option(help="Read at its last token; may be repeated.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A .txt file with a prompt a line, or .jsonl or .csv with prompt, doc, pre.",
        ),
    ] = None,
    doc: Annotated[
        str | None, typer.Option(help="The document's answer, with its leading space.")
    ] = None,
    pre: Annotated[
        str | None, typer.Option(help="The pretrained answer, with its leading space.")
    ] = None,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    report: Report = Path("lens_lora_report.html"),
    fast: Annotated[
        bool, typer.Option("--fast", help="Without running single modules, coupling and curves.")
    ] = False,
    null: Annotated[
        int, typer.Option(min=0, help="Compare with so many random adapters of the same sizes.")
    ] = 0,
    model_class: ClassOption = None,
    device: Annotated[str, typer.Option(help="Where to run, as torch names it.")] = "cpu",
    quiet: Quiet = False,
) -> None:
    """Explain what a LoRA did to the margin between two answers: a summary, and a page.

    Without a model and an adapter of your own:

    lens-lora explain --prompt 'The capital of France is' --doc ' Lyon' --pre ' Paris'
    """
    require_writable(report, "--report")
    if null == 1:
        raise typer.BadParameter("--null: at least 2 random adapters, for a spread.")
    started, progress = time.perf_counter(), Console(stderr=True, quiet=quiet)
    questions = _questions(prompt or [], prompts, doc, pre)
    _note_spaces(questions, progress)
    loaded = load_adapter(adapter or shipped_adapter())
    base, tokenizer = load_model_of(loaded, model, progress)
    kind = None if model_class is None else model_class.value
    lens = lens_over(base, tokenizer, loaded, progress, kind=kind, device=device)
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


def _questions(
    given: Sequence[str], file: Path | None, doc: str | None, pre: str | None
) -> list[_Question]:
    """Every prompt with its answers; --doc and --pre, where given, hold for all.

    Raises:
        LensLoraError: a bad record of the file, with its line.
        typer.BadParameter: no prompt, an answer that is lacking, or too many prompts.
    """
    found = [(prompt, doc, pre) for prompt in given]
    if file is not None:
        found += _from_file(file, doc, pre)
    if not found:
        raise typer.BadParameter(
            f"--prompts: {file} holds no prompt."
            if file
            else f"what to explain? Give --prompts FILE, or {_EXAMPLE}."
        )
    if len(found) > _MOST:
        raise typer.BadParameter(
            f"{len(found)} prompts are too many for a page to read, {_MOST} at most; "
            "`lens-lora sweep` runs hundreds, into a table."
        )
    questions: list[_Question] = []
    for text, its_doc, its_pre in found:
        if not text:
            raise typer.BadParameter("a prompt is empty: there is no token to read at.")
        if not its_doc or not its_pre:
            raise typer.BadParameter(
                f"the prompt {text!r} needs both answers: --doc ' Lyon' --pre ' Paris', each with "
                "its leading space."
            )
        questions.append(_Question(text, its_doc, its_pre))
    return questions


def _from_file(
    file: Path, doc: str | None, pre: str | None
) -> list[tuple[str, str | None, str | None]]:
    if file.suffix.lower() == ".txt":
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise LensLoraError(f"{file}: not UTF-8 ({error}); save it as UTF-8.") from error
        return [(line, doc, pre) for line in lines if line.strip()]
    if file.suffix.lower() not in (".jsonl", ".csv"):
        raise LensLoraError(f"{file}: expected a file that ends in .txt, .jsonl or .csv.")
    records = read_records(file, with_answers=doc is None or pre is None)
    bad = next((record.error for record in records if record.error), None)
    if bad:
        raise LensLoraError(f"{file}, {bad}")
    return [(str(r.prompt), doc or r.doc, pre or r.pre) for r in records]


def _note_spaces(questions: Sequence[_Question], progress: Console) -> None:
    """The two slips by which a tokenizer makes other tokens than were meant."""
    for prompt, *answers in questions:
        if prompt != prompt.rstrip(" "):
            note = f"the prompt {prompt!r} ends in a space, which is a token of its own"
        elif any(answer[:1].isalnum() for answer in answers):
            note = f"the answers {' and '.join(map(repr, answers))} do not both begin with a space"
        else:
            continue
        progress.print(Text(f"Note: {note}; is that meant?", style="yellow"), soft_wrap=True)


def _require_fit(lens: LoraLens, questions: Sequence[_Question]) -> None:
    """Refuse a prompt or an answer that does not fit before the first is explained.

    Raises:
        PromptError, TokenError: naming the prompt where there are several.
    """
    for number, question in enumerate(questions, start=1):
        try:
            ready = lens.prompts(question.prompt)
            margin_between(lens.model, question.doc, question.pre, 1).over(lens.model, ready)
        except LensLoraError as error:
            if len(questions) == 1:
                raise
            raise PromptError(f"prompt {number}, {question.prompt!r}: {error}") from error


def _explained(
    lens: LoraLens, question: _Question, which: str, fast: bool, null: int, progress: Console
) -> Explanation:
    """One prompt, its summary printed as soon as it is known."""
    from lens_lora.loading import quiet_libraries

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
