"""Compare what `lens-lora plan` says with measured peaks, on random weights of several sizes.

    python -m benchmarks.planned 5M 30M --write
    python -m benchmarks.planned 9M 40M --tokens 384 --dtype bfloat16 --write
    python -m benchmarks.planned 190M --tokens 384 --analyses first_order kl_shares --write
    python -m benchmarks.planned --table        # only writes the table of docs/performance_data.md

The estimate was fitted to the sizes of `FITTED`. Those of `HELD_OUT` have other widths, depths and
numbers of heads, and were measured afterwards.

Each peak is measured in a forked process (`benchmarks/memory.py`). What a run of eight tokens adds
there, which is mostly pages that a fork copies, is taken off. This runs on Linux only. The peaks
are stored in docs/planned.json; the table beside them has what the planner says today.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypedDict

import torch
import transformers as hf

import lens_lora as ll
from benchmarks import known_shapes, marks, memory
from benchmarks.measuring import WORDS, tokenizer_of_words
from lens_lora.core import ModelSizes
from lens_lora.hosts.build import hooked_model
from lens_lora.hosts.planned_analyses import planned_analyses

PEAKS = memory.DOCS / "planned.json"
PAGE = memory.PAGE
TABLE = "planned"


class Size(NamedTuple):
    """The sizes of a Llama of random weights."""

    d_vocab: int
    d_head: int
    d_model: int
    d_mlp: int
    n_layers: int
    n_heads: int
    n_key_heads: int


FITTED = {
    "5M": Size(8192, 32, 128, 512, 8, 4, 2),
    "30M": Size(16384, 64, 320, 960, 15, 5, 5),
    "135M": Size(49152, 64, 576, 1536, 30, 9, 3),
}
HELD_OUT = {
    "9M": Size(12288, 64, 256, 640, 6, 4, 2),
    "40M": Size(24576, 64, 448, 1216, 12, 7, 1),
    "190M": Size(32000, 64, 768, 2560, 20, 12, 4),
    # Measured after the tangents of `kl_shares` had been fitted to the sizes above.
    "85M": Size(20480, 64, 640, 1792, 16, 10, 5),
}
SIZES = {**FITTED, **HELD_OUT}
# The linear maps of a block, each of which the adapter changes.
MODULES_OF_BLOCK = 7
MARGIN = ll.Margin(5, 9)
WORKS: dict[str, memory.Run] = {
    "first_order": lambda lens, prompts: ll.first_order(lens, prompts, MARGIN),
    "path_attribution": lambda lens, prompts: ll.path_attribution(
        lens, prompts, MARGIN, tol=1e9, max_nodes=5, progress=False
    ),
    "fact_margin": lambda lens, prompts: ll.fact_margin(lens, prompts, 5, 9, progress=False),
    "kl_shares": lambda lens, prompts: ll.kl_shares(lens, prompts, progress=False),
    "second_order": lambda lens, prompts: ll.second_order(lens, prompts, MARGIN, progress=False),
}
# Bytes of address space of a measuring process.
LIMIT = 6e10
# A run of so many tokens shows what a process takes whatever it runs.
FEW = 8


class Measured(TypedDict):
    """The measured peak of one analysis, in MiB."""

    size: str
    dtype: str
    tokens: int
    analysis: str
    mib: float


def config_of(size: Size) -> hf.LlamaConfig:
    """The configuration of a Llama of this size."""
    sizes = known_shapes.shape_options(
        hidden=size.d_model,
        inner=size.d_mlp,
        layers=size.n_layers,
        heads=size.n_heads,
        kv=size.n_key_heads,
    )
    options = {**known_shapes.LLAMA, **sizes}
    options["vocab_size"] = size.d_vocab
    options["head_dim"] = size.d_head
    return hf.LlamaConfig(**options)


def lens_of(size: str, dtype: torch.dtype) -> ll.LoraLens:
    """A lens over random weights of this size and dtype."""
    model = known_shapes.model_of(config_of(SIZES[size]), "cpu", dtype)
    modules = known_shapes.linears(model)
    hooked, _ = hooked_model(model, tokenizer_of_words(), kind="TransformerBridge")
    return ll.LoraLens(hooked, known_shapes.adapter_of(modules, 8))


def measured(
    size: str, tokens: int, dtype: torch.dtype, analyses: Sequence[str]
) -> Iterator[tuple[str, float]]:
    """Yield each analysis with its measured peak, in MiB."""
    lens = lens_of(size, dtype)
    for name in analyses:
        # This run loads what is loaded once.
        WORKS[name](lens, prompt_of(lens, FEW))
        yield name, peak_mib(lens, name, tokens) - peak_mib(lens, name, FEW)


def prompt_of(lens: ll.LoraLens, tokens: int) -> ll.results.Prompts:
    """A prompt of random ids that `tokenizer_of_words` has."""
    generator = torch.Generator().manual_seed(0)
    return lens.prompts(torch.randint(4, WORDS, (1, tokens), generator=generator))


def peak_mib(lens: ll.LoraLens, analysis: str, tokens: int) -> float:
    """The MiB that an analysis of one prompt adds in a process of its own.

    Raises:
        RuntimeError: if the analysis did not end there.
    """
    run = WORKS[analysis]
    peak = memory.peak_in_child(lens, lambda: run(lens, prompt_of(lens, tokens)), LIMIT)
    if peak.mib is None:
        raise RuntimeError(f"{analysis} of {tokens} tokens: {peak.why_not}")
    return peak.mib


def planned_mib(peak: Measured) -> float:
    """What the planner says of the analysis whose peak this is."""
    size = SIZES[peak["size"]]
    planned = ModelSizes(
        n_layers=size.n_layers,
        d_model=size.d_model,
        d_mlp=size.d_mlp,
        n_heads=size.n_heads,
        d_vocab=size.d_vocab,
        sites=MODULES_OF_BLOCK * size.n_layers,
        dtype=getattr(torch, peak["dtype"]),
    )
    plans = {plan.name: plan.peak for plan in planned_analyses(planned, peak["tokens"])}
    return plans[peak["analysis"]] / 2**20


def render(peaks: Sequence[Measured]) -> str:
    """A row for each size, dtype and length: planned over measured, and what was measured.

    Args:
        peaks: of docs/planned.json.
    """
    lines = [
        f"| size | dtype | tokens | {' | '.join(WORKS)} |",
        f"| --- | --- | --- |{' --- |' * len(WORKS)}",
    ]
    by_row: dict[tuple[str, str, int], dict[str, str]] = {}
    for peak in peaks:
        cells = by_row.setdefault((peak["size"], peak["dtype"], peak["tokens"]), {})
        ratio = planned_mib(peak) / peak["mib"]
        cells[peak["analysis"]] = f"{ratio:.2f} of {peak['mib']:,.0f}"
    order = list(SIZES)
    for size, dtype, tokens in sorted(by_row, key=lambda row: (order.index(row[0]), *row[1:])):
        cells = by_row[size, dtype, tokens]
        name = f"{size}, fitted" if size in FITTED else size
        row = [name, dtype, str(tokens), *(cells.get(work, "") for work in WORKS)]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def read() -> list[Measured]:
    """Every peak so far."""
    return json.loads(PEAKS.read_text()) if PEAKS.exists() else []


def add(peak: Measured) -> None:
    """Put a peak in the place of the one of the same size, dtype, length and analysis."""
    key = ("size", "dtype", "tokens", "analysis")
    others = [old for old in read() if any(old[name] != peak[name] for name in key)]
    PEAKS.write_text(json.dumps([*others, peak], indent=0) + "\n")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("sizes", nargs="*", choices=[[], *SIZES])
    options.add_argument("--analyses", nargs="+", choices=list(WORKS), default=list(WORKS))
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options.add_argument("--write", action="store_true", help="into docs/")
    options.add_argument("--table", action="store_true", help="only write the table")
    asked = options.parse_args()
    for size in asked.sizes:
        dtype = getattr(torch, asked.dtype)
        for name, mib in measured(size, asked.tokens, dtype, asked.analyses):
            peak = Measured(
                size=size, dtype=asked.dtype, tokens=asked.tokens, analysis=name, mib=mib
            )
            print(f"{peak} planned {planned_mib(peak):.0f}", flush=True)
            if asked.write:
                add(peak)
    if asked.write or asked.table:
        marks.write(PAGE, {TABLE: render(read())})


if __name__ == "__main__":
    main()
