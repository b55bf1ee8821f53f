"""Measure time and peak memory on random weights in the shapes of known models, without a network.

    python -m benchmarks.known_shapes Gemma-3-270M Qwen2.5-0.5B --ranks 1 16 64 --write
    python -m benchmarks.known_shapes Qwen2.5-7B Qwen2.5-14B --device cuda --dtype bfloat16 --write

1. A model of each shape is made in the given dtype and on the given device, where its weights are
   drawn, so there is no second copy of them. A LoRA of random factors changes every linear module
   of its blocks.
2. Each work runs once, between two plain forward passes (F) of the same tokens. Its time is divided
   by their mean. It is processor time on the CPU, and wall-clock time on a GPU. Its peak is the
   memory beyond the model, the adapter and the lens: resident memory on the CPU, what torch
   allocates on a GPU.
3. With --write the cells go into docs/shapes.json, and the tables of docs/performance_data.md are
   made from it.
4. With --sizes nothing is run: the memory of every shape's weights and factors is counted, without
   making them, and written into the same files.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as hf

import lens_lora as ll
from benchmarks.marks import put_in
from benchmarks.measuring import (
    backward_to_embeddings,
    cpu_seconds,
    forget_peak,
    plain_forward,
    resident_mib,
    tokenizer_of_words,
)
from lens_lora.core.function.forward import read_value
from lens_lora.hosts.build import hooked_model

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "shapes.json"
PAGE = DOCS / "performance_data.md"
# What makes two rows the same.
KEY = ("machine", "dtype", "shape", "rank")
Row = dict[str, Any]
# Options of a configuration of transformers.
Options = dict[str, Any]
# The number of tokens of the prompt, of the response after it, and of the longest text of a model.
PROMPT = 64
RESPONSE = 512
CONTEXT = 2048
# The tokens whose margin is read.
DOC = 5
PRE = 9
MARGIN = ll.Margin(DOC, PRE)
# Bits of a weight in NF4: 4 of its own, a scale of 8 bits for every 64 weights, and one of 32 bits
# for every 256 of these scales.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
QWEN: Options = {
    "max_position_embeddings": CONTEXT,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}


def shape_options(hidden: int, inner: int, layers: int, heads: int, kv: int) -> Options:
    """The options of a configuration that give its shape."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
    }


UNTIED: Options = {**QWEN, "tie_word_embeddings": False, "vocab_size": 152064}
LLAMA: Options = {
    **QWEN,
    "vocab_size": 128256,
    "rope_theta": 5e5,
    "rms_norm_eps": 1e-5,
    "head_dim": 64,
}
GEMMA: Options = {**QWEN, "vocab_size": 262144, "head_dim": 256, "sliding_window": 512}
SHAPES: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "Gemma-3-270M": lambda: hf.Gemma3TextConfig(**GEMMA, **shape_options(640, 2048, 18, 4, 1)),
    "Qwen2.5-0.5B": lambda: hf.Qwen2Config(**QWEN, **shape_options(896, 4864, 24, 14, 2)),
    "Llama-3.2-1B": lambda: hf.LlamaConfig(**LLAMA, **shape_options(2048, 8192, 16, 32, 8)),
    "Qwen2.5-1.5B": lambda: hf.Qwen2Config(**QWEN, **shape_options(1536, 8960, 28, 12, 2)),
    "Qwen2.5-7B": lambda: hf.Qwen2Config(**UNTIED, **shape_options(3584, 18944, 28, 28, 4)),
    "Qwen2.5-14B": lambda: hf.Qwen2Config(**UNTIED, **shape_options(5120, 13824, 48, 40, 8)),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """A call on a prompt of `PROMPT` tokens.

    Attributes:
        name: its column.
        run: the call, of the lens, the ids of the prompt and the ids of the response.
        reads_response: whether it runs on the response of `RESPONSE` tokens as well.
    """

    name: str
    run: Callable[[ll.LoraLens, torch.Tensor, torch.Tensor], object]
    reads_response: bool = False


def backward(lens: ll.LoraLens, ids: torch.Tensor, response: torch.Tensor) -> None:
    """Run FB: a forward and a backward pass of the base, down to the embeddings."""
    del response
    reading = MARGIN.reading(lens.model, lens.prompts(ids))
    backward_to_embeddings(lens, lambda: read_value(lens, reading).sum())


WORKS = [
    Work("FB", backward),
    Work("first_order", lambda lens, ids, _: ll.first_order(lens, ids, MARGIN)),
    Work("logit_shift, jointly", lambda lens, ids, _: ll.logit_shift(lens, ids, by_site=False)),
    Work(
        "patch_sites, by layer",
        lambda lens, ids, _: ll.patch_sites(
            lens, ids, MARGIN, "leave_one_out", group="layer", progress=False
        ),
    ),
    Work(
        "first_order of a response",
        lambda lens, ids, said: ll.first_order(lens, ids, ll.AnswerLogProb(said)),
        reads_response=True,
    ),
    Work("fact_margin", lambda lens, ids, _: ll.fact_margin(lens, ids, DOC, PRE, progress=False)),
]


