"""The options that commands share, each written once, and the checks of what is given for them.

Nothing here imports torch: an option that cannot work is refused before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import typer
from rich.console import Console
from rich.text import Text
from typer.models import ArgumentInfo, OptionInfo

from lens_lora.demonstration import shipped_adapter
from lens_lora.errors import LensLoraError, TokenError
from lens_lora.formats.folders import adapter_folder, files_in, last_checkpoint, stated_base
from lens_lora.hosts.placement import Attention, Dtype, Placement
from lens_lora.sweeps.records import is_utf16, read_records


def least(number: int, text: str) -> Any:
    """An option whose value is at least this number."""
    return typer.Option(min=number, help=text)


ModelClass = Literal["HookedTransformer", "TransformerBridge"]
_CLASS = typer.Option("--class", help="Hooked class. Default: what there is.")
_BYTES = least(1, "Bytes beside the model, such as 8e9: less at a time, and the same numbers.")


_Options = TypeVar("_Options", bound="ModelOptions")


@dataclasses.dataclass(frozen=True)
class ModelOptions(Placement):
    """A base model and how it is loaded; each field is an option (`with_options`).

    Without a model it is the base that the adapter names.
    """

    model: Annotated[str | None, "A hub id or folder. Default: the base the adapter names."] = None
    model_class: Annotated[ModelClass | None, _CLASS] = None
    dtype: Annotated[Dtype | None, "Default: float32 on a CPU, else auto, the checkpoint's."] = None
    device: Annotated[str | None, "As torch names it. Default: the CPU, or accelerate's."] = None
    device_map: Annotated[str | None, "Over several devices, as accelerate does: auto, say."] = None
    load_in_4bit: Annotated[bool, "Linear modules in NF4, by bitsandbytes."] = False
    load_in_8bit: Annotated[bool, "Linear modules in 8 bit, by bitsandbytes."] = False
    attn: Annotated[Attention, "sdpa takes less memory, and shows no patterns."] = "eager"
    max_memory: Annotated[float | None, _BYTES] = None

    @property
    def prepend_bos(self) -> bool | None:
        """Whether strings get a BOS; None for what their tokenizer does."""
        return None

    def placed(self: _Options, device: str) -> _Options:
        """On this device, where the options name no place."""
        is_placed = self.device is not None or self.device_map is not None
        return self if is_placed else dataclasses.replace(self, device=device)


_BOS = typer.Option(
    "--bos/--no-bos", help="A BOS before each text, or none. Default: as the tokenizer does."
)


@dataclasses.dataclass(frozen=True)
class BaseModel(ModelOptions):
    """The base model of a command that runs it on texts."""

    bos: Annotated[bool | None, _BOS] = None

    @property
    def prepend_bos(self) -> bool | None:
        """As the option says."""
        return self.bos


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with one option for each field of a dataclass that it takes, in its place.

    A text beside the type of a parameter or a field is the option's help.
    """
    signature, parameters = inspect.signature(command, eval_str=True), list[inspect.Parameter]()
    groups: dict[str, tuple[Any, list[str]]] = {}
    for name, parameter in signature.parameters.items():
        group: Any = parameter.annotation
        annotations, defaults = {name: group}, {name: parameter.default}
        if dataclasses.is_dataclass(group):
            # The fields that the class itself names come first.
            annotations = inspect.get_annotations(parameter.annotation, eval_str=True)
            annotations |= get_type_hints(parameter.annotation, include_extras=True)
            defaults, groups[name] = vars(parameter.annotation()), (group, [*annotations])
        for field, hint in annotations.items():
            options = {"default": defaults[field], "annotation": _option(field, hint)}
            parameters.append(inspect.Parameter(field, parameter.KEYWORD_ONLY, **options))

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        for name, (group, fields) in groups.items():
            values[name] = group(**{field: values.pop(field) for field in fields})
        command(**values)

    vars(expanded)["__signature__"] = signature.replace(parameters=parameters)
    return expanded


def _option(name: str, annotation: Any) -> Any:
    """A type with a text is an option with this help; a switch has no --no- beside it."""
    kind, *more = get_args(annotation)
    if get_origin(annotation) is not Annotated or not isinstance(more[0], str):
        return annotation
    names = [f"--{name.replace('_', '-')}"] if kind is bool else []
    return Annotated[kind, typer.Option(*names, help=more[0])]


# Arguments of Python that a command knows by a parameter of another name.
_ALSO = {"kind": "model_class", "prepend_bos": "bos"}


