"""`lens-lora explain`: what an adapter did on a prompt, in the terminal and as a page.

A prompt, an answer, an adapter or a file that cannot be used raises an error before any long run;
the command line prints it as one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from lens_lora.adapters.peft_files import adapter_folder
from lens_lora.commands.options import (
    AdapterOption,
    AttnOption,
    ClassOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    In4Bit,
    In8Bit,
    MaxMemory,
    ModelOption,
    Question,
    Quiet,
    Report,
    Subject,
    SystemOption,
    conversation,
    text_of,
)
from lens_lora.commands.terminal import require_different, require_writable
from lens_lora.errors import LensLoraError
from lens_lora.placement import Placement
from lens_lora.sweeps.records import read_records

__all__ = ["explain"]

_MOST = 16
_Prompt = str | Sequence[Mapping[str, str]]
_Found = tuple[_Prompt, str | None, str | None]
_EXAMPLE = "--prompt 'The capital of France is' --doc ' Lyon' --pre ' Paris'"


def explain(
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
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    load_in_4bit: In4Bit = False,
    load_in_8bit: In8Bit = False,
    attn: AttnOption = "eager",
    max_memory: MaxMemory = None,
    quiet: Quiet = False,
) -> None:
    """Explain what a LoRA did to two answers' margin, or to a response: a summary, and a page.

    Without a model and an adapter of your own:

    lens-lora explain --prompt 'The capital of France is' --doc ' Lyon' --pre ' Paris'

    lens-lora explain --prompt 'The capital of France is'
    """
    how = Placement(dtype, device, device_map, load_in_4bit, load_in_8bit, attn)
    require_writable(report, "--report")
    if null == 1:
        raise typer.BadParameter("--null: at least 2 random adapters, for a spread.")
    progress = Console(stderr=True, quiet=quiet)
    if system is not None and not chat:
        raise typer.BadParameter("--system: it stands before a --chat; give one.")
    given = [*(prompt or []), *(conversation(said, system) for said in chat or [])]
    questions = _questions(given, prompts, doc, pre, response)
    if null and not all(question.doc for question in questions):
        raise typer.BadParameter(
            "--null: random adapters are compared on a margin, --doc and --pre."
        )
    _note_spaces(questions, progress)
    folder = adapter_folder(adapter) if adapter else None
    from lens_lora.commands.run_explain import run

    subject = Subject(folder, model, model_class, how, max_memory)
    run(subject, questions, report, progress, max_new_tokens=max_new_tokens, fast=fast, null=null)


def _questions(
    given: Sequence[_Prompt],
    file: Path | None,
    doc: str | None,
    pre: str | None,
    response: str | None,
) -> list[Question]:
    """Every prompt with its answers; --doc and --pre, or --response, where given, hold for all.

    Raises:
        LensLoraError: a bad record of the file, with its line, or two equal answers.
        typer.BadParameter: no prompt, a missing answer, answers beside a response, or too many
            prompts.
    """
    if response is not None and (doc is not None or pre is not None):
        raise typer.BadParameter(
            "--response beside --doc or --pre: give a response, or two answers."
        )
    found: list[_Found] = [(prompt, doc, pre) for prompt in given]
    if file is not None:
        found += _from_file(file, doc, pre, needs_answers=response is None)
    if not found:
        raise typer.BadParameter(
            f"--prompts: {file} holds no prompt."
            if file
            else f"what to explain? Give --prompts FILE, or {_EXAMPLE}."
        )
    if len(found) > _MOST:
        raise typer.BadParameter(
            f"{len(found)} prompts are too many for one page, {_MOST} at most; "
            "`lens-lora sweep` runs hundreds and writes a table."
        )
    questions: list[Question] = []
    for text, its_doc, its_pre in found:
        if not text:
            raise typer.BadParameter("a prompt is empty: there is no token to read at.")
        if its_doc is None and its_pre is None:
            questions.append(Question(text, response=response))
            continue
        if not its_doc or not its_pre:
            raise typer.BadParameter(
                f"the prompt {text_of(text)!r} needs both answers: --doc ' Lyon' --pre ' Paris', "
                "each with its leading space."
            )
        questions.append(Question(text, its_doc, its_pre))
    for number, question in enumerate(questions, start=1):
        which = f"prompt {number}, {text_of(question.prompt)!r}: " if len(questions) > 1 else ""
        if question.doc is not None and question.pre is not None:
            require_different(question.doc, question.pre, which)
    return questions


def _from_file(
    file: Path, doc: str | None, pre: str | None, *, needs_answers: bool
) -> list[_Found]:
    if file.suffix.lower() == ".txt":
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise LensLoraError(f"{file}: not UTF-8 ({error}); save it as UTF-8.") from error
        return [(line, doc, pre) for line in lines if line.strip()]
    if file.suffix.lower() not in (".jsonl", ".csv"):
        raise LensLoraError(f"{file}: expected a file that ends in .txt, .jsonl or .csv.")
    records = read_records(file, with_answers=needs_answers and (doc is None or pre is None))
    bad = next((record.error for record in records if record.error), None)
    if bad:
        raise LensLoraError(f"{file}, {bad}")
    given = [str(r.prompt) if r.messages is None else r.messages for r in records]
    return [(prompt, doc or r.doc, pre or r.pre) for prompt, r in zip(given, records, strict=True)]


def _note_spaces(questions: Sequence[Question], progress: Console) -> None:
    """Note a space at a prompt's end, or none before an answer: both give unintended tokens.

    Where a turn of a conversation begins, an answer needs no space.
    """
    for prompt, *others in questions:
        answers = [answer for answer in others if answer is not None]
        if not isinstance(prompt, str):
            if not any(answer.startswith(" ") for answer in answers):
                continue
            note = f"{' and '.join(map(repr, answers))} begin the assistant's turn with a space"
        elif prompt != prompt.rstrip(" "):
            note = f"the prompt {prompt!r} ends in a space, which is a token of its own"
        elif len(answers) > 1 and any(answer[:1].isalnum() for answer in answers):
            note = f"the answers {' and '.join(map(repr, answers))} do not both begin with a space"
        else:
            continue
        progress.print(Text(f"Note: {note}; is that meant?", style="yellow"), soft_wrap=True)
