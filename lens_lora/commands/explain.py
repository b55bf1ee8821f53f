"""`lens-lora explain`: what an adapter did on a prompt, in the terminal and as a page.

1. Every prompt is checked, with its answers, before any long run.
2. With --fast, prompts that have answers share their passes: they are explained all at once, or one
   by one where that fails. In full each takes a while.
3. The page is written after each, so an interrupt or an error keeps what is finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.text import Text

import lens_lora as ll
from lens_lora.commands.options import (
    AdapterOption,
    BaseModel,
    Prompt,
    QuietOption,
    ReportOption,
    SystemOption,
    conversation,
    folder_of,
    lines_of,
    require_apart,
    require_different,
    require_writable,
    text_of,
    with_base,
)
from lens_lora.commands.running import (
    announce,
    lens_for,
    say,
    tell,
    timed,
    told_if_interrupted,
)
from lens_lora.errors import LensLoraError, PromptError
from lens_lora.sweeps.records import read_records

if TYPE_CHECKING:
    from lens_lora.evaluation.explain import Explanation, ResponseExplanation


class Question(NamedTuple):
    """A prompt, and what is explained: two answers' margin, or a response.

    Without any of them, the adapted model's own response is.
    """

    prompt: Prompt
    doc: str | None = None
    pre: str | None = None
    response: str | None = None


_LARGEST_PAGE = 16  # prompts, each with a dozen interactive figures
_EXAMPLE = "--prompt 'The capital of France is' --doc ' Lyon' --pre ' Paris'"


@with_base
def explain(
    base: BaseModel,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Read at its last token; may be repeated.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A .txt file with a prompt a line, or .jsonl or .csv with prompt (or messages), "
            "doc, pre.",
        ),
    ] = None,
    chat: Annotated[
        list[str] | None,
        typer.Option(help="What a user says, by the model's chat template; may be repeated."),
    ] = None,
    system: SystemOption = None,
    doc: Annotated[
        str | None, typer.Option(help="The document's answer, with its leading space.")
    ] = None,
    pre: Annotated[
        str | None, typer.Option(help="The pretrained answer, with its leading space.")
    ] = None,
    response: Annotated[
        str | None,
        typer.Option(
            help="What is said after the prompt: which tokens and modules changed it. "
            "Default, without --doc and --pre: the adapted model's own response."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="The most tokens of a response that is generated.")
    ] = 64,
    adapter: AdapterOption = None,
    report: ReportOption = Path("lens_lora_report.html"),
    fast: Annotated[
        bool, typer.Option("--fast", help="Without running single modules, coupling and curves.")
    ] = False,
    null: Annotated[
        int, typer.Option(min=0, help="Compare with so many random adapters of the same sizes.")
    ] = 0,
    quiet: QuietOption = False,
) -> None:
    """Explain what a LoRA did to two answers' margin, or to a response: a summary, and a page.

    Without a model and an adapter of your own:

    lens-lora explain --prompt 'The capital of France is' --doc ' Lyon' --pre ' Paris'

    lens-lora explain --prompt 'The capital of France is'
    """
    require_writable(report, "--report")
    if null == 1:
        raise typer.BadParameter("--null: at least 2 random adapters, for a spread.")
    if system is not None and not chat:
        raise typer.BadParameter("--system: it stands before a --chat; give one.")
    typed = [*(prompt or []), *(conversation(said, system) for said in chat or [])]
    questions = _questions(typed, prompts, doc, pre, response)
    if null and not all(question.doc for question in questions):
        raise typer.BadParameter(
            "--null: random adapters are compared on a margin, --doc and --pre."
        )
    progress = Console(stderr=True, quiet=quiet)
    _note_spaces(questions, progress)
    folder = folder_of(adapter)
    require_apart({"--report": report}, base, [folder], prompts)

    with timed(progress):
        lens = lens_for(base, folder, progress)
        announce(lens)
        _require_fit(lens, questions, max_new_tokens)
        options = {"fast": fast, "null": null, "progress": not quiet}
        _explain_each(lens, questions, report, progress, max_new_tokens, options)
        say(f"\nReport: {report.absolute()}")


# --- Questions, checked without a model


def _questions(
    typed: Sequence[Prompt],
    file: Path | None,
    doc: str | None,
    pre: str | None,
    response: str | None,
) -> list[Question]:
    """Every prompt with its answers; --doc and --pre, or --response, hold for all if given.

    Raises:
        LensLoraError: a bad record of the file, with its line, or two equal answers.
        typer.BadParameter: no prompt, a missing answer, answers beside a response, or too many
            prompts.
    """
    if response is not None and (doc is not None or pre is not None):
        raise typer.BadParameter(
            "--response beside --doc or --pre: give a response, or two answers."
        )
    questions = [Question(prompt, doc, pre, response) for prompt in typed]
    if file is not None:
        questions += _from_file(file, Question("", doc, pre, response))
    if not questions:
        raise typer.BadParameter(
            f"--prompts: {file} holds no prompt."
            if file
            else f"what to explain? Give --prompts FILE, or {_EXAMPLE}."
        )
    if len(questions) > _LARGEST_PAGE:
        raise typer.BadParameter(
            f"{len(questions)} prompts are too many for one page, {_LARGEST_PAGE} at most; "
            "`lens-lora sweep` runs hundreds and writes a table."
        )
    for number, question in enumerate(questions, start=1):
        _require_answers(question, number if len(questions) > 1 else None)
    return questions


def _require_answers(question: Question, number: int | None) -> None:
    prompt, doc, pre, _ = question
    if not prompt:
        raise typer.BadParameter("a prompt is empty: there is no token to read at.")
    if doc is None and pre is None:
        return
    if not doc or not pre:
        raise typer.BadParameter(
            f"the prompt {text_of(prompt)!r} needs both answers: --doc ' Lyon' --pre ' Paris', "
            "each with its leading space."
        )
    require_different(doc, pre, "" if number is None else f"prompt {number}, {text_of(prompt)!r}: ")


def _from_file(file: Path, asked: Question) -> list[Question]:
    """The file's prompts; answers that are asked of all come before the file's own."""
    if file.suffix.lower() == ".txt":
        return [asked._replace(prompt=line) for line in lines_of(file)]
    if file.suffix.lower() not in (".jsonl", ".csv"):
        raise LensLoraError(f"{file}: expected a file that ends in .txt, .jsonl or .csv.")
    has_answers = asked.response is not None or (asked.doc is not None and asked.pre is not None)
    records = read_records(file, with_answers=not has_answers)
    bad = next((record.error for record in records if record.error), None)
    if bad:
        raise LensLoraError(f"{file}, {bad}")
    return [
        Question(
            str(record.prompt) if record.messages is None else record.messages,
            asked.doc or record.doc,
            asked.pre or record.pre,
            asked.response,
        )
        for record in records
    ]


def _note_spaces(questions: Sequence[Question], progress: Console) -> None:
    """Note a space at a prompt's end, or none before an answer: both give unintended tokens.

    Where a turn of a conversation begins, an answer needs no space.
    """
    for prompt, *others in questions:
        answers = [answer for answer in others if answer is not None]
        quoted = " and ".join(map(repr, answers))
        if not isinstance(prompt, str):
            if not any(answer.startswith(" ") for answer in answers):
                continue
            note = f"{quoted} begin the assistant's turn with a space"
        elif prompt != prompt.rstrip(" "):
            note = f"the prompt {prompt!r} ends in a space, which is a token of its own"
        elif len(answers) > 1 and any(answer[:1].isalnum() for answer in answers):
            note = f"the answers {quoted} do not both begin with a space"
        else:
            continue
        progress.print(Text(f"Note: {note}; is that meant?", style="yellow"), soft_wrap=True)


# --- Questions, explained


def _require_fit(lens: ll.LoraLens, questions: Sequence[Question], max_new_tokens: int) -> None:
    """Refuse what does not fit before the first prompt is explained.

    Raises:
        PromptError, TokenError: naming the prompt where there are several.
    """
    from lens_lora.model.generate import require_room
    from lens_lora.readouts.answers import margin_between

    for number, question in enumerate(questions, start=1):
        try:
            prompts = lens.prompts(question.prompt)
            if question.doc is not None and question.pre is not None:
                answers = margin_between(lens.model, question.doc, question.pre, prompts)
                answers.over(lens.model, prompts)
            elif question.response is not None:
                ll.AnswerLogProb(question.response).over(lens.model, prompts)
            else:
                require_room(lens, prompts, max_new_tokens)
        except LensLoraError as error:
            if len(questions) == 1:
                raise
            raise PromptError(f"prompt {number}, {text_of(question.prompt)!r}: {error}") from error


def _explain_each(
    lens: ll.LoraLens,
    questions: Sequence[Question],
    report: Path,
    progress: Console,
    max_new_tokens: int,
    options: dict[str, Any],
) -> None:
    """Print a summary of each question, and write the page after each."""
    from lens_lora.loading import quiet_libraries
    from lens_lora.show.report import explanation_report

    explanations: list[Explanation | ResponseExplanation] = []
    waiting = _together(questions, options["fast"])
    with told_if_interrupted(lambda: _kept(report, len(explanations), len(questions))):
        while waiting:
            batch = waiting.pop(0)
            first, last = len(explanations) + 1, len(explanations) + len(batch)
            numbers = f"{first}" if len(batch) == 1 else f"{first} to {last}"
            progress.print(f"Explaining prompt {numbers} of {len(questions)}", highlight=False)
            try:
                with quiet_libraries():
                    explained = _explained(lens, batch, max_new_tokens, options)
            except LensLoraError:
                if len(batch) == 1:
                    raise
                waiting = [[question] for question in batch]
                continue
            report.write_text(explanation_report([*explanations, *explained]), encoding="utf-8")
            explanations += explained
            for number, question in enumerate(batch, start=first):
                title = f"{number} of {len(questions)}: {text_of(question.prompt)}"
                _print(explanations[number - 1], title if len(questions) > 1 else None)


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


def _explained(
    lens: ll.LoraLens, questions: Sequence[Question], max_new_tokens: int, options: dict[str, Any]
) -> list[Explanation | ResponseExplanation]:
    """Several questions have answers; one may ask for a response."""
    docs = [question.doc for question in questions if question.doc is not None]
    pres = [question.pre for question in questions if question.pre is not None]
    if docs and pres:
        prompts: Any = [question.prompt for question in questions]
        explained = ll.explain(lens, prompts, docs, pres, **options)
        return list(explained) if isinstance(explained, ll.results.Explanations) else [explained]
    ((prompt, _, _, response),) = questions
    options = {name: options[name] for name in ("fast", "progress")}
    if response is None:
        said = lens.generate(prompt, max_new_tokens, progress=options["progress"])
        return [ll.explain(lens, said.prompts, response=said, **options)]
    return [ll.explain(lens, prompt, response=response, **options)]


def _print(explanation: Explanation | ResponseExplanation, title: str | None) -> None:
    """Its summary, as soon as it is known."""
    from lens_lora.show.response import response_tables
    from lens_lora.show.tables import explanation_tables

    if title is not None:
        Console().rule(Text(title), align="left")
    console = tell(explanation.story())
    if isinstance(explanation, ll.results.ResponseExplanation):
        console.print(response_tables(explanation))
    else:
        console.print(explanation_tables(explanation))
