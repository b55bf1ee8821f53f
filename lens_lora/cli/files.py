"""Check the files and folders that a command reads and writes before anything long runs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.text import Text

from lens_lora.cli.options import ModelOptions, TunedModel, Within
from lens_lora.demonstration import shipped_adapter
from lens_lora.errors import LensLoraError
from lens_lora.formats.folders import adapter_folder, files_in, last_checkpoint, stated_base
from lens_lora.sweeps.raw_rows import is_utf16

if TYPE_CHECKING:
    import pandas as pd

    from lens_lora.core import Result

# --- What is read


def folder_of(adapter: str | None, within: Within | None = None, *, quiet: bool) -> Path:
    """Return the folder of the named adapter, or of the one that comes with the package.

    For the folder of a trainer's run, it is that of its last checkpoint.
    """
    within = within or Within()
    if not adapter:
        _require_adapter("--subfolder", within.subfolder)
        _require_adapter("--revision", within.revision)
        return shipped_adapter()
    run = Path(adapter, within.subfolder or "")
    checkpoint = last_checkpoint(run)
    if checkpoint is None:
        return adapter_folder(adapter, within.revision, within.subfolder)
    line = Text(f"{run} is a run; its last checkpoint is taken, {checkpoint.name}.")
    Console(stderr=True, quiet=quiet).print(line, soft_wrap=True)
    return adapter_folder(checkpoint, within.revision)


def folder_or_tuned(
    adapter: str | None, within: Within, tuned: TunedModel, base: ModelOptions, *, quiet: bool
) -> Path:
    """Return the folder of the adapter, or of the full fine-tune.

    Raises:
        typer.BadParameter: both were given, or a full fine-tune without the base with which it is
            compared.
    """
    if tuned.tuned is None:
        return folder_of(adapter, within, quiet=quiet)
    if adapter is not None:
        raise typer.BadParameter(
            "it is given in place of ADAPTER; name only one.", param_hint="--tuned"
        )
    if base.model is None:
        fact = "it is compared with its base; name that with --model."
        raise typer.BadParameter(fact, param_hint="--tuned")
    return tuned.tuned


def _require_adapter(option: str, value: str | None) -> None:
    """Refuse an option about the adapter if no adapter is named."""
    if value is not None:
        raise typer.BadParameter("it is for an ADAPTER; name one.", param_hint=option)


# `str.splitlines` would also cut at form feeds, U+2028 and others.
_NEWLINE = re.compile(r"\r\n?|\n")


def lines_of(file: Path) -> list[str]:
    """Read the texts of a file, one per line. Blank lines are skipped.

    Raises:
        LensLoraError: the file is not UTF-8.
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
    """Read the texts of a file, one per line, and require at least one.

    Raises:
        LensLoraError: the file is not UTF-8, or holds no text.
    """
    lines = lines_of(file)
    if not lines:
        raise LensLoraError(f"{file}: holds no text; write one a line.")
    return lines


# --- What is written


def require_writable(path: Path, option: str) -> None:
    """Check that a file can be written, and make its folder if it does not exist.

    Raises:
        typer.BadParameter: the file cannot be written; the message gives the reason.
    """
    _make_folder(path.absolute().parent, option)
    is_new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        fact = f"{path} cannot be written ({error.strerror})."
        raise typer.BadParameter(fact, param_hint=option) from error
    if is_new:
        path.unlink()


def require_place(path: Path, option: str) -> None:
    """Check that a file can be written later, without making its folder yet.

    Raises:
        typer.BadParameter: the file cannot be written; the message gives the reason.
    """
    folder = path.absolute().parent
    if folder.is_dir():
        require_writable(path, option)
    else:
        _require_room_for(folder, option)


def _require_room_for(folder: Path, option: str) -> None:
    """Check that a folder can be made."""
    above = next(place for place in (folder, *folder.parents) if place.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        fact = f"the folder {folder} cannot be made in {above}; give another."
        raise typer.BadParameter(fact, param_hint=option)


def _make_folder(folder: Path, option: str) -> None:
    """Make a folder if it does not exist."""
    if not folder.is_dir():
        _require_room_for(folder, option)
        folder.mkdir(parents=True)


def writable(wanted: Mapping[str, Path | None]) -> dict[str, Path]:
    """Check that every file that was asked for can be written, and return them by option."""
    outputs = {option: path for option, path in wanted.items() if path is not None}
    for option, path in outputs.items():
        require_writable(path, option)
    return outputs


def write_json(path: Path, results: Sequence[Result]) -> None:
    """Write results for a program: the class, the story and the table of each.

    Args:
        path: the file to write.
        results: one result for each prompt, or a single one.
    """
    written: list[dict[str, object]] = []
    for result in results:
        kind = type(result).__name__
        written.append(_in_json(kind, _story_of(result), result.to_frame()))
    _write_json(path, written)


def _story_of(result: Result) -> str:
    """Return the story of a result; '' if it has none."""
    story = getattr(result, "story", None)
    if not callable(story):
        return ""
    return str(story())


def write_rows(path: Path, kind: str, frame: pd.DataFrame, story: str = "") -> None:
    """Write a table for a program, in the form of `write_json`.

    Args:
        path: the file to write.
        kind: the kind of result, such as 'SweepResult'.
        frame: the table.
        story: the result in words.
    """
    _write_json(path, [_in_json(kind, story, frame)])


def _in_json(kind: str, story: str, frame: pd.DataFrame) -> dict[str, object]:
    """Return a result as values for JSON; pandas writes NaN as null."""
    rows = json.loads(str(frame.to_json(orient="records")))
    return {"result": kind, "story": story, "rows": rows}


def _write_json(path: Path, written: list[dict[str, object]]) -> None:
    text = json.dumps(written, ensure_ascii=False, indent=1)
    path.write_text(f"{text}\n", encoding="utf-8")


def require_apart(
    outputs: Mapping[str, Path], base: ModelOptions, adapters: Sequence[Path], *files: Path | None
) -> None:
    """Check that no output overwrites an input, and that no two outputs are the same file.

    Links are followed. The inputs include the adapters' folders and files, and those of a local
    base model.

    Args:
        outputs: the files to write, each under its option.
        base: the base model; if none is named, it is that of the first adapter.
        adapters: the adapters' folders.
        files: whatever else is read.

    Raises:
        typer.BadParameter: two of them are the same; the message names the option.
    """
    inputs = [path for path in files if path is not None]
    for folder in adapters:
        inputs += [folder, *files_in(folder)]
    model = base.model or stated_base(adapters[0])
    if model and Path(model).is_dir():
        folder = Path(model)
        inputs += [folder, *folder.glob("*.json"), *folder.glob("*.safetensors")]
    require_unread(outputs, inputs)


def require_unread(outputs: Mapping[str, Path], inputs: Sequence[Path]) -> None:
    """Check that no output is one of these inputs, and that no two outputs are the same file.

    Args:
        outputs: the files to write, each under its option.
        inputs: the files and folders that are read; what is not there is left out.

    Raises:
        typer.BadParameter: two of them are the same; the message names the option.
    """
    for option, output in outputs.items():
        for path in inputs:
            if output.exists() and path.exists() and output.samefile(path):
                fact = f"{output} is what this command reads ({path}); name another place."
                raise typer.BadParameter(fact, param_hint=option)
    distinct = {output.resolve() for output in outputs.values()}
    if len(distinct) < len(outputs):
        raise typer.BadParameter(
            "they name the same file; give each its own.", param_hint=" and ".join(outputs)
        )
