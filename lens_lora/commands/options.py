"""The options that the commands share, each written once."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from lens_lora.placement import Attention, Dtype, Placement

__all__ = [
    "AdapterOption",
    "AttnOption",
    "ClassOption",
    "DeviceMapOption",
    "DeviceOption",
    "DtypeOption",
    "In4Bit",
    "In8Bit",
    "MaxMemory",
    "ModelClass",
    "ModelOption",
    "Question",
    "Quiet",
    "Report",
    "Subject",
    "SystemOption",
    "conversation",
    "text_of",
]


class ModelClass(str, enum.Enum):
    """The classes of hooked models."""

    HookedTransformer = "HookedTransformer"
    TransformerBridge = "TransformerBridge"


class Subject(NamedTuple):
    """The adapter and the model that a command's options name.

    Attributes:
        adapter: its folder; None for the one that comes with the package.
        model: a hub id or folder; None for the base that the adapter names.
        model_class: the hooked model's class; None for the default of the installed version.
        how: how the model is loaded, and where it lies; without a device, on the CPU or where
            accelerate launch says.
        max_memory: bytes beside the model and the results; None for no bound.
    """

    adapter: Path | None
    model: str | None
    model_class: ModelClass | None = None
    how: Placement = Placement()
    max_memory: float | None = None


class Question(NamedTuple):
    """A prompt, and what is explained: two answers' margin, or a response.

    Without any of them, the adapted model's own response is.
    """

    prompt: str | Sequence[Mapping[str, str]]
    doc: str | None = None
    pre: str | None = None
    response: str | None = None


def conversation(said: str, system: str | None) -> list[dict[str, str]]:
    """What a user says, after the system's message if there is one, as a prompt.

    Raises:
        typer.BadParameter: the user says nothing.
    """
    if not said.strip():
        raise typer.BadParameter("it is empty: the user says nothing.", param_hint="--chat")
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": said}]


def text_of(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """A prompt's text in messages; of a conversation, what was said last."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="Base model, a hub id or folder. Default: the one the adapter names."
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter", help="LoRA, a hub id or folder. Default: one that moves a capital to Lyon."
    ),
]
ClassOption = Annotated[
    ModelClass | None, typer.Option("--class", help="Hooked class. Default: what there is.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Where to run, as torch names it. Default: the CPU, or what accelerate launch gives.",
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype",
        help="Of the weights. Default: float32 on the CPU, elsewhere auto, the checkpoint's own.",
    ),
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option("--device-map", help="Over several devices, as accelerate does it: auto, say."),
]
In4Bit = Annotated[
    bool, typer.Option("--load-in-4bit", help="Linear modules in NF4, by bitsandbytes.")
]
In8Bit = Annotated[
    bool, typer.Option("--load-in-8bit", help="Linear modules in 8 bit, by bitsandbytes.")
]
AttnOption = Annotated[
    Attention,
    typer.Option("--attn", help="sdpa takes less memory for long prompts, and shows no patterns."),
]
MaxMemory = Annotated[
    float | None,
    typer.Option(
        "--max-memory",
        min=1,
        help="Bytes beside the model, such as 8e9: less at a time, and the same numbers.",
    ),
]
SystemOption = Annotated[
    str | None, typer.Option("--system", help="The system's message before what --chat says.")
]
Report = Annotated[
    Path, typer.Option("--report", help="HTML page to write.", dir_okay=False, writable=True)
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
