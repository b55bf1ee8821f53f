"""`lens-lora plan`: what analyses of a model will take, before it is loaded or downloaded."""

from __future__ import annotations

import dataclasses
import json as json_of
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from lens_lora.cli import files, options, running
from lens_lora.errors import ArgumentError

if TYPE_CHECKING:
    from lens_lora.hosts.unloaded import OnDevice

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
    devices: Annotated[
        int,
        typer.Option(min=1, help="Over how many devices it is spread, as device_map='balanced'."),
    ] = 1,
    json: options.JsonOption = None,
) -> None:
    """How much memory and how many passes does each analysis take? No weights are read.

    lens-lora plan --model path/to/config.json --tokens 512 --dtype bfloat16
    """
    if devices > 1 and max_memory is not None:
        raise ArgumentError("--max-memory bounds all devices together; leave it or --devices out.")
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
            devices=devices,
        )
        analyses = planned_analyses(found.sizes, tokens)
        # A graph lies where its blocks are; a pass without one holds a block at a time.
        peaks_on: list[dict[str, float]] = []
        for device in found.devices:
            part = dataclasses.replace(found.sizes, n_layers=device.blocks)
            planned_there = planned_analyses(part, tokens)
            peaks_on.append({analysis.name: analysis.peak for analysis in planned_there})
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
    if devices > 1:
        _say_of_devices(found.devices, peaks_on, factors / found.sizes.n_layers)
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
            "devices": _in_json(found.devices, peaks_on),
        }
        outputs["--json"].write_text(json_of.dumps(about, indent=1) + "\n", encoding="utf-8")


def _say_of_devices(
    devices: Sequence[OnDevice], peaks_on: Sequence[Mapping[str, float]], factors: float
) -> None:
    """Print what lies on each device, and the peak there of each analysis.

    Args:
        devices: their blocks and weights.
        peaks_on: of each device, the bytes of each analysis over the blocks there.
        factors: bytes of the LoRA factors of one block.
    """
    running.say("Spread over devices, MiB on each; an analysis comes beside weights and LoRA:")
    table = Table("", *(f"device {number}" for number in range(len(devices))))
    table.add_row("blocks", *(str(device.blocks) for device in devices))
    at_rest = [device.weights + device.blocks * factors for device in devices]
    table.add_row("weights and LoRA", *(f"{size / _MIB:,.0f}" for size in at_rest))
    for name in peaks_on[0]:
        table.add_row(name, *(f"{peaks[name] / _MIB:,.0f}" for peaks in peaks_on))
    Console().print(table)


def _in_json(
    devices: Sequence[OnDevice], peaks_on: Sequence[Mapping[str, float]]
) -> list[dict[str, object]]:
    """The same for a file."""
    found: list[dict[str, object]] = []
    for device, peaks in zip(devices, peaks_on, strict=True):
        in_bytes = {name: None if math.isnan(peak) else round(peak) for name, peak in peaks.items()}
        about: dict[str, object] = {
            "blocks": device.blocks,
            "weights_bytes": device.weights,
            "peak_bytes": in_bytes,
        }
        found.append(about)
    return found
