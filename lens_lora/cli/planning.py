"""`lens-lora plan`: what analyses of a model will take, before it is loaded or downloaded."""

from __future__ import annotations

import json as json_of
import math
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from lens_lora.cli import files, options, running

_MIB = 2**20


@options.with_options
def plan(
    *,
    model: Annotated[
        str, typer.Option(help="A folder or a config.json; or a hub id, whose config is read.")
    ],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    rank: Annotated[int, typer.Option(min=1, help="Rank of a LoRA on every linear module.")] = 16,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"],
        typer.Option(
            metavar="DTYPE",
            help="Dtype of the weights: float32, bfloat16, float16, float64, or auto for what the "
            "configuration says.",
        ),
    ] = "float32",
    attn: Annotated[
        Literal["eager", "sdpa"], typer.Option(help="sdpa keeps no attention patterns.")
    ] = "eager",
    max_memory: Annotated[
        float | None,
        typer.Option(min=1, help="Memory limit beyond the model, in bytes, such as 8e9."),
    ] = None,
    json: options.JsonOption = None,
) -> None:
    """How much memory and how many passes does each analysis take? No weights are read.

    lens-lora plan --model path/to/config.json --tokens 512 --dtype bfloat16
    """
    outputs = files.writable({"--json": json})
    with running.quiet_libraries():
        import torch

        from lens_lora.hosts.planned_analyses import planned_analyses
        from lens_lora.hosts.unloaded import unloaded

        stated_dtype = None if dtype == "auto" else getattr(torch, dtype)
        found = unloaded(
            model,
            stated_dtype,
            keeps_patterns=attn == "eager",
            max_memory=max_memory,
        )
        analyses = planned_analyses(found.sizes, tokens)
    # A lens holds the factors twice, in float32: in the adapter and in the model's basis.
    factors = 2 * rank * found.factors * max(4, found.sizes.dtype.itemsize)
    name = str(found.sizes.dtype).removeprefix("torch.")
    running.say(
        f"Weights: {found.weights / 2**30:.3g} GiB in {name}. A LoRA of rank {rank} on "
        f"{found.sizes.sites} modules: {factors / _MIB:,.0f} MiB."
    )
    running.say(f"Beside these, for one prompt of {tokens:,} tokens and one margin:")
    table = Table("analysis", "forward", "backward", "MiB at its peak", "MiB at least")
    for analysis in analyses:
        peak = "refused" if math.isnan(analysis.peak) else f"{analysis.peak / _MIB:,.0f}"
        least = f"{analysis.least / _MIB:,.0f}"
        table.add_row(analysis.name, str(analysis.forward), str(analysis.backward), peak, least)
    Console().print(table)
    running.say("Within --max-memory, batches are smaller, down to the last column.")
    if "--json" in outputs:
        rows: list[dict[str, object]] = []
        for analysis in analyses:
            is_refused = math.isnan(analysis.peak)
            row: dict[str, object] = {
                "analysis": analysis.name,
                "forward_passes": analysis.forward,
                "backward_passes": analysis.backward,
                "peak_bytes": None if is_refused else round(analysis.peak),
                "least_bytes": round(analysis.least),
            }
            rows.append(row)
        about = {
            "model": model,
            "dtype": name,
            "tokens": tokens,
            "weights_bytes": found.weights,
            "factors_bytes": factors,
            "sites": found.sizes.sites,
            "analyses": rows,
        }
        outputs["--json"].write_text(json_of.dumps(about, indent=1) + "\n", encoding="utf-8")