def options_of(command: Callable[..., None]) -> dict[str, str]:
    """The options of a command, by the argument that each sets: {'max_kl': '--max-kl'}."""
    names: dict[str, str] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        names[name] = f"--{name.replace('_', '-')}"
        for about in get_args(parameter.annotation)[1:]:
            if isinstance(about, ArgumentInfo):
                names[name] = about.metavar or name.upper()
            elif isinstance(about, OptionInfo):
                # typer.Option("--json") has its first name as `default`.
                written = [str(text) for text in (about.default, *(about.param_decls or ()))]
                declared = [text for text in written if text.startswith("--")]
                names[name] = next(iter(declared), names[name]).partition("/")[0]
    return names | {also: names[name] for also, name in _ALSO.items() if name in names}


def input_file(text: str) -> Any:
    """An option that names a file to read."""
    return typer.Option(exists=True, dir_okay=False, help=text)


_ADAPTER = "A hub id (owner/repo, owner/repo/folder), a folder, or a run's for its last checkpoint."
AdapterArgument = Annotated[str, typer.Argument(metavar="ADAPTER", help=_ADAPTER)]
AdapterIfOther = Annotated[
    str | None, typer.Argument(metavar="ADAPTER", help=f"{_ADAPTER} Default: the demo's.")
]


@dataclasses.dataclass(frozen=True)
class Within:
    """Where the adapter lies in its folder or hub repository; each field is an option."""

    subfolder: Annotated[
        str | None, "The adapter's folder within it; also owner/repo/sub/folder."
    ] = None
    revision: Annotated[str | None, "Branch, tag or commit of its hub repository."] = None


ReportOption = Annotated[
    Path, typer.Option("--report", help="HTML page to write.", dir_okay=False, writable=True)
]
QuietOption = Annotated[bool, "No progress on stderr."]
_FILE = "A .txt file with a prompt a line, or .jsonl or .csv with prompt (or messages), doc, pre."
PromptsFile = Annotated[Path | None, input_file(_FILE)]

# --- Prompts and their answers

# A string, or the messages of a conversation.
Prompt = str | Sequence[Mapping[str, str]]


class Question(NamedTuple):
    """A prompt, and what is explained: two answers' margin, or a response.

    Without any of them, the adapted model's own response is.
    """

    prompt: Prompt
    doc: str | None = None
    pre: str | None = None
    response: str | None = None


_EXAMPLE = "--prompt 'The capital of France is' --doc ' Lyon' --pre ' Paris'"


@dataclasses.dataclass(frozen=True)
class Questions:
    """Prompts with their answers, as options: each field is one (`with_options`)."""

    prompt: Annotated[list[str] | None, "Read at its last token; may be repeated."] = None
    prompts: PromptsFile = None
    chat: Annotated[list[str] | None, "What a user says, by the chat template; repeatable."] = None
    system: Annotated[str | None, "The system's message before what --chat says."] = None
    doc: Annotated[str | None, "The answer that was taught, with its leading space."] = None
    pre: Annotated[str | None, "The answer that the base gives, with its leading space."] = None

    def listed(self, response: str | None = None, *, answered: bool = True) -> list[Question]:
        """Each prompt with its answers; options hold for all prompts, before a file's own.

        Args:
            response: follows each prompt, in place of answers.
            answered: each prompt needs two answers, and all are read together.
        """
        if self.system is not None and not self.chat:
            raise typer.BadParameter("it stands before a --chat; give one.", param_hint="--system")
        if response is not None and (self.doc is not None or self.pre is not None):
            raise typer.BadParameter("give a response, or two answers, not both.")
        typed = [*(self.prompt or []), *(_conversation(c, self.system) for c in self.chat or [])]
        questions = [Question(prompt, self.doc, self.pre, response) for prompt in typed]
        if self.prompts is not None:
            questions += _from_file(self.prompts, Question("", self.doc, self.pre, response))
        if not questions:
            if self.prompts:
                raise typer.BadParameter(f"--prompts: {self.prompts} holds no prompt.")
            raise typer.BadParameter(f"which prompt? Give --prompts FILE, or {_EXAMPLE}.")
        if answered and len({isinstance(question.prompt, str) for question in questions}) > 1:
            fact = "texts and conversations are not read together"
            raise typer.BadParameter(f"{fact}; give --prompt or --chat alone.")
        for number, question in enumerate(questions, start=1):
            _require_answers(question, number if len(questions) > 1 else None, answered)
        return questions


def _conversation(said: str, system: str | None) -> Prompt:
    """What a user says, after the system's message if there is one, as a prompt."""
    if not said.strip():
        raise typer.BadParameter("it is empty: the user says nothing.", param_hint="--chat")
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": said}]


