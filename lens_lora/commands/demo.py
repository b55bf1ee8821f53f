"""`lens-lora demo`: how a LoRA moves one fact, on the embedded model and adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lens_lora.adapters.peft_files import adapter_folder
from lens_lora.commands.options import (
    AdapterOption,
    AttnOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    In4Bit,
    In8Bit,
    ModelOption,
    Quiet,
    Report,
    Subject,
    SystemOption,
    conversation,
)
from lens_lora.commands.terminal import require_different, require_writable
from lens_lora.placement import Placement

__all__ = ["demo"]


def demo(
    model: ModelOption = None,
    adapter: AdapterOption = None,
    prompt: Annotated[
        str, typer.Option(help="Read at its last token.")
    ] = "The capital of France is",
    chat: Annotated[
        str | None,
        typer.Option(help="What a user says, by the model's chat template; in place of --prompt."),
    ] = None,
    system: SystemOption = None,
    doc: Annotated[
        str, typer.Option(help="The document's fact, with its leading space.")
    ] = " Lyon",
    pre: Annotated[
        str, typer.Option(help="The pretrained fact, with its leading space.")
    ] = " Paris",
    report: Report = Path("lens_lora_demo.html"),
    train: Annotated[
        bool, typer.Option("--train", help="Train a new adapter, about half a minute, and use it.")
    ] = False,
    train_out: Annotated[
        Path, typer.Option(help="Folder for the adapter of --train.", file_okay=False)
    ] = Path("lens_lora_adapter"),
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    load_in_4bit: In4Bit = False,
    load_in_8bit: In8Bit = False,
    attn: AttnOption = "eager",
    quiet: Quiet = False,
) -> None:
    """Explain how a LoRA moves one fact: the story, the numbers, and a page of figures."""
    how = Placement(dtype, device, device_map, load_in_4bit, load_in_8bit, attn)
    if train and adapter is not None:
        raise typer.BadParameter("--train makes an adapter; leave --adapter out.")
    if train and how.is_quantised:
        raise typer.BadParameter("--train needs weights that are not quantised.")
    if not prompt:
        raise typer.BadParameter(
            "it is empty: there is no token to read at.", param_hint="--prompt"
        )
    if system is not None and chat is None:
        raise typer.BadParameter("it stands before a --chat; give one.", param_hint="--system")
    asked = prompt if chat is None else conversation(chat, system)
    require_different(doc, pre)
    require_writable(report, "--report")
    folder = adapter_folder(adapter) if adapter else None
    from lens_lora.commands.run_demo import run

    subject, trained = Subject(folder, model, how=how), train_out if train else None
    run(subject, asked, doc, pre, report=report, train_out=trained, quiet=quiet)
