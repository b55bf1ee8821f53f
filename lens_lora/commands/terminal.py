"""What the commands print and check without a model: one-line errors, and files to be written.

Nothing here imports torch. Of several processes only the first reports an error that all of them
have; an error in one process is reported by that process.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from lens_lora.errors import LensLoraError, TokenError
from lens_lora.sweeps.processes import rank

__all__ = [
    "one_line_errors",
    "require_different",
    "require_place",
    "require_writable",
    "say",
    "told_if_interrupted",
]

# A launcher ends all processes soon after the first has left.
_SECONDS_FOR_THE_FIRST = 10.0


@contextlib.contextmanager
def one_line_errors() -> Generator[None]:
    """Print an error of this package or of the system as one line, and exit with code 2.

    Ctrl-C also prints one line; its code is 130.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except (LensLoraError, OSError) as error:
        _tell(f"{type(error).__name__}: {error}")
        raise typer.Exit(2) from error
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        fact = str(error).split(". ")[0]
        _tell(f"{fact}. Use shorter prompts, a smaller --batch-size (sweep), or --device cpu.")
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        if rank() == 0:
            _print_line(str(error) or "Interrupted.")
        raise typer.Exit(130) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it is torch's own out-of-memory error; if torch was never imported, it is not."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.cuda.OutOfMemoryError)


def _tell(line: str) -> None:
    """Print an error once, even if every process has the same one."""
    if rank():
        time.sleep(_SECONDS_FOR_THE_FIRST)
        line = f"process {rank() + 1}: {line}"
    _print_line(line)


def _print_line(line: str) -> None:
    Console(stderr=True, soft_wrap=True).print(Text(" ".join(line.split()), style="red"))


@contextlib.contextmanager
def told_if_interrupted(what: Callable[[], str]) -> Generator[None]:
    """Within the block, Ctrl-C prints what has been saved.

    Args:
        what: makes that sentence, at the time of Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"Interrupted. {what()}") from error


def require_different(doc: str, pre: str, prompt: str = "") -> None:
    """Check that the two answers differ as strings; their tokens may still be the same.

    Args:
        doc, pre: the two answers.
        prompt: how the message begins where there are several prompts.

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

    Args:
        path: the file.
        option: the option that gave it, for the message.

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


def require_place(path: Path, option: str) -> None:
    """`require_writable`, for a file whose folder is made if it does not exist.

    Args:
        path: the file.
        option: the option that gave it, for the message.

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


def say(line: str) -> None:
    """One line on stdout; brackets in it are not markup.

    Args:
        line: what to print.
    """
    Console(soft_wrap=True).print(Text(line))
