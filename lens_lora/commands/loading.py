"""What the commands share: loading a model and an adapter, progress on stderr, one-line errors.

Of several processes the first alone tells of an error, unless it is not its own.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import typer
from rich.console import Console
from rich.text import Text

from lens_lora.adapters.adapter import Adapter
from lens_lora.demonstration import shipped_adapter
from lens_lora.errors import LensLoraError
from lens_lora.lens import LoraLens
from lens_lora.sweeps.processes import rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lens_lora.loading import Kind

__all__ = [
    "announce",
    "lens_over",
    "load_model",
    "load_model_of",
    "one_line_errors",
    "require_place",
    "require_writable",
    "say",
    "shipped_adapter",
    "step",
    "told_if_interrupted",
]

EMBEDDED = "embedded"
# Whoever launched the processes ends them all soon after the first has left.
_SECONDS_FOR_THE_FIRST = 10.0


@contextlib.contextmanager
def one_line_errors() -> Generator[None]:
    """An error of this package or of the system is one line and exit code 2, Ctrl-C one and 130."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (LensLoraError, OSError) as error:
        _tell(f"{type(error).__name__}: {error}")
        raise typer.Exit(2) from error
    except torch.cuda.OutOfMemoryError as error:
        fact = str(error).split(". ")[0]
        _tell(f"{fact}. Take shorter prompts, a smaller --batch-size (sweep), or --device cpu.")
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        if rank() == 0:
            _print_line(str(error) or "Interrupted.")
        raise typer.Exit(130) from error


def _tell(line: str) -> None:
    """Once, where every process meets the same error."""
    if rank():
        time.sleep(_SECONDS_FOR_THE_FIRST)
        line = f"process {rank() + 1}: {line}"
    _print_line(line)


def _print_line(line: str) -> None:
    Console(stderr=True, soft_wrap=True).print(Text(" ".join(line.split()), style="red"))


@contextlib.contextmanager
def told_if_interrupted(what: Callable[[], str]) -> Generator[None]:
    """Within the block, Ctrl-C says what is kept."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"Interrupted. {what()}") from error


def require_writable(path: Path, option: str) -> None:
    """Refuse a file that cannot be written, before anything long is run.

    Raises:
        typer.BadParameter: naming the option.
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


def require_place(path: Path, option: str) -> None:
    """`require_writable`, of a file whose folder may be yet to be made."""
    folder = path.absolute().parent
    if folder.is_dir():
        require_writable(path, option)
        return
    above = next(place for place in (folder, *folder.parents) if place.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        fact = f"the folder {folder} cannot be made in {above}; give another."
        raise typer.BadParameter(fact, param_hint=option)


@contextlib.contextmanager
def step(message: str, progress: Console) -> Generator[None]:
    """A spinner on a terminal, else a line; the libraries' own noise is silenced."""
    from lens_lora.loading import quiet_libraries

    if not progress.is_terminal:
        progress.print(message)
    with progress.status(message), quiet_libraries():
        yield


def load_model(
    model: str | None, progress: Console
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A hub id or folder; the embedded model for None or 'embedded'."""
    from lens_lora.demonstration.embedded import EMBEDDED_NAME, embedded_model_folder, load_embedded
    from lens_lora.loading import load_base

    if model not in (None, EMBEDDED):
        with step(f"Loading {model}", progress):
            return load_base(model)
    embedded_model_folder(quiet=progress.quiet)
    with step(f"Loading {EMBEDDED_NAME}", progress):
        return load_embedded(quiet=True)


def load_model_of(
    adapter: Adapter, model: str | None, progress: Console
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model asked for, else the base that the adapter names, else the embedded model.

    Raises:
        LensLoraError: what loading raises; of a base that was not asked for, with the remedy.
    """
    from lens_lora.demonstration.embedded import EMBEDDED_HUB_ID

    named = adapter.base_model
    if model is not None:
        _note_other_base(EMBEDDED_HUB_ID if model == EMBEDDED else model, named, progress)
        return load_model(model, progress)
    if named in (None, EMBEDDED_HUB_ID):
        return load_model(None, progress)
    try:
        return load_model(named, progress)
    except LensLoraError as error:
        raise type(error)(
            f"{error} It is the base that the adapter names; give --model."
        ) from error


def _note_other_base(model: str, named: str | None, progress: Console) -> None:
    """Where the last parts of the two names differ: weights alone cannot tell a wrong base."""
    if named and Path(named).name.lower() != Path(model).name.lower():
        note = f"Note: the adapter names the base {named}, and --model is {model}; is that meant?"
        progress.print(Text(note, style="yellow"), soft_wrap=True)


def lens_over(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Adapter,
    progress: Console,
    *,
    kind: Kind | None = None,
    device: str = "cpu",
) -> LoraLens:
    """The lens over a hooked model of the base.

    Args:
        kind: the hooked model's class; by default HookedTransformer where there is one, which the
            printed numbers of the documentation are of.
        device: as torch names it.

    Raises:
        ModelStateError: no such device here.
    """
    from lens_lora.loading import hooked_model, hooked_transformer_if_there, moved

    with step("Building the hooked model", progress):
        chosen = kind or hooked_transformer_if_there()
        model, _ = hooked_model(moved(hf_model, device), tokenizer, kind=chosen)
    return LoraLens(model, adapter)


def announce(lens: LoraLens) -> None:
    """The model and the adapter, on stdout."""
    from lens_lora.loading import transformer_lens_version

    about, adapter = lens.describe(), lens.adapter
    say(
        f"Model:   {about['model']} as {lens.class_name} of transformer-lens "
        f"{transformer_lens_version()}, {about['dtype']}"
    )
    ranks = ", ".join(str(r) for r in sorted({site.rank for site in lens.sites}))
    base = f", trained on {adapter.base_model}" if adapter.base_model else ""
    say(f"Adapter: {adapter.name}, {len(adapter)} modules of rank {ranks}{base}")


def say(line: str) -> None:
    """One line on stdout, whatever brackets it holds."""
    Console(soft_wrap=True).print(Text(line))