def model_of(config: hf.PretrainedConfig, device: str, dtype: torch.dtype) -> hf.PreTrainedModel:
    """A model of this shape, whose random weights are drawn on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = hf.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="eager"
        )
    model.config.architectures = [type(model).__name__]
    return model.eval().requires_grad_(False)


def linears(model: hf.PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Path → (out, in) of every linear module of the blocks."""
    return {
        path: tuple(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in path
    }


def size_of(shape: str) -> dict[str, float | str]:
    """Count the weights in GiB by dtype, and the float32 factors of rank 16 in MiB."""
    model = model_of(SHAPES[shape](), "meta", torch.bfloat16)
    # A tied weight is one parameter under two names.
    weights = {id(weight): weight.numel() for weight in model.parameters()}
    of_model = sum(weights.values())
    modules = linears(model)
    in_linears = sum(outputs * inputs for outputs, inputs in modules.values())
    per_rank = sum(outputs + inputs for outputs, inputs in modules.values())
    # The weights outside linear modules of blocks stay in bfloat16.
    bytes_in_4_bit = in_linears * NF4_BITS / 8 + 2 * (of_model - in_linears)
    return {
        "shape": shape,
        "sites": len(modules),
        "float32": 4 * of_model / 2**30,
        "bfloat16": 2 * of_model / 2**30,
        "4 bit": bytes_in_4_bit / 2**30,
        "rank 16": 4 * 16 * per_rank / 2**20,
    }


def adapter_of(modules: dict[str, tuple[int, int]], rank: int) -> ll.Adapter:
    """Random factors on each module, about a hundredth of its weight."""
    generator = torch.Generator().manual_seed(1)
    factors: dict[str, ll.LoRAFactors] = {}
    for path, (outputs, inputs) in modules.items():
        A = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        B = torch.randn(outputs, rank, generator=generator) * 1e-2 / rank**0.5
        factors[path] = ll.LoRAFactors(A, B, 1.0)
    return ll.Adapter.from_factors(factors)


def measure(lens: ll.LoraLens, works: list[Work]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield each work's name, with its time in F, its peak in MiB, and the milliseconds of an F."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(4, 1024, (1, PROMPT + RESPONSE), generator=generator)
    ids = text[:, :PROMPT]
    response = text[0, PROMPT:]
    # Libraries load some things at the first run; none of the measured runs is that one.
    backward(lens, ids[:, :8], response)
    for work in works:
        prompts = lens.prompts(text if work.reads_response else ids)
        forward = functools.partial(plain_forward, lens, prompts)
        before = seconds(lens, forward)
        with Peak(lens.device) as peak:
            taken = seconds(lens, functools.partial(work.run, lens, ids, response))
        after = seconds(lens, forward)
        seconds_of_f = statistics.mean([before, after])
        yield work.name, {"F": taken / seconds_of_f, "MiB": peak.mib, "ms": 1e3 * seconds_of_f}


def seconds(lens: ll.LoraLens, run: Callable[[], object]) -> float:
    """The seconds of a run: processor time on the CPU, wall-clock time on a GPU."""
    if lens.device.type != "cuda":
        return cpu_seconds(run)
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class Peak:
    """A context that measures how much memory its block adds at most.

    Attributes:
        mib: that memory in MiB, once the block is left.
    """

    mib = 0.0

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def __enter__(self) -> Peak:
        if self._on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 2**20
        else:
            gc.collect()
            self._before = forget_peak()
        return self

    def __exit__(self, *error: object) -> None:
        if self._on_gpu:
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            peak = resident_mib("VmHWM")
        self.mib = peak - self._before


def machine(device: str) -> str:
    """The card, or the processor's kind and how many threads were used."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"CPU, {platform.machine()}, threads: {torch.get_num_threads()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--sizes", action="store_true", help="count and write those of every shape")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--works", nargs="+", choices=[work.name for work in WORKS])
    parser.add_argument("--write", action="store_true", help="into docs/shapes.json and .md")
    options = parser.parse_args()
    if options.sizes:
        add_sizes([size_of(shape) for shape in SHAPES])
        return
    for row in measured_rows(options):
        print(in_words(row), flush=True)
        if options.write:
            add(row)


def measured_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Measure each shape, rank and work, and yield its row as soon as it is there."""
    works = [work for work in WORKS if not options.works or work.name in options.works]
    for shape in options.shapes:
        model = model_of(SHAPES[shape](), options.device, getattr(torch, options.dtype))
        modules = linears(model)
        hooked, _ = hooked_model(model, tokenizer_of_words(), kind="TransformerBridge")
        weights = mib_of(model)
        for rank in options.ranks:
            lens = ll.LoraLens(hooked, adapter_of(modules, rank))
            for name, cell in measure(lens, works):
                yield {
                    "shape": shape,
                    "rank": rank,
                    "sites": len(lens.sites),
                    "weights": weights,
                    "machine": machine(options.device),
                    "dtype": options.dtype,
                    "cells": {name: cell},
                }


def mib_of(model: torch.nn.Module) -> float:
    """MiB of a model's weights, in which tied weights count once."""
    sizes = {weight.data_ptr(): weight.nbytes for weight in model.parameters()}
    return sum(sizes.values()) / 2**20


# --- The tables


def add(row: Row) -> None:
    """Join cells to those of the same machine, dtype, shape and rank; render the page.

    Args:
        row: of `measured_rows`.
    """
    stored = read()
    others: list[Row] = []
    cells = row["cells"]
    for old in stored["rows"]:
        is_same = all(old[name] == row[name] for name in KEY)
        if is_same:
            cells = {**old["cells"], **cells}
        else:
            others.append(old)
    joined = _rounded({**row, "cells": cells})
    _write({**stored, "rows": [*others, joined]})


def add_sizes(sizes: list[Row]) -> None:
    """Store what the weights take; render the page.

    Args:
        sizes: of every shape.
    """
    _write({**read(), "sizes": [_rounded(size) for size in sizes]})


def _write(stored: dict[str, list[Row]]) -> None:
    """Store the numbers, and render the page."""
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), stored), encoding="utf-8")


