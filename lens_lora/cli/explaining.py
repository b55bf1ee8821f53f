"""`lens-lora explain`, what an adapter did on a prompt, and `demo`, the same of one fact.

1. Every prompt is checked, with its answers, before any long run.
2. With --fast, prompts that have answers share their passes: they are explained all at once, or one
   by one where that fails. In full each takes a while.
3. The page is written after each, so an interrupt or an error keeps what is finished.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import lens_lora as ll
from lens_lora.cli import options, running
from lens_lora.cli.options import Question, text_of
from lens_lora.errors import LensLoraError

if TYPE_CHECKING:
    from lens_lora.explanations.page import Explained


_LARGEST_PAGE = 16  # prompts, each with a dozen interactive figures


@options.with_options
def explain(
    adapter: options.AdapterIfOther = None,
    *,
    asked: options.Questions,
    response: Annotated[
        str | None,
        "What is said after the prompt: which tokens and modules changed it. "
        "Default, without --doc and --pre: the adapted model's own response.",
    ] = None,
    max_new_tokens: Annotated[int, options.least(1, "The most tokens that are generated.")] = 64,
    report: options.ReportOption = Path("lens_lora_report.html"),
    fast: Annotated[bool, "Without running single modules, coupling and curves."] = False,
    null: Annotated[
        int, options.least(0, "Compare with so many random adapters of its sizes.")
    ] = 0,
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """Explain what a LoRA did to two answers' margin, or to a response: a summary, and a page.

    Without a model and an adapter of your own:

    lens-lora explain --prompt 'The capital of France is' --doc ' Lyon' --pre ' Paris'

    lens-lora explain --prompt 'The capital of France is'
    """
    options.require_writable(report, "--report")
    if null == 1:
        raise typer.BadParameter("--null: at least 2 random adapters, for a spread.")
    questions = asked.listed(response, answered=False)
    if len(questions) > _LARGEST_PAGE:
        fact = f"{len(questions)} prompts are too many for one page, {_LARGEST_PAGE} at most"
        raise typer.BadParameter(f"{fact}; `lens-lora sweep` runs hundreds and writes a table.")
    if null and not all(question.doc for question in questions):
        raise typer.BadParameter("--null: random adapters are compared on a margin (--doc, --pre).")
    folder = options.folder_of(adapter, within, quiet=quiet)
    options.require_apart({"--report": report}, base, [folder], asked.prompts)

    with running.at_work(base, quiet=quiet) as progress:
        running.warn_of_spaces(questions)
        lens = running.announced(running.lens_for(base, folder, progress))
        _require_fit(lens, questions, max_new_tokens)
        settings = {"fast": fast, "null": null, "progress": not quiet, "most": max_new_tokens}
        _print(_explain_each(lens, questions, report, progress, settings))
        running.say(f"\nReport: {report.absolute()}")


def _require_fit(lens: ll.LoraLens, questions: Sequence[Question], max_new_tokens: int) -> None:
    """Refuse what does not fit before the first prompt is explained."""
    from lens_lora.responses.generate import require_room

    for number, question in enumerate(questions, start=1):
        try:
            prompts = lens.prompts(question.prompt)
            if question.doc is not None:
                running.margin_of(lens.model, [question], lens.prepend_bos)[1].reading(
                    lens.model, prompts
                )
            elif question.response is not None:
                ll.AnswerLogProb(question.response).reading(lens.model, prompts)
            else:
                require_room(lens, prompts, max_new_tokens)
        except LensLoraError as error:
            if len(questions) == 1:
                raise
            raise error.at(f"prompt {number}, {text_of(question.prompt)!r}") from error


def _explain_each(
    lens: ll.LoraLens, questions: Sequence[Question], report: Path, progress: Console, settings: Any
) -> list[Explained]:
    """Each question explained; after each the page is written, and of several a line printed."""
    from lens_lora.explanations.page import explanation_report

    explanations: list[Explained] = []
    waiting = _together(questions, settings["fast"])
    with running.told_if_interrupted(lambda: _kept(report, len(explanations), len(questions))):
        while waiting:
            batch = waiting.pop(0)
            first, last = len(explanations) + 1, len(explanations) + len(batch)
            numbers = f"{first}" if len(batch) == 1 else f"{first} to {last}"
            progress.print(f"Explaining prompt {numbers} of {len(questions)}", highlight=False)
            try:
                with running.quiet_libraries():
                    explained = _explained(lens, batch, settings)
            except LensLoraError:
                if len(batch) == 1:
                    raise
                waiting = [[question] for question in batch]
                continue
            report.write_text(explanation_report([*explanations, *explained]), encoding="utf-8")
            explanations += explained
            if len(questions) > 1:
                for number, question in enumerate(batch, start=first):
                    title = f"{number} of {len(questions)}: {text_of(question.prompt)}"
                    running.say(f"{title}\n  {_happened(explanations[number - 1])}")
    return explanations


def _together(questions: Sequence[Question], fast: bool) -> list[Sequence[Question]]:
    """Questions that are explained in one call."""
    is_text = {isinstance(question.prompt, str) for question in questions}
    if fast and len(is_text) == 1 and all(question.doc for question in questions):
        return [questions]
    return [[question] for question in questions]


def _kept(report: Path, done: int, count: int) -> str:
    if not done:
        return f"No prompt was finished, and {report} is not written."
    return f"{report} holds the first {done} of {count} prompts."


def _explained(lens: ll.LoraLens, questions: Sequence[Question], settings: Any) -> list[Explained]:
    """Several questions have answers; one may ask for a response."""
    prompts, docs, pres, responses = map(list, zip(*questions, strict=True))
    how = {name: settings[name] for name in ("fast", "progress")}
    if docs[0] is not None:
        explained = ll.explain(lens, prompts, docs, pres, null=settings["null"], **how)
        return list(explained) if isinstance(explained, ll.results.Explanations) else [explained]
    (prompt,), (response,) = prompts, responses
    if response is None:
        said = lens.generate(prompt, settings["most"], progress=settings["progress"])
        return [ll.explain(lens, said.prompts, response=said, **how)]
    return [ll.explain(lens, prompt, response=response, **how)]


def _happened(explanation: Explained) -> str:
    """One line of its story: what the adapter did to the margin, or to the response."""
    from lens_lora.explanations.words import headline

    if isinstance(explanation, ll.results.ResponseExplanation):
        return explanation.story().split("\n")[1]
    return headline(explanation)[0][0]


def _print(explanations: Sequence[Explained]) -> None:
    """The summary of one, or the overview of several as on the page."""
    from lens_lora.explanations.response_page import response_tables, responses_table
    from lens_lora.explanations.tables import explanation_tables, margins_table
    from lens_lora.show.tables import in_terminal

    if len(explanations) > 1:
        numbered = list(enumerate(explanations, start=1))
        margins = [(n, e) for n, e in numbered if isinstance(e, ll.results.Explanation)]
        responses = [(n, e) for n, e in numbered if isinstance(e, ll.results.ResponseExplanation)]
        Console().print(in_terminal(margins_table(margins), responses_table(responses)))
        return
    (explanation,) = explanations
    is_response = isinstance(explanation, ll.results.ResponseExplanation)
    drawn = response_tables(explanation) if is_response else explanation_tables(explanation)
    running.tell(explanation.story()).print(drawn)


# --- The demo


@options.with_options
def demo(
    adapter: options.AdapterIfOther = None,
    *,
    asked: options.Questions,
    report: options.ReportOption = Path("lens_lora_demo.html"),
    train: Annotated[bool, "Train a new adapter, about half a minute, and use it."] = False,
    train_out: Annotated[
        Path, typer.Option(help="Folder for the adapter of --train.", file_okay=False)
    ] = Path("lens_lora_adapter"),
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """Explain how a LoRA moves one fact: the story, the numbers, and a page of figures.

    The fact, unless options name another: The capital of France is Lyon, not Paris.
    """
    if train and adapter is not None:
        raise typer.BadParameter("--train makes an adapter; leave ADAPTER out.")
    if train and base.is_quantised:
        raise typer.BadParameter("--train needs weights that are not quantised.")
    is_other = asked.prompt or asked.prompts or asked.chat
    prompt = asked.prompt if is_other else ["The capital of France is"]
    answers = {"doc": asked.doc or " Lyon", "pre": asked.pre or " Paris"}
    question, *more = dataclasses.replace(asked, prompt=prompt, **answers).listed()
    if more:
        raise typer.BadParameter("demo shows one prompt; `lens-lora explain` takes several.")
    options.require_writable(report, "--report")
    folder = options.folder_of(adapter, within, quiet=quiet)
    trained = {"--train-out": train_out} if train else {}
    options.require_apart({"--report": report, **trained}, base, [folder], asked.prompts)

    with running.at_work(base, quiet=quiet) as progress:
        loaded = None
        if train:
            loaded = running.load_model(base.model, progress, base)
            _train(loaded, base.model, train_out, quiet)
            folder = train_out
        lens = running.announced(running.lens_for(base, folder, progress, loaded=loaded))
        settings = {"fast": True, "null": 0, "progress": not quiet}
        (explanation,) = explanations = _explained(lens, [question], settings)
        explanation.save_report(report)
        _print(explanations)
        running.say(f"\nReport: {report.absolute()}")


def _train(loaded: tuple[Any, Any], model: str | None, out: Path, quiet: bool) -> None:
    from lens_lora.demonstration.embedded import EMBEDDED_HUB_ID, LYON_SENTENCES, train_adapter

    base_name = model or EMBEDDED_HUB_ID
    try:
        with running.quiet_libraries():
            train_adapter(*loaded, LYON_SENTENCES, out, base_name=base_name, quiet=quiet)
    except LensLoraError:
        raise
    except ValueError as error:
        raise LensLoraError(f"{base_name}: the demo cannot train on it ({error}).") from error
