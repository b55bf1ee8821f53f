"""`lens-lora plan`: what analyses of a model will cost, before it is loaded or downloaded."""

from __future__ import annotations

import dataclasses
import json as json_of
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from lens_lora.cli import files, options, running
from lens_lora.errors import ArgumentError

if TYPE_CHECKING:
    from lens_lora.hosts.planned_analyses import PlannedAnalysis
    from lens_lora.hosts.unloaded import UnloadedModel

_MIB = 2**20
_GIB = 2**30


@options.with_options
def plan(
    *,
    model: Annotated[
        str,
        typer.Option(
            help="A folder or a config.json; a hub id, whose config is read; or 'embedded' for "
            "SmolLM2-135M-Instruct."
        ),
    ],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    rank: Annotated[
        int, typer.Option(min=1, help="Rank of a LoRA that targets every linear module.")
    ] = 16,
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
        typer.Option(
            min=1, help="How many devices share the model, as with device_map='balanced'."
        ),
    ] = 1,
    json: options.JsonOption = None,
) -> None:
    """How much memory and how many passes does each analysis take? No weights are read.

    lens-lora plan --model path/to/config.json --tokens 512 --dtype bfloat16
    """
    if devices > 1 and max_memory is not None:
        raise ArgumentError("--max-memory bounds all devices together; leave it or --devices out.")
    outputs = files.writable({"--json": json})
    files.require_unread(outputs, [Path(model), Path(model) / "config.json"])
    with running.step("Reading the configuration", Console(stderr=True)):
        planned = _planned(
            _place_of_config(model),
            dtype,
            tokens,
            rank,
            keeps_patterns=attn == "eager",
            max_memory=max_memory,
            devices=devices,
        )
    _say_of_model(planned, rank, tokens)
    if devices > 1:
        _say_of_devices(planned)
    if "--json" in outputs:
        about = {"model": model, "dtype": planned.dtype, "tokens": tokens, **_in_json(planned)}
        outputs["--json"].write_text(json_of.dumps(about, indent=1) + "\n", encoding="utf-8")


class _Planned(NamedTuple):
    """The plan for a model and its analyses.

    Attributes:
        base: the model as its configuration describes it.
        factors: the bytes of the LoRA factors.
        analyses: what each analysis takes.
        peaks_on: for each device, the bytes that each analysis takes for the blocks there.
    """

    base: UnloadedModel
    factors: int
    analyses: Sequence[PlannedAnalysis]
    peaks_on: Sequence[Mapping[str, float]]

    @property
    def dtype(self) -> str:
        """The name of the weights' dtype, such as 'bfloat16'."""
        return str(self.base.sizes.dtype).removeprefix("torch.")


def _place_of_config(model: str) -> str:
    """Find the configuration of a model by the name that the user gave."""
    from lens_lora.demonstration.base_names import base_by_name
    from lens_lora.demonstration.embedded import place_of

    # It is quiet, because the command's own spinner shows while the embedded model is converted.
    return place_of(base_by_name(model, of_adapter=None), quiet=True)


def _planned(
    model: str,
    dtype: str,
    tokens: int,
    rank: int,
    *,
    keeps_patterns: bool,
    max_memory: float | None,
    devices: int,
) -> _Planned:
    """Plan the analyses of a model from its configuration alone."""
    import torch

    from lens_lora.hosts.planned_analyses import planned_analyses
    from lens_lora.hosts.unloaded import unloaded

    stated_dtype = None if dtype == "auto" else getattr(torch, dtype)
    base = unloaded(
        model,
        stated_dtype,
        keeps_patterns=keeps_patterns,
        max_memory=max_memory,
        devices=devices,
    )
    # A lens holds the factors twice, in float32: in the adapter and in the model's basis.
    factors = 2 * rank * base.factors * max(4, base.sizes.dtype.itemsize)
    # A graph is on the devices of its blocks; a pass without a graph holds one block at a time.
    peaks_on: list[dict[str, float]] = []
    for device in base.devices:
        part = dataclasses.replace(base.sizes, n_layers=device.blocks)
        planned_there = planned_analyses(part, tokens)
        peaks_on.append({analysis.name: analysis.peak for analysis in planned_there})
    return _Planned(base, factors, planned_analyses(base.sizes, tokens), peaks_on)


def _say_of_model(planned: _Planned, rank: int, tokens: int) -> None:
    """Print the size of the model and the adapter, and a table of all analyses."""
    weights = planned.base.weights / _GIB
    factors = planned.factors / _MIB
    running.say(
        f"Weights: {weights:.3g} GiB in {planned.dtype}. A LoRA of rank {rank} on "
        f"{planned.base.sizes.sites} modules: {factors:,.0f} MiB."
    )
    running.say(f"Beside these, for one prompt of {tokens:,} tokens and one margin:")
    table = Table("analysis", "forward", "backward", "MiB at its peak", "MiB at least")
    for analysis in planned.analyses:
        peak = "refused" if math.isnan(analysis.peak) else f"{analysis.peak / _MIB:,.0f}"
        least = f"{analysis.least / _MIB:,.0f}"
        table.add_row(analysis.name, str(analysis.forward), str(analysis.backward), peak, least)
    Console().print(table)
    running.say("Within --max-memory, batches are smaller, down to the last column.")


def _say_of_devices(planned: _Planned) -> None:
    """Print what each device holds, and each analysis's peak there."""
    devices = planned.base.devices
    factors_of_block = planned.factors / planned.base.sizes.n_layers
    running.say("MiB on each device; an analysis takes its part beside the weights and the LoRA:")
    table = Table("", *(f"device {number}" for number in range(len(devices))))
    table.add_row("blocks", *(str(device.blocks) for device in devices))
    at_rest = [device.weights + device.blocks * factors_of_block for device in devices]
    table.add_row("weights and LoRA", *(f"{size / _MIB:,.0f}" for size in at_rest))
    for name in planned.peaks_on[0]:
        table.add_row(name, *(f"{peaks[name] / _MIB:,.0f}" for peaks in planned.peaks_on))
    Console().print(table)


def _in_json(planned: _Planned) -> dict[str, object]:
    """Return the plan as values for JSON, without the options of the command."""
    analyses: list[dict[str, object]] = []
    for analysis in planned.analyses:
        row: dict[str, object] = {
            "analysis": analysis.name,
            "forward_passes": analysis.forward,
            "backward_passes": analysis.backward,
            "peak_bytes": _whole_bytes(analysis.peak),
            "least_bytes": round(analysis.least),
        }
        analyses.append(row)
    devices: list[dict[str, object]] = []
    for device, peaks in zip(planned.base.devices, planned.peaks_on, strict=True):
        about: dict[str, object] = {
            "blocks": device.blocks,
            "weights_bytes": device.weights,
            "peak_bytes": {name: _whole_bytes(peak) for name, peak in peaks.items()},
        }
        devices.append(about)
    return {
        "weights_bytes": planned.base.weights,
        "factors_bytes": planned.factors,
        "sites": planned.base.sizes.sites,
        "analyses": analyses,
        "devices": devices,
    }


def _whole_bytes(peak: float) -> int | None:
    """Round a number of bytes; None stands for an analysis that is refused."""
    return None if math.isnan(peak) else round(peak)