def read() -> dict[str, list[Row]]:
    """Every row so far, and the sizes."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"sizes": [], "rows": []}


def _rounded(value: Any) -> Any:
    """Round every number of nested dictionaries to three digits."""
    if isinstance(value, dict):
        return {key: _rounded(below) for key, below in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def render(text: str, stored: dict[str, list[Row]]) -> str:
    """The page with its tables put in: sizes, one for each machine and dtype, and what was not run.

    Args:
        text: the page.
        stored: docs/shapes.json.
    """
    rows = stored["rows"]
    parts: list[str] = []
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["machine"], row["dtype"]), []).append(row)
    for (machine_name, dtype), group in groups.items():
        parts += [f"**{dtype} on {machine_name}**\n", _table(group)]
    parts.append(not_run(rows, [size["shape"] for size in stored["sizes"]]))
    return put_in(text, {"sizes": sizes_table(stored["sizes"]), "shapes": "\n".join(parts)})


def sizes_table(sizes: list[Row]) -> str:
    """Weights and factors, counted.

    Args:
        sizes: of docs/shapes.json.
    """
    head = ["model", "sites", "float32, GiB", "bfloat16, GiB", "4 bit, GiB", "LoRA of rank 16, MiB"]
    columns = ("float32", "bfloat16", "4 bit", "rank 16")
    lines: list[list[str]] = []
    for size in sizes:
        numbers = [f"{size[column]:.3g}" for column in columns]
        lines.append([size["shape"], str(size["sites"]), *numbers])
    return _markdown(head, lines)


def _table(rows: list[Row]) -> str:
    """A row for each shape and rank, a column for each work."""
    every_work: list[str] = []
    for row in rows:
        every_work += row["cells"]
    works = list(dict.fromkeys(every_work))
    head = ["model", "weights, MiB", "rank", *works]
    lines: list[list[str]] = []
    for row in sorted(rows, key=lambda row: (row["weights"], row["rank"])):
        cells = [_cell(row["cells"].get(work)) for work in works]
        lines.append([row["shape"], f"{row['weights']:.0f}", str(row["rank"]), *cells])
    return _markdown(head, lines)


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    below_head = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, below_head, *lines]) + "\n"


def _cell(cell: dict[str, float] | None) -> str:
    """Time and memory of a work, as a cell."""
    return "not run" if cell is None else f"{cell['F']:.1f} F, {cell['MiB']:.0f}"


def in_words(row: Row) -> str:
    """A row for the terminal.

    Args:
        row: of `measured_rows`.
    """
    cells = "; ".join(f"{work} {_cell(cell)} MiB" for work, cell in row["cells"].items())
    return f"{row['shape']}, rank {row['rank']}, {row['dtype']}: {cells}"


def not_run(rows: list[Row], shapes: list[str]) -> str:
    """Say which shapes were not run, and whether nothing was run on a GPU.

    Args:
        rows: of docs/shapes.json.
        shapes: every shape.
    """
    was_run = {row["shape"] for row in rows}
    missing = ", ".join(shape for shape in shapes if shape not in was_run)
    sentences: list[str] = []
    if missing:
        sentences.append(f"Not run: {missing}.")
    if all(row["machine"].startswith("CPU") for row in rows):
        sentences.append("Nothing was run on a GPU; the second command does it.")
    return " ".join(sentences) + "\n"


if __name__ == "__main__":
    main()
