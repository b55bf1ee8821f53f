"""The options that several commands share, each written once.

typer makes an option of each parameter of a command, and has no groups of options. Here options
that belong together are the fields of a dataclass, such as `BaseModel`, and `with_options` gives a
command one option for each field.

Nothing here imports torch, so that a command can refuse its options before anything heavy is
loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from lens_lora.errors import ArgumentError, setting
from lens_lora.hosts.placement import Attention, Dtype, Placement

# --- A dataclass of options


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter that is a dataclass by one option for each of its fields.

    The fields are annotated like the parameters of a command. When the command is called, a number
    that is not finite is refused first. NaN passes the bounds of some versions of typer, and
    infinity any lower bound.
    """
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        annotation: Any = parameter.annotation
        if dataclasses.is_dataclass(annotation):
            groups[name] = annotation
            parameters += _options_in(annotation)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    for parameter in parameters:
        _name_value(parameter.annotation)

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        for name, value in values.items():
            _require_finite(name, value)
        for name, group in groups.items():
            fields = {option.name: values.pop(option.name) for option in _options_in(group)}
            values[name] = group(**fields)
        command(**values)

    cast(Any, expanded).__signature__ = signature.replace(parameters=parameters)
    return expanded


def _require_finite(name: str, value: object) -> None:
    """Refuse NaN and infinity.

    Raises:
        ArgumentError: naming the option.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ArgumentError(f"{setting(name, value)}: expected a finite number.")


def _options_in(group: Any) -> list[inspect.Parameter]:
    """Return the fields of a dataclass as parameters, its own before inherited ones."""
    own = inspect.get_annotations(group, eval_str=True)
    inherited = get_type_hints(group, include_extras=True)
    defaults = vars(group())
    options: list[inspect.Parameter] = []
    for field, annotation in (own | inherited).items():
        for about in _about(annotation):
            about.rich_help_panel = getattr(group, "help_panel", None)
        option = inspect.Parameter(
            field,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults[field],
            annotation=annotation,
        )
        options.append(option)
    # The option that names the model comes before those on how it is loaded.
    return sorted(options, key=lambda option: option.name != "model")


def _about(annotation: Any) -> list[OptionInfo]:
    """Return typer's settings for an option; [] for an argument."""
    return [about for about in get_args(annotation)[1:] if isinstance(about, OptionInfo)]


# The word for a value in help, by its type. typer would write <list[str]> or <float range>, and
# <bool> after an option that takes no value.
_VALUES = {str: "TEXT", int: "NUMBER", float: "NUMBER", bool: ""}


def _name_value(annotation: Any) -> None:
    """Let help name the value of an option in one word, unless the option names it itself."""
    for about in _about(annotation):
        type_of_value, *_ = get_args(annotation)
        types = [kind for kind in _types_in(type_of_value) if kind is not type(None)]
        if about.metavar is not None or len(types) != 1:
            continue
        (kind,) = types
        if kind is Path:
            about.metavar = "FILE" if about.file_okay else "DIR"
        else:
            about.metavar = _VALUES.get(kind)


