"""Read and check the prompts of a command, each with its answers or its response.

They are given by options or in a file. An answer that is given by an option applies to all prompts,
and takes precedence over the file's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, cast

import typer

from lens_lora.cli.files import lines_of
from lens_lora.cli.options import PromptsFile
from lens_lora.errors import LensLoraError, TokenError
from lens_lora.sweeps.records import read_records

if TYPE_CHECKING:
    from lens_lora.core import PromptsLike

# A string, or the messages of a conversation.
Prompt = str | Sequence[Mapping[str, str]]

_EXAMPLE = "--prompt 'The capital of France is' --doc ' Lyon' --pre ' Paris'"


class Question(NamedTuple):
    """A prompt, and what is explained about it: the margin of two answers, or a response.

    Without either, the adapted model's own response is explained.
    """

    prompt: Prompt
    doc: str | None = None
    pre: str | None = None
    response: str | None = None


@dataclasses.dataclass(frozen=True)
class Questions:
    """Prompts with their answers; each field is one option (`options.with_options`)."""

    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt, read at its last token; may be repeated.")
    ] = None
    prompts: PromptsFile = None
    chat: Annotated[
        list[str] | None,
        typer.Option(help="A user's message, put into the chat template; may be repeated."),
    ] = None
    system: Annotated[
        str | None, typer.Option(help="A system message that goes before that of --chat.")
    ] = None
    doc: Annotated[
        str | None, typer.Option(help="The answer that was taught, with its leading space.")
    ] = None
    pre: Annotated[
        str | None, typer.Option(help="The answer that the base gives, with its leading space.")
    ] = None

    def checked(self, response: str | None = None, *, answered: bool = True) -> list[Question]:
        """Return each prompt with its answers or its response.

        Args:
            response: the text after each prompt, instead of answers.
            answered: whether each prompt needs two answers, and all prompts are read together.

        Raises:
            typer.BadParameter: options contradict each other, or there is no prompt.
            LensLoraError: a file cannot be read, or two answers are the same.
        """
        if self.system is not None and not self.chat:
            raise typer.BadParameter(
                "it goes before what --chat says; give --chat as well.", param_hint="--system"
            )
        if response is not None and (self.doc is not None or self.pre is not None):
            raise typer.BadParameter("give a response, or two answers, not both.")

        questions = [
            Question(prompt, self.doc, self.pre, response) for prompt in self._from_options()
        ]
        if self.prompts is not None:
            for_all = Question("", self.doc, self.pre, response)
            questions += _from_file(self.prompts, for_all)

        if not questions:
            raise self._no_prompt()
        if answered:
            _require_one_kind(questions)
        if len(questions) == 1:
            _require_answers(questions[0], None, answered)
            return questions
        for number, question in enumerate(questions, start=1):
            _require_answers(question, number, answered)
        return questions

    def _from_options(self) -> list[Prompt]:
        prompts: list[Prompt] = list(self.prompt or [])
        if self.chat is not None:
            prompts += [_conversation(said, self.system) for said in self.chat]
        return prompts

    def _no_prompt(self) -> typer.BadParameter:
        if self.prompts is not None:
            return typer.BadParameter(f"--prompts: {self.prompts} holds no prompt.")
        return typer.BadParameter(f"which prompt? Give --prompts FILE, or {_EXAMPLE}.")


def prompts_of(questions: Sequence[Question]) -> PromptsLike:
    """Return the prompts of these questions, which are either all texts or all conversations."""
    return cast("PromptsLike", [question.prompt for question in questions])


def answers_of(questions: Sequence[Question]) -> tuple[list[str], list[str]]:
    """Return the answers doc and the answers pre of these questions, all of which have both."""
    docs = [question.doc or "" for question in questions]
    pres = [question.pre or "" for question in questions]
    return docs, pres


def text_of(prompt: Prompt) -> str:
    """Return a prompt as messages quote it: its text, or the last message of a conversation."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))


def _conversation(said: str, system: str | None) -> Prompt:
    """Make a conversation of what a user says, after the system's message if there is one."""
    if not said.strip():
        raise typer.BadParameter("it is empty: the user says nothing.", param_hint="--chat")
    messages = [{"role": "user", "content": said}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _from_file(file: Path, for_all: Question) -> list[Question]:
    """Read a file's prompts, each with its own answers unless answers are given for all."""
    if file.suffix.lower() == ".txt":
        return [for_all._replace(prompt=line) for line in lines_of(file)]
    if file.suffix.lower() not in (".jsonl", ".csv"):
        raise LensLoraError(f"{file}: expected a file that ends in .txt, .jsonl or .csv.")
    has_both_answers = for_all.doc is not None and for_all.pre is not None
    needs_answers = for_all.response is None and not has_both_answers
    questions: list[Question] = []
    for record in read_records(file, with_answers=needs_answers):
        if record.error:
            raise LensLoraError(f"{file}, {record.error}")
        prompt = str(record.prompt) if record.messages is None else record.messages
        question = Question(
            prompt=prompt,
            doc=for_all.doc or record.doc,
            pre=for_all.pre or record.pre,
            response=for_all.response,
        )
        questions.append(question)
    return questions


def _require_one_kind(questions: Sequence[Question]) -> None:
    """Refuse a mix of texts and conversations, which cannot be read together."""
    kinds = {isinstance(question.prompt, str) for question in questions}
    if len(kinds) > 1:
        fact = "texts and conversations are not read together"
        raise typer.BadParameter(f"{fact}; give --prompt or --chat alone.")


def _require_answers(question: Question, number: int | None, answered: bool) -> None:
    """Refuse an empty prompt, a single answer, or two answers that are the same.

    Args:
        question: the prompt, and what is explained.
        number: the number of the prompt among several; None for a single prompt.
        answered: whether the prompt needs answers.
    """
    prompt, doc, pre, response = question
    if not prompt:
        raise typer.BadParameter("a prompt is empty: there is no token to read at.")
    if response is not None:
        return
    if doc is None and pre is None and not answered:
        return
    if not doc or not pre:
        remedy = "--doc ' Lyon' --pre ' Paris', each with its leading space"
        raise typer.BadParameter(f"the prompt {text_of(prompt)!r} needs both answers: {remedy}.")
    # Only a tokenizer can tell whether two different answers have the same tokens.
    if doc == pre:
        place = "" if number is None else f"prompt {number}, {text_of(prompt)!r}: "
        fact = f"doc and pre are both {doc!r}, so their margin is zero whatever the model does."
        raise TokenError(f"{place}{fact}")
