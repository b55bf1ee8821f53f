"""The options that the commands share, each written once."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["AdapterOption", "ClassOption", "ModelClass", "ModelOption", "Quiet", "Report"]


class ModelClass(str, enum.Enum):
    """The classes of hooked models."""

    HookedTransformer = "HookedTransformer"
    TransformerBridge = "TransformerBridge"


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
Report = Annotated[
    Path, typer.Option("--report", help="HTML page to write.", dir_okay=False, writable=True)
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
