"""Compare what `lens-lora plan` says with measured peaks, on random weights of several sizes.

    python benchmarks/planned.py --tokens 512
    python benchmarks/planned.py --held-out --tokens 384 --dtype bfloat16

The estimate was fitted to the sizes of `FITTED`. Those of `HELD_OUT` have other widths, depths and
numbers of heads, and were measured afterwards.

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

# Words of the vocabulary, width of a head, and the sizes of a Llama.
FITTED = {
    "5M": (8192, 32, shapes._sizes(128, 512, 8, 4, 2)),
    "30M": (16384, 64, shapes._sizes(320, 960, 15, 5, 5)),
    "135M": (49152, 64, shapes._sizes(576, 1536, 30, 9, 3)),
}
HELD_OUT = {
    "9M": (12288, 64, shapes._sizes(256, 640, 6, 4, 2)),
    "40M": (24576, 64, shapes._sizes(448, 1216, 12, 7, 1)),
    "190M": (32000, 64, shapes._sizes(768, 2560, 20, 12, 4)),
}
SIZES = {**FITTED, **HELD_OUT}
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


def lens_of(size: str, dtype: torch.dtype) -> tuple[ll.LoraLens, ModelSizes]:
    """A lens over random weights of this size and dtype, and its sizes for the planner."""
    vocabulary, head, sizes = SIZES[size]
    options = {**shapes.LLAMA, "vocab_size": vocabulary, "head_dim": head, **sizes}
    shapes.SHAPES[size] = lambda: hf.LlamaConfig(**options)
    model = shapes.model_of(size, "cpu", dtype)
    modules = shapes.linears(model)
    hooked, _ = hooked_model(model, tokenizer_of_words(), kind="TransformerBridge")
    planned = ModelSizes(
        n_layers=sizes["num_hidden_layers"],
        d_model=sizes["hidden_size"],
        d_mlp=sizes["intermediate_size"],
        n_heads=sizes["num_attention_heads"],
        d_vocab=vocabulary,
        sites=len(modules),
        dtype=dtype,
    )
    return ll.LoraLens(hooked, shapes.adapter_of(modules, 8)), planned


def measured(size: str, tokens: int, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """Yield each analysis with its planned and its measured peak, in MiB."""
    lens, sizes = lens_of(size, dtype)
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
    options.add_argument("sizes", nargs="*", choices=[[], *SIZES])
    options.add_argument("--held-out", action="store_true", help="the sizes of HELD_OUT")
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    asked = options.parse_args()
    print("| size | analysis | planned, MiB | measured, MiB | planned / measured |")
    print("| --- | --- | --- | --- | --- |")
    chosen = asked.sizes or list(HELD_OUT if asked.held_out else FITTED)
    for size in chosen:
        for name, planned, peak in measured(size, asked.tokens, getattr(torch, asked.dtype)):
            cells = f"{planned:.0f} | {peak:.0f} | {planned / peak:.2f}"
            print(f"| {size} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
