"""Compare what `lens-lora plan` says with measured peaks, on random weights of three sizes.

    python benchmarks/planned.py --tokens 512

Each peak is measured in a forked process (`benchmarks/memory.py`). What a run of eight tokens adds
there, which is mostly pages that a fork copies, is taken off. This runs on Linux only.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import memory
import shapes
import torch
import transformers as hf
from measuring import tokenizer_of_words

import lens_lora as ll
from lens_lora.core import ModelSizes
from lens_lora.hosts.build import hooked_model
from lens_lora.hosts.planned_analyses import planned_analyses

SIZES = {
    "5M": (8192, 32, shapes._sizes(128, 512, 8, 4, 2)),
    "30M": (16384, 64, shapes._sizes(320, 960, 15, 5, 5)),
    "135M": (49152, 64, shapes._sizes(576, 1536, 30, 9, 3)),
}
MARGIN = ll.Margin(5, 9)
QUIET = {"progress": False}
WORKS: dict[str, memory.Run] = {
    "first_order": lambda lens, prompts: ll.first_order(lens, prompts, MARGIN),
    "path_attribution": lambda lens, prompts: ll.path_attribution(
        lens, prompts, MARGIN, tol=1e9, max_nodes=5, **QUIET
    ),
    "fact_margin": lambda lens, prompts: ll.fact_margin(lens, prompts, 5, 9, **QUIET),
    "kl_shares": lambda lens, prompts: ll.kl_shares(lens, prompts, **QUIET),
    "second_order": lambda lens, prompts: ll.second_order(lens, prompts, MARGIN, **QUIET),
}
# Bytes of address space of a measuring process.
LIMIT = 6e10
# A run of so many tokens shows what a process takes whatever it runs.
FEW = 8


def lens_of(size: str) -> tuple[ll.LoraLens, ModelSizes]:
    """A lens over random weights of this size, and its sizes for the planner."""
    vocabulary, head, sizes = SIZES[size]
    options = {**shapes.LLAMA, "vocab_size": vocabulary, "head_dim": head, **sizes}
    shapes.SHAPES[size] = lambda: hf.LlamaConfig(**options)
    model = shapes.model_of(size, "cpu", torch.float32)
    modules = shapes.linears(model)
    hooked, _ = hooked_model(model, tokenizer_of_words(), kind="TransformerBridge")
    planned = ModelSizes(
        n_layers=sizes["num_hidden_layers"],
        d_model=sizes["hidden_size"],
        d_mlp=sizes["intermediate_size"],
        n_heads=sizes["num_attention_heads"],
        d_vocab=vocabulary,
        sites=len(modules),
        dtype=torch.float32,
    )
    return ll.LoraLens(hooked, shapes.adapter_of(modules, 8)), planned


def measured(size: str, tokens: int) -> Iterator[tuple[str, float, float]]:
    """Yield each analysis with its planned and its measured peak, in MiB."""
    lens, sizes = lens_of(size)
    peaks = {plan.name: plan.peak / 2**20 for plan in planned_analyses(sizes, tokens)}

    def prompts_of(lens: ll.LoraLens, batch: int, count: int) -> ll.results.Prompts:
        generator = torch.Generator().manual_seed(0)
        return lens.prompts(torch.randint(4, 1024, (batch, count), generator=generator))

    memory.random_prompts = prompts_of
    memory.WORKS.update(WORKS)
    for name, work in WORKS.items():
        work(lens, prompts_of(lens, 1, FEW))  # This run loads what is loaded once.
        mib = [_mib(memory.in_child(lens, name, count, LIMIT)) for count in (tokens, FEW)]
        yield name, peaks[name], mib[0] - mib[1]


def _mib(cell: str) -> float:
    """The number of a cell of `benchmarks/memory.py`."""
    return float(cell.removesuffix(" MiB").replace(",", ""))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("sizes", nargs="*", default=list(SIZES))
    options.add_argument("--tokens", type=int, default=512)
    asked = options.parse_args()
    print("| size | analysis | planned, MiB | measured, MiB | planned / measured |")
    print("| --- | --- | --- | --- | --- |")
    for size in asked.sizes:
        for name, planned, peak in measured(size, asked.tokens):
            cells = f"{planned:.0f} | {peak:.0f} | {planned / peak:.2f}"
            print(f"| {size} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
