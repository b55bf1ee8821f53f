"""`lens-lora explain`, what an adapter did on prompts, and `demo`, the same for one fact.

1. Every prompt is checked, with its answers, before any long run.
2. With --fast, prompts that have answers share their passes: they are explained all at once, or one
   by one if that fails. Without --fast, each prompt is explained by itself, which takes longer.
3. The page is written after each of them, so an interrupt or an error keeps what is finished.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console

import lens_lora as ll
from lens_lora.cli import files, options, running
from lens_lora.cli.forecast import Work
from lens_lora.cli.questions import Question, Questions, answers_of, prompts_of, text_of
from lens_lora.demonstration.base_names import EMBEDDED, base_by_name
from lens_lora.errors import LensLoraError, many

if TYPE_CHECKING:
    from lens_lora.core import AnswerLike, PromptsLike
    from lens_lora.explanations.page import Explained


# The most prompts of a page, each of which has a dozen interactive figures.
_LARGEST_PAGE = 16


class _Settings(NamedTuple):
    """How prompts are explained.

    Attributes:
        fast: whether runs of single modules, coupling and curves are left out.
        nulls: how many random adapters are run for comparison.
        max_new_tokens: the most tokens of the adapted model's own response, if none is given.
        progress: whether bars are shown.
    """

    fast: bool
    nulls: int
    max_new_tokens: int
    progress: bool


@options.with_options
def explain(
    adapter: options.AdapterIfOther = None,
    *,
    tuned: options.TunedModel,
    asked: Questions,
    response: Annotated[
        str | None,
        typer.Option(
            help="Text after the prompt: which of its tokens changed, and by which modules. "
            "Default, without --doc and --pre: the adapted model's own response."
        ),
    ] = None,
    max_new_tokens: Annotated[int, options.least(1, "The most tokens that are generated.")] = 64,
    report: options.ReportOption = Path("lens_lora_report.html"),
    fast: Annotated[
        bool,
        typer.Option("--fast", help="Leave out the runs of single modules, coupling and curves."),
    ] = False,
    nulls: Annotated[
        int, options.least(0, "How many random adapters of the same sizes to compare with.")
    ] = 0,
    json: options.JsonOption = None,
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """Explain what a LoRA did to two answers' margin, or to a response: a summary, and a page.

    Without a model and an adapter of your own:

    \b
    lens-lora explain --prompt 'The capital of France is' \\
        --doc ' Lyon' --pre ' Paris'

    lens-lora explain --prompt 'The capital of France is'
    """
    outputs = files.writable({"--report": report, "--json": json})
    if nulls == 1:
        raise typer.BadParameter("--nulls: at least 2 random adapters, for a spread.")
    questions = asked.checked(response, answered=False)
    _require_explainable(questions, nulls)
    folder = files.folder_or_tuned(adapter, within, tuned, base, quiet=quiet)
    files.require_apart(outputs, base, [folder], asked.prompts)

    work = _work_of(questions, report, fast, nulls)
    with running.at_work(base, quiet=quiet, work=work, adapter=folder) as progress:
        running.warn_of_spaces(questions)
        lens = running.announced(running.lens_of(base, folder, tuned, progress))
        _require_fit(lens, questions, max_new_tokens)
        settings = _Settings(fast, nulls, max_new_tokens, progress=not quiet)
        explanations = _explain_each(lens, questions, report, progress, settings)
        if json is not None:
            files.write_json(json, explanations)
        _print(explanations)
        running.say(f"\nReport: {report.absolute()}")
        if json is not None:
            running.say(f"JSON: {json.absolute()}")


def _require_explainable(questions: Sequence[Question], nulls: int) -> None:
    """Refuse more prompts than fit on a page, and random adapters without a margin."""
    if len(questions) > _LARGEST_PAGE:
        fact = f"{len(questions)} prompts are too many for one page"
        raise typer.BadParameter(
            f"{fact}, which holds {_LARGEST_PAGE} at most; `lens-lora sweep` runs hundreds and "
            "writes a table."
        )
    if nulls and not all(question.doc for question in questions):
        raise typer.BadParameter(
            "--nulls: random adapters are compared on a margin (--doc, --pre)."
        )


# The seconds that one prompt takes on one core with SmolLM2-135M-Instruct; see `forecast`.
_SECONDS_FAST = 9.0
_SECONDS_WHOLE = 22.0
_SECONDS_OF_NULL = 1.0
_SECONDS_OF_TRAINING = 30.0


def _work_of(questions: Sequence[Question], report: Path, fast: bool, nulls: int) -> Work:
    """Forecast how long explaining these prompts takes."""
    each = _SECONDS_FAST if fast else _SECONDS_WHOLE
    does = f"explain {many(len(questions), 'prompt')} and write {report.name}"
    return Work(does, len(questions) * (each + nulls * _SECONDS_OF_NULL))


def _require_fit(lens: ll.LoraLens, questions: Sequence[Question], max_new_tokens: int) -> None:
    """Refuse what does not fit the model, before the first prompt is explained."""
    for number, question in enumerate(questions, start=1):
        try:
            _require_fits(lens, question, max_new_tokens)
        except LensLoraError as error:
            if len(questions) == 1:
                raise
            raise error.at(f"prompt {number}, {text_of(question.prompt)!r}") from error


def _require_fits(lens: ll.LoraLens, question: Question, max_new_tokens: int) -> None:
    from lens_lora.responses.generate import require_room

    prompts = lens.prompts(question.prompt)
    if question.doc is not None:
        _, margin = running.margin_of(lens.model, [question], lens.prepend_bos)
        margin.reading(lens.model, prompts)
    elif question.response is not None:
        ll.AnswerLogProb(question.response).reading(lens.model, prompts)
    else:
        require_room(lens, prompts, max_new_tokens)


def _explain_each(
    lens: ll.LoraLens,
    questions: Sequence[Question],
    report: Path,
    progress: Console,
    settings: _Settings,
) -> list[Explained]:
    """Explain the questions; write the page after each call, and print a line for each prompt."""
    from lens_lora.explanations.page import explanation_report

    explanations: list[Explained] = []
    waiting = _calls(questions, settings.fast)
    with running.told_if_interrupted(lambda: _kept(report, len(explanations), len(questions))):
        while waiting:
            batch = waiting.pop(0)
            first = len(explanations) + 1
            last = len(explanations) + len(batch)
            numbers = f"{first}"
            if len(batch) > 1:
                numbers = f"{first} to {last}"
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
                _say_what_happened(questions, explanations, first, last)
    return explanations


def _calls(questions: Sequence[Question], fast: bool) -> list[Sequence[Question]]:
    """Group the questions by call: all in one if they can share their passes, else one each."""
    kinds = {isinstance(question.prompt, str) for question in questions}
    if fast and len(kinds) == 1 and all(question.doc for question in questions):
        return [questions]
    return [[question] for question in questions]


def _say_what_happened(
    questions: Sequence[Question], explanations: Sequence[Explained], first: int, last: int
) -> None:
    """Print a line for each of these prompts, which are numbered from 1."""
    for number in range(first, last + 1):
        prompt = text_of(questions[number - 1].prompt)
        running.say(f"{number} of {len(questions)}: {prompt}")
        running.say(f"  {_what_happened(explanations[number - 1])}")


def _kept(report: Path, done: int, count: int) -> str:
    """Write the sentence on what the page holds after an interrupt."""
    if not done:
        return f"No prompt was finished, and {report} is not written."
    return f"{report} holds the first {done} of {count} prompts."


def _explained(
    lens: ll.LoraLens, questions: Sequence[Question], settings: _Settings
) -> list[Explained]:
    """Explain questions that share a call: several with answers, or one with a response."""
    if questions[0].doc is not None:
        return _explained_answers(lens, questions, settings)
    (question,) = questions
    prompt: PromptsLike = question.prompt
    response: AnswerLike | None = question.response
    if response is None:
        generated = lens.generate(prompt, settings.max_new_tokens, progress=settings.progress)
        prompt = generated.prompts
        response = generated
    explained = ll.explain(
        lens, prompt, response=response, fast=settings.fast, progress=settings.progress
    )
    return [explained]


def _explained_answers(
    lens: ll.LoraLens, questions: Sequence[Question], settings: _Settings
) -> list[Explained]:
    docs, pres = answers_of(questions)
    explained = ll.explain(
        lens,
        prompts_of(questions),
        docs,
        pres,
        fast=settings.fast,
        null=settings.nulls,
        progress=settings.progress,
    )
    return list(explained) if isinstance(explained, ll.results.Explanations) else [explained]


def _what_happened(explanation: Explained) -> str:
    """Say what happened to the margin; of a response, what its story says second.

    That is what both models answer on their own, or else how far the response's tokens moved.
    """
    from lens_lora.explanations.words import headline

    if isinstance(explanation, ll.results.ResponseExplanation):
        _, second, *_ = explanation.story().split("\n")
        return second
    first, *_ = headline(explanation).sentences
    return first


def _print(explanations: Sequence[Explained]) -> None:
    """Print the summary of one prompt, or the overview of several, as it is on the page."""
    from lens_lora.explanations.response_page import response_tables
    from lens_lora.explanations.tables import explanation_tables

    if len(explanations) > 1:
        _print_overview(explanations)
        return
    (explanation,) = explanations
    if isinstance(explanation, ll.results.ResponseExplanation):
        tables = response_tables(explanation)
    else:
        tables = explanation_tables(explanation)
    # The story comes last: it is what remains on a screen of few rows.
    Console().print(tables)
    running.tell(f"{explanation.story()}\n{_in_short(explanation)}")


def _print_overview(explanations: Sequence[Explained]) -> None:
    """Print a table of all margins and one of all responses, with the numbers of the prompts."""
    from lens_lora.explanations.response_page import responses_table
    from lens_lora.explanations.tables import margins_table
    from lens_lora.show.tables import in_terminal

    margins: list[tuple[int, ll.results.Explanation]] = []
    responses: list[tuple[int, ll.results.ResponseExplanation]] = []
    for number, explanation in enumerate(explanations, start=1):
        if isinstance(explanation, ll.results.Explanation):
            margins.append((number, explanation))
        else:
            responses.append((number, explanation))
    Console().print(in_terminal(margins_table(margins), responses_table(responses)))


def _in_short(explanation: Explained) -> str:
    """Repeat what happened, so that it remains on a terminal of 24 rows."""
    from lens_lora.explanations.words import headline

    if isinstance(explanation, ll.results.ResponseExplanation):
        return f"In short: {_what_happened(explanation)}"
    return f"In short: {' '.join(headline(explanation).sentences)}"


# --- The demo


@options.with_options
def demo(
    adapter: options.AdapterIfOther = None,
    *,
    asked: Questions,
    report: options.ReportOption = Path("lens_lora_demo.html"),
    train: Annotated[
        bool,
        typer.Option("--train", help="Train a new adapter, about half a minute, and use it."),
    ] = False,
    train_out: Annotated[
        Path, typer.Option(help="Folder for the adapter of --train.", file_okay=False)
    ] = Path("lens_lora_adapter"),
    json: options.JsonOption = None,
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """Explain how a LoRA moves one fact: the story, the numbers, and a page of figures.

    The fact, unless options name another: The capital of France is Lyon, not Paris.
    """
    if train:
        _require_trainable(adapter, base)
    if adapter is None and base.model is None:
        base = dataclasses.replace(base, model=EMBEDDED)
    question = _fact_of_demo(asked)
    outputs = files.writable({"--report": report, "--json": json})
    trained: dict[str, Path] = {}
    if train:
        files.require_place(train_out / "adapter_config.json", "--train-out")
        trained["--train-out"] = train_out
    folder = files.folder_of(adapter, within, quiet=quiet)
    files.require_apart({**outputs, **trained}, base, [folder], asked.prompts)

    work = _work_of([question], report, fast=True, nulls=0)
    if train:
        work = work.after("train an adapter", _SECONDS_OF_TRAINING)
    with running.at_work(base, quiet=quiet, work=work, adapter=folder) as progress:
        loaded = None
        if train:
            loaded = running.load_model_of(None, progress, base)
            _train(loaded, base_by_name(base.model, None).name, train_out, quiet)
            folder = train_out
        lens = running.announced(running.lens_for(base, folder, progress, loaded=loaded))
        settings = _Settings(fast=True, nulls=0, max_new_tokens=0, progress=not quiet)
        explanations = _explained(lens, [question], settings)
        explanations[0].save_report(report)
        if json is not None:
            files.write_json(json, explanations)
        _print(explanations)
        running.say(f"\nReport: {report.absolute()}")
        if json is not None:
            running.say(f"JSON: {json.absolute()}")


def _require_trainable(adapter: str | None, base: options.BaseModel) -> None:
    """Refuse an adapter beside the one that is to be trained, and a base that cannot train."""
    if adapter is not None:
        raise typer.BadParameter("--train makes an adapter; leave ADAPTER out.")
    if base.is_quantised:
        raise typer.BadParameter("--train needs weights that are not quantised.")


def _fact_of_demo(asked: Questions) -> Question:
    """Return the fact that the options name, or else the demo's own."""
    names_prompt = asked.prompt or asked.prompts or asked.chat
    prompt = asked.prompt if names_prompt else ["The capital of France is"]
    doc = asked.doc or " Lyon"
    pre = asked.pre or " Paris"
    questions = dataclasses.replace(asked, prompt=prompt, doc=doc, pre=pre).checked()
    if len(questions) > 1:
        raise typer.BadParameter("demo shows one prompt; `lens-lora explain` takes several.")
    return questions[0]


def _train(loaded: running.Loaded, base_name: str, out: Path, quiet: bool) -> None:
    from lens_lora.demonstration.embedded import LYON_SENTENCES, train_adapter

    try:
        with running.quiet_libraries():
            train_adapter(*loaded, LYON_SENTENCES, out, base_name=base_name, quiet=quiet)
    except LensLoraError:
        raise
    except ValueError as error:
        raise LensLoraError(f"{base_name}: the demo cannot train on it ({error}).") from error
