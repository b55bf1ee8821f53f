"""What the commands share: loading a model and an adapter, progress on stderr, one-line errors."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

from lens_lora.adapter import Adapter
from lens_lora.errors import LensLoraError, ModelStateError
from lens_lora.lens import LoraLens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lens_lora.demo.hooked import Kind

__all__ = ["lens_over", "load_model", "one_line_errors", "say", "shipped_adapter", "step"]

EMBEDDED = "embedded"


@contextlib.contextmanager
def one_line_errors() -> Generator[None]:
    """Print an error of this package as one line, and leave with exit code 2."""
    try:
        yield
    except LensLoraError as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        Console(stderr=True, soft_wrap=True).print(Text(line, style="red"))
        raise typer.Exit(2) from error


@contextlib.contextmanager
def step(message: str, progress: Console) -> Generator[None]:
    """A spinner on a terminal, else a line; the libraries' own noise is silenced."""
    from lens_lora.demo.hooked import quiet_libraries

    if not progress.is_terminal:
        progress.print(message)
    with progress.status(message), quiet_libraries():
        yield


def load_model(
    model: str | None, progress: Console
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A hub id or folder; the embedded model for None or 'embedded'."""
    from lens_lora.demo.embedded import EMBEDDED_NAME, embedded_model_folder, load_embedded
    from lens_lora.demo.hooked import load_base

    if model not in (None, EMBEDDED):
        with step(f"Loading {model}", progress):
            return load_base(model)
    embedded_model_folder(quiet=progress.quiet)
    with step(f"Loading {EMBEDDED_NAME}", progress):
        return load_embedded(quiet=True)


def shipped_adapter() -> Path:
    """The adapter that comes with the package."""
    import lens_lora.demo

    return Path(lens_lora.demo.__file__ or "").with_name("lyon_adapter")


def lens_over(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Adapter,
    progress: Console,
    *,
    kind: Kind | None = None,
    device: str = "cpu",
) -> LoraLens:
    """The lens over a hooked model of the base, announced on stdout.

    Args:
        kind: the hooked model's class; by default what the installed transformer-lens has.
        device: as torch names it.

    Raises:
        ModelStateError: no such device here.
    """
    from lens_lora.demo.hooked import hooked_model, transformer_lens_version

    with step("Building the hooked model", progress):
        model, class_name = hooked_model(_moved(hf_model, device), tokenizer, kind=kind)
    lens = LoraLens(model, adapter)
    about = lens.describe()
    say(
        f"Model:   {about['model']} as {class_name} of transformer-lens "
        f"{transformer_lens_version()}, {about['dtype']}"
    )
    ranks = ", ".join(str(r) for r in sorted({site.rank for site in lens.sites}))
    base = f", trained on {adapter.base_model}" if adapter.base_model else ""
    say(f"Adapter: {adapter.name}, {len(adapter)} modules of rank {ranks}{base}")
    return lens


def _moved(model: Any, device: str) -> PreTrainedModel:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises either
        raise ModelStateError(
            f"the device {device!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error


def say(line: str) -> None:
    """One line on stdout, whatever brackets it holds."""
    Console(soft_wrap=True).print(Text(line))
