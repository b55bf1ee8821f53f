"""What commands load: the one place outside tests/cli that knows how they do it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from rich.console import Console

import lens_lora as ll
from lens_lora.cli import running
from lens_lora.cli.adapters import ModelBeside
from lens_lora.cli.options import BaseModel
from lens_lora.demonstration import base_names, embedded

EMBEDDED_HUB_ID = base_names.EMBEDDED_HUB_ID


def lens_of_a_command(model: Path, adapter: Path) -> ll.LoraLens:
    """The lens of a command that is given `--model` and an adapter's folder."""
    return running.lens_for(BaseModel(model=str(model)), adapter, Console(quiet=True))


def lens_of_inspect(model: str, adapter: ll.Adapter) -> ll.LoraLens:
    """The lens of `inspect --model`, which leaves out modules that the model lacks."""
    base = ModelBeside(model=model)
    return running.lens_for(base, adapter, Console(quiet=True), leaves_out=True)


def commands_load(patch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    """Let every command load its base and tokenizer by this function."""
    patch.setattr(running, "load_model", load)


def commands_have(patch: pytest.MonkeyPatch, lens: ll.LoraLens) -> None:
    """Give every command this lens."""
    patch.setattr(running, "lens_for", lambda *_: lens)


def embedded_model_is_at(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Install the embedded model in this folder, and nothing of the hub on this machine."""
    patch.setattr(base_names, "EMBEDDED_PACKAGE", "json")  # a package that is always there
    patch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    patch.setattr(embedded, "embedded_model_folder", lambda **_: folder)
