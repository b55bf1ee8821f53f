"""`lens-lora sweep`: a file of prompts through chosen analyses, into Parquet."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import typer

from lens_lora.adapters.peft_files import adapter_folder
from lens_lora.commands.options import (
    AdapterOption,
    AttnOption,
    ClassOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    In4Bit,
    In8Bit,
    MaxMemory,
    ModelOption,
    Quiet,
    Subject,
)
from lens_lora.commands.terminal import require_place
from lens_lora.placement import Placement
from lens_lora.sweeps.analyses import ANALYSES, BY_TOKEN, chosen
from lens_lora.sweeps.processes import rank
from lens_lora.sweeps.records import each_record, read_records

__all__ = ["sweep"]


def sweep(
    records: Annotated[
        Path,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSONL or CSV with prompt (in JSONL also messages), doc, pre, perhaps id; with "
            "--response, response in place of doc and pre.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(dir_okay=False, help="Ends in .parquet; its folder is made.")
    ] = Path("results.parquet"),
    model: ModelOption = None,
    adapter: AdapterOption = None,
    analysis: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Any of {', '.join(ANALYSES)}; may be repeated. Default: first_order. Or one of "
            f"{', '.join(BY_TOKEN)}, which need no doc and pre."
        ),
    ] = None,
    response: Annotated[
        Literal["log-prob", "kl"] | None,
        typer.Option(
            help="What is read of each record's response: its log-prob, or the kl of base and "
            "adapted model over it (by path, add_one and leave_one_out)."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts run together.")] = 8,
    model_class: ClassOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    load_in_4bit: In4Bit = False,
    load_in_8bit: In8Bit = False,
    attn: AttnOption = "eager",
    max_memory: MaxMemory = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many records.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with what is at --out, or remove it and start over.")
    ] = True,
    quiet: Quiet = False,
) -> None:
    """Run hundreds of prompts; one row per prompt and site. After a kill, run it again to resume.

    Over several processes: accelerate launch --num_processes 2 -m lens_lora sweep …
    """
    how = Placement(dtype, device, device_map, load_in_4bit, load_in_8bit, attn)
    if out.suffix != ".parquet":
        raise typer.BadParameter(f"--out {out}: expected a name that ends in .parquet.")
    names = chosen(analysis or ["first_order"])
    by_token = names[0] in BY_TOKEN
    if by_token and response is not None:
        raise typer.BadParameter(f"--response: {names[0]} has no readout; leave it out.")
    rows = (
        islice(each_record(records, with_answers=False), limit)
        if by_token
        else read_records(
            records, with_answers=response is None, with_response=response is not None
        )[:limit]
    )
    if rank() == 0:
        require_place(out, "--out")
    folder = adapter_folder(adapter) if adapter else None
    from lens_lora.commands.run_sweep import run

    subject = Subject(folder, model, model_class, how, max_memory)
    run(
        subject,
        rows,
        names,
        out,
        response=response,
        batch_size=batch_size,
        resume=resume,
        quiet=quiet,
    )