def _require_answers(question: Question, number: int | None, answered: bool) -> None:
    prompt, doc, pre, response = question
    if not prompt:
        raise typer.BadParameter("a prompt is empty: there is no token to read at.")
    if response is not None or (doc is None and pre is None and not answered):
        return
    if not doc or not pre:
        remedy = "--doc ' Lyon' --pre ' Paris', each with its leading space"
        raise typer.BadParameter(f"the prompt {text_of(prompt)!r} needs both answers: {remedy}.")
    if doc == pre:  # of answers that differ, the tokens may still be the same
        place = "" if number is None else f"prompt {number}, {text_of(prompt)!r}: "
        fact = f"doc and pre are both {doc!r}, so their margin is zero whatever the model does."
        raise TokenError(f"{place}{fact}")


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
    questions: list[Question] = []
    for record in records:
        prompt = str(record.prompt) if record.messages is None else record.messages
        answers = asked.doc or record.doc, asked.pre or record.pre
        questions.append(Question(prompt, *answers, asked.response))
    return questions


def text_of(prompt: Prompt) -> str:
    """A prompt's text in messages; of a conversation, what was said last."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))


# --- Files and folders


def folder_of(adapter: str | None, within: Within | None = None, *, quiet: bool) -> Path:
    """The folder of the adapter that is asked for, or of the one that comes with the package.

    Of a trainer's run it is the last checkpoint's.
    """
    within = within or Within()
    if not adapter:
        for option, value in {
            "--subfolder": within.subfolder,
            "--revision": within.revision,
        }.items():
            if value is not None:
                raise typer.BadParameter("it is of an ADAPTER; name one.", param_hint=option)
        return shipped_adapter()
    run = Path(adapter, within.subfolder or "")
    checkpoint = last_checkpoint(run)
    if checkpoint is not None:
        line = Text(f"{run} is a run; its last checkpoint is taken, {checkpoint.name}.")
        Console(stderr=True, quiet=quiet).print(line, soft_wrap=True)
        return adapter_folder(checkpoint, within.revision)
    return adapter_folder(adapter, within.revision, within.subfolder)


_NEWLINE = re.compile(r"\r\n?|\n")  # `str.splitlines` also cuts at form feeds, U+2028 and others


def lines_of(file: Path) -> list[str]:
    """The texts of a file, one a line; blank lines are skipped."""
    content = file.read_bytes()
    if is_utf16(content[:2]):
        raise LensLoraError(f"{file} is UTF-16; save it as UTF-8.")
    try:
        lines = _NEWLINE.split(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise LensLoraError(f"{file}: not UTF-8 ({error}); save it as UTF-8.") from error
    return [line for line in lines if line.strip()]


def texts_of(file: Path) -> list[str]:
    """`lines_of` a file that has to hold at least one."""
    lines = lines_of(file)
    if not lines:
        raise LensLoraError(f"{file}: holds no text; write one a line.")
    return lines


def require_writable(path: Path, option: str) -> None:
    """Check that a file can be written, before any long run."""
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}.", param_hint=option)
    is_new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        fact = f"{path} cannot be written ({error.strerror})."
        raise typer.BadParameter(fact, param_hint=option) from error
    if is_new:
        path.unlink()


def writable(wanted: Mapping[str, Path | None]) -> dict[str, Path]:
    """The files that are asked for, by option, each of which can be written."""
    outputs = {option: path for option, path in wanted.items() if path is not None}
    for option, path in outputs.items():
        require_writable(path, option)
    return outputs


def require_apart(
    outputs: Mapping[str, Path], base: ModelOptions, adapters: Sequence[Path], *files: Path | None
) -> None:
    """Check that nothing is written over what the command reads, and no two outputs are one file.

    Links are followed. Of the adapters and of a local base model, the folder and its files count.

    Args:
        outputs: files, each by its option.
        base: the base model; without one, the first adapter's own.
        adapters: their folders.
        files: whatever else is read.
    """
    inputs = [path for path in files if path is not None]
    for folder in adapters:
        inputs += [folder, *files_in(folder)]
    model = base.model or stated_base(adapters[0])
    if model and Path(model).is_dir():
        inputs += [Path(model), *Path(model).glob("*.json"), *Path(model).glob("*.safetensors")]
    for option, output in outputs.items():
        for path in inputs:
            if output.exists() and path.exists() and output.samefile(path):
                fact = f"{output} is what this command reads ({path}); name another place."
                raise typer.BadParameter(fact, param_hint=option)
    if len({output.resolve() for output in outputs.values()}) < len(outputs):
        raise typer.BadParameter("they name one file; name two.", param_hint=" and ".join(outputs))


def require_place(path: Path, option: str) -> None:
    """`require_writable`, for a file whose folder is made if it does not exist."""
    folder = path.absolute().parent
    if folder.is_dir():
        require_writable(path, option)
        return
    above = next(place for place in (folder, *folder.parents) if place.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        fact = f"the folder {folder} cannot be made in {above}; give another."
        raise typer.BadParameter(fact, param_hint=option)