def _types_in(annotation: Any) -> list[Any]:
    """List the types in an annotation, such as str and None in `list[str] | None`."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal or not parts:
        return [annotation]
    types: list[Any] = []
    for part in parts:
        types += _types_in(part)
    return types


# Arguments in Python whose parameter in a command has another name.
_OTHER_NAMES = {"kind": "model_class", "prepend_bos": "bos"}


def options_of(command: Callable[..., None]) -> dict[str, str]:
    """Return each argument of a command with the option that sets it: {'max_kl': '--max-kl'}."""
    written: dict[str, str] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        written[name] = _written(name, parameter)
    for argument, name in _OTHER_NAMES.items():
        if name in written:
            written[argument] = written[name]
    return written


def _written(name: str, parameter: inspect.Parameter) -> str:
    """Return how a user writes a parameter: '--max-kl', or 'ADAPTER' for an argument."""
    usual = f"--{name.replace('_', '-')}"
    for about in get_args(parameter.annotation)[1:]:
        if isinstance(about, ArgumentInfo):
            return about.metavar or name.upper()
        if isinstance(about, OptionInfo):
            # The first name of typer.Option("--json") is its `default`, within Annotated.
            names = [str(text) for text in (about.default, *(about.param_decls or ()))]
            declared = [text for text in names if text.startswith("--")]
            if declared:
                # The first of "--bos/--no-bos".
                first, _, _ = declared[0].partition("/")
                return first
    return usual


# --- The base model


ModelClass = Literal["HookedTransformer", "TransformerBridge"]
_Options = TypeVar("_Options", bound="ModelOptions")


@dataclasses.dataclass(frozen=True)
class ModelOptions(Placement):
    """A base model, and how it is loaded.

    If no model is named, it is the base that the adapter names.

    Attributes:
        help_panel: the heading of these options in a command's help.
    """

    help_panel = "The base model"

    model: Annotated[
        str | None,
        typer.Option(
            help="The base model, a hub id or folder, or 'embedded' for SmolLM2-135M-Instruct. "
            "Default: the base that the adapter names."
        ),
    ] = None
    model_class: Annotated[
        ModelClass | None,
        typer.Option(
            "--class",
            metavar="CLASS",
            help="Class of hooked model, HookedTransformer or TransformerBridge. Default: "
            "TransformerBridge, if transformer-lens has it.",
        ),
    ] = None
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            metavar="DTYPE",
            help="auto (the checkpoint's own), float32, bfloat16, float16 or float64. Default: "
            "float32 on a CPU, elsewhere auto.",
        ),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(
            help="A device, by its name in torch. Default: the CPU, or accelerate's choice."
        ),
    ] = None
    device_map: Annotated[
        str | None,
        typer.Option(help="Spread the model over several devices: 'auto' lets accelerate decide."),
    ] = None
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Load linear modules in NF4, with bitsandbytes.")
    ] = False
    load_in_8bit: Annotated[
        bool,
        typer.Option("--load-in-8bit", help="Load linear modules in 8 bits, with bitsandbytes."),
    ] = False
    attn: Annotated[
        Attention,
        typer.Option(
            help="How attention is computed: eager shows attention patterns, sdpa takes less "
            "memory and shows none."
        ),
    ] = "eager"
    max_memory: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Memory limit beyond the model, in bytes, such as 8e9: same results, smaller "
            "batches.",
        ),
    ] = None

    @property
    def prepend_bos(self) -> bool | None:
        """Whether strings get a BOS; None leaves it to their tokenizer."""
        return None

    def placed(self: _Options, device: str) -> _Options:
        """Return the same options on this device, unless they already name a device or a map."""
        is_placed = self.device is not None or self.device_map is not None
        return self if is_placed else dataclasses.replace(self, device=device)


@dataclasses.dataclass(frozen=True)
class BaseModel(ModelOptions):
    """The base model of a command that runs it on texts."""

    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="Whether each text gets a BOS. Default: what the tokenizer does.",
        ),
    ] = None

    @property
    def prepend_bos(self) -> bool | None:
        """Whether strings get a BOS, as the option says."""
        return self.bos


# --- The adapter


ADAPTER = (
    "A folder, a hub id (owner/repo or owner/repo/folder), or the folder of a run, whose last "
    "checkpoint is read."
)
AdapterArgument = Annotated[str, typer.Argument(metavar="ADAPTER", help=ADAPTER)]
AdapterIfOther = Annotated[
    str | None, typer.Argument(metavar="ADAPTER", help=f"{ADAPTER} Default: the demo's.")
]
AdapterOrTuned = Annotated[
    str | None, typer.Argument(metavar="ADAPTER", help=f"{ADAPTER} Not with --tuned.")
]


@dataclasses.dataclass(frozen=True)
class Within:
    """The place of the adapter within its folder or hub repository."""

    help_panel = "Where the adapter lies"

    subfolder: Annotated[
        str | None,
        typer.Option(help="The adapter's folder within the named folder or repository."),
    ] = None
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of its hub repository.")
    ] = None


# --- What else several commands have


def least(number: int, text: str) -> Any:
    """Make an option whose value must be at least this number."""
    return typer.Option(min=number, help=text)


def input_file(text: str) -> Any:
    """Make an option that names a file to read."""
    return typer.Option(exists=True, dir_okay=False, help=text)


@dataclasses.dataclass(frozen=True)
class TunedModel:
    """A full fine-tune, given instead of an adapter."""

    tuned: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            exists=True,
            file_okay=False,
            help="Folder of a full fine-tune, in place of ADAPTER. Its difference from --model is "
            "explained.",
        ),
    ] = None


ReportOption = Annotated[
    Path, typer.Option("--report", help="HTML page to write.", dir_okay=False, writable=True)
]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", dir_okay=False, help="Also write the result for a program, as JSON."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Show no progress on stderr.")]
PromptsFile = Annotated[
    Path | None,
    input_file(
        "A .txt file with one prompt per line, or a .jsonl or .csv file with prompt (or messages), "
        "doc and pre."
    ),
]
