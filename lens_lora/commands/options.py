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
from typing import Annotated, Any, Literal

import typer

from lens_lora.adapters.peft_files import CONFIG, WEIGHTS, adapter_folder, stated_fields
from lens_lora.demonstration import shipped_adapter
from lens_lora.errors import LensLoraError, TokenError
from lens_lora.model.placement import Attention, Dtype, Placement
from lens_lora.sweeps.records import is_utf16

ModelClass = Literal["HookedTransformer", "TransformerBridge"]


@dataclasses.dataclass(frozen=True)
class BaseModel(Placement):
    """The base model of a command and how it is loaded; each field is an option (`with_base`).

    Without a model it is the base that the adapter names.

    Raises:
        ArgumentError: options that exclude each other.
    """

    model: Annotated[
        str | None,
        typer.Option(help="Base model, a hub id or folder. Default: the one the adapter names."),
    ] = None
    model_class: Annotated[
        ModelClass | None, typer.Option("--class", help="Hooked class. Default: what there is.")
    ] = None
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Of the weights. Default: float32 on the CPU, elsewhere auto, the checkpoint's."
        ),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(
            help="Where to run, as torch names it. Default: the CPU, or what accelerate launch "
            "gives."
        ),
    ] = None
    device_map: Annotated[
        str | None, typer.Option(help="Over several devices, as accelerate does it: auto, say.")
    ] = None
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Linear modules in NF4, by bitsandbytes.")
    ] = False
    load_in_8bit: Annotated[
        bool, typer.Option("--load-in-8bit", help="Linear modules in 8 bit, by bitsandbytes.")
    ] = False
    attn: Annotated[
        Attention,
        typer.Option(help="sdpa takes less memory for long prompts, and shows no patterns."),
    ] = "eager"
    max_memory: Annotated[
        float | None,
        typer.Option(
            min=1, help="Bytes beside the model, such as 8e9: less at a time, and the same numbers."
        ),
    ] = None


def with_base(command: Callable[..., None]) -> Callable[..., None]:
    """The command with one option for each field of `BaseModel`, in place of its `base`."""
    defaults = {field.name: field.default for field in dataclasses.fields(BaseModel)}
    options = {
        name: inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation
        )
        for name, annotation in inspect.get_annotations(BaseModel, eval_str=True).items()
    }
    signature = inspect.signature(command, eval_str=True)
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in signature.parameters.items()
        if name != "base"
    ]

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        base = BaseModel(**{name: values.pop(name) for name in options})
        command(**values, base=base)

    expanded.__signature__ = signature.replace(  # pyright: ignore[reportAttributeAccessIssue]
        parameters=[*parameters, *options.values()]
    )
    return expanded


AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter", help="LoRA, a hub id or folder. Default: one that moves a capital to Lyon."
    ),
]
SystemOption = Annotated[
    str | None, typer.Option("--system", help="The system's message before what --chat says.")
]
DocOption = Annotated[
    str, typer.Option("--doc", help="The document's answer, with its leading space.")
]
PreOption = Annotated[
    str, typer.Option("--pre", help="The pretrained answer, with its leading space.")
]
ReportOption = Annotated[
    Path, typer.Option("--report", help="HTML page to write.", dir_okay=False, writable=True)
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]


# A string, or the messages of a conversation.
Prompt = str | Sequence[Mapping[str, str]]


def conversation(said: str, system: str | None) -> Prompt:
    """What a user says, after the system's message if there is one, as a prompt.

    Raises:
        typer.BadParameter: the user says nothing.
    """
    if not said.strip():
        raise typer.BadParameter("it is empty: the user says nothing.", param_hint="--chat")
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": said}]


def text_of(prompt: Prompt) -> str:
    """A prompt's text in messages; of a conversation, what was said last."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))


def folder_of(adapter: str | None) -> Path:
    """The folder of the adapter that is asked for, or of the one that comes with the package.

    Raises:
        AdapterError: no such folder or hub id, or no adapter in it.
    """
    return adapter_folder(adapter) if adapter else shipped_adapter()


_NEWLINE = re.compile(r"\r\n?|\n")  # `str.splitlines` also cuts at form feeds, U+2028 and others


def lines_of(file: Path) -> list[str]:
    """The texts of a file, one a line; blank lines are skipped.

    Raises:
        LensLoraError: a file that is not UTF-8.
    """
    content = file.read_bytes()
    if is_utf16(content[:2]):
        raise LensLoraError(f"{file} is UTF-16; save it as UTF-8.")
    try:
        lines = _NEWLINE.split(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise LensLoraError(f"{file}: not UTF-8 ({error}); save it as UTF-8.") from error
    return [line for line in lines if line.strip()]


def texts_of(file: Path) -> list[str]:
    """`lines_of` a file that has to hold at least one.

    Raises:
        LensLoraError: no text, or a file that is not UTF-8.
    """
    lines = lines_of(file)
    if not lines:
        raise LensLoraError(f"{file}: holds no text; write one a line.")
    return lines


def require_different(doc: str, pre: str, prompt: str = "") -> None:
    """Check that the two answers differ as strings; their tokens may still be the same.

    Raises:
        TokenError: they are the same string.
    """
    if doc == pre:
        raise TokenError(
            f"{prompt}doc and pre are both {doc!r}, so their margin is zero whatever the model "
            "does."
        )


def require_writable(path: Path, option: str) -> None:
    """Check that a file can be written, before any long run.

    Raises:
        typer.BadParameter: its folder does not exist, or the file cannot be opened.
    """
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


def require_apart(
    outputs: Mapping[str, Path], base: BaseModel, adapters: Sequence[Path], *files: Path | None
) -> None:
    """Check that nothing is written over what the command reads, and no two outputs are one file.

    Links are followed. Of the adapters and of a local base model, the folder and its files count.

    Args:
        outputs: by option.
        base: the base model; without one, the first adapter's own.
        adapters: their folders.
        files: whatever else is read.

    Raises:
        typer.BadParameter: an output is an input, or another output.
    """
    inputs = [path for path in files if path is not None]
    for folder in adapters:
        inputs += [folder, folder / CONFIG, folder / WEIGHTS]
    model = base.model or stated_fields(adapters[0]).get("base_model_name_or_path")
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
    """`require_writable`, for a file whose folder is made if it does not exist.

    Raises:
        typer.BadParameter: the file cannot be written, or its folder cannot be made.
    """
    folder = path.absolute().parent
    if folder.is_dir():
        require_writable(path, option)
        return
    above = next(place for place in (folder, *folder.parents) if place.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        fact = f"the folder {folder} cannot be made in {above}; give another."
        raise typer.BadParameter(fact, param_hint=option)
