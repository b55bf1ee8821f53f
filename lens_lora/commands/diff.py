"""`lens-lora diff`: what an adapter changed, with nothing asked: a summary, and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lens_lora.adapters.peft_files import adapter_folder
from lens_lora.commands.options import (
    AttnOption,
    ClassOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    In4Bit,
    In8Bit,
    ModelOption,
    Quiet,
    Report,
    Subject,
)
from lens_lora.commands.terminal import require_writable
from lens_lora.errors import LensLoraError
from lens_lora.placement import Placement

__all__ = ["diff"]


def diff(
    adapter: Annotated[str, typer.Argument(help="LoRA, a hub id or folder.")],
    model: ModelOption = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A .txt file with a text a line. Default: neutral sentences and conversations.",
        ),
    ] = None,
    unrelated: Annotated[
        list[str] | None,
        typer.Option(help="An adapter trained for something else, as a control; may be repeated."),
    ] = None,
    nulls: Annotated[
        int, typer.Option(min=0, help="Controls of the same sizes in random directions.")
    ] = 2,
    fast: Annotated[bool, typer.Option("--fast", help="Without the split by module.")] = False,
    report: Report = Path("lens_lora_diff.html"),
    save: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, help="Also the numbers: a table (.csv), or all of them (.safetensors)."
        ),
    ] = None,
    model_class: ClassOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    load_in_4bit: In4Bit = False,
    load_in_8bit: In8Bit = False,
    attn: AttnOption = "eager",
    quiet: Quiet = False,
) -> None:
    """What did this fine-tune change? Unrelated texts, no question, and controls beside.

    lens-lora diff path/to/adapter --report diff.html
    """
    how = Placement(dtype, device, device_map, load_in_4bit, load_in_8bit, attn)
    require_writable(report, "--report")
    if save is not None:
        if save.suffix not in (".csv", ".safetensors"):
            raise typer.BadParameter(f"{save}: a .csv or .safetensors file.", param_hint="--save")
        require_writable(save, "--save")
    lines = None if texts is None else _lines(texts)
    folders = [adapter_folder(name) for name in (adapter, *(unrelated or []))]
    from lens_lora.commands.run_diff import run

    run(
        Subject(folders[0], model, model_class, how),
        folders[1:],
        lines,
        (report, save),
        Console(stderr=True, quiet=quiet),
        nulls=nulls,
        split=not fast,
    )


def _lines(file: Path) -> list[str]:
    """The texts of a file, one a line.

    Raises:
        LensLoraError: no text, or a file that is not UTF-8.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise LensLoraError(f"{file}: not UTF-8 ({error}); save it as UTF-8.") from error
    found = [line for line in lines if line.strip()]
    if not found:
        raise LensLoraError(f"{file}: holds no text; write one a line.")
    return found
