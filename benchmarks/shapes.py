"""Time and peak memory on random weights in the shapes of known models; no hub is asked.

    python benchmarks/shapes.py Gemma-3-270M Qwen2.5-0.5B --ranks 1 16 64 --write
    python benchmarks/shapes.py Qwen2.5-7B Qwen2.5-14B --device cuda --dtype bfloat16 --write

1. A model of that configuration is made in the dtype and on the device that are asked for, in
   place: weights are drawn where they stay, so no second copy is held. A LoRA of random factors
   lies on every linear module of its blocks.
2. Each piece of work runs once, between two plain forward passes (F) of the same tokens, whose mean
   its time is divided by: on the CPU processor time. Its peak is memory beyond the model, the
   adapter and the lens: resident memory on the CPU, what torch allocates on a GPU.
3. With --write the cells go into docs/shapes.json, and docs/performance.md is made from it.
4. `--sizes` counts what weights and factors take, without making them.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import shapes_page
import torch
import transformers as hf
from cost_growth import tokenizer

import lens_lora as ll
from lens_lora.core.function.forward import read_value
from lens_lora.core.model.hooks import attached
from lens_lora.hosts.build import hooked_model

PROMPT, RESPONSE, CONTEXT = 64, 512, 2048
DOC, PRE = 5, 9
MARGIN = ll.Margin(DOC, PRE)
NF4_BITS = (
    4 + 8 / 64 + 32 / (64 * 256)
)  # a scale of 8 bit for 64 weights, and one of 32 for 256 of those
QUIET: dict[str, Any] = {"progress": False}
QWEN = {
    "max_position_embeddings": CONTEXT,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
    }


UNTIED = {**QWEN, "tie_word_embeddings": False, "vocab_size": 152064}
LLAMA = {**QWEN, "vocab_size": 128256, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "head_dim": 64}
GEMMA = {**QWEN, "vocab_size": 262144, "head_dim": 256, "sliding_window": 512}
SHAPES: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "Gemma-3-270M": lambda: hf.Gemma3TextConfig(**GEMMA, **_sizes(640, 2048, 18, 4, 1)),
    "Qwen2.5-0.5B": lambda: hf.Qwen2Config(**QWEN, **_sizes(896, 4864, 24, 14, 2)),
    "Llama-3.2-1B": lambda: hf.LlamaConfig(**LLAMA, **_sizes(2048, 8192, 16, 32, 8)),
    "Qwen2.5-1.5B": lambda: hf.Qwen2Config(**QWEN, **_sizes(1536, 8960, 28, 12, 2)),
    "Qwen2.5-7B": lambda: hf.Qwen2Config(**UNTIED, **_sizes(3584, 18944, 28, 28, 4)),
    "Qwen2.5-14B": lambda: hf.Qwen2Config(**UNTIED, **_sizes(5120, 13824, 48, 40, 8)),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """A call, on a prompt of `PROMPT` tokens, or with a response of `RESPONSE` after it."""

    name: str
    run: Callable[[ll.LoraLens, torch.Tensor, torch.Tensor], object]
    long: bool = False


def _backward(lens: ll.LoraLens, ids: torch.Tensor, response: torch.Tensor) -> None:
    """FB: a forward and a backward pass of the base, down to the embeddings."""
    del response
    leaves: list[torch.Tensor] = []

    def start(tensor: torch.Tensor, hook: object) -> torch.Tensor:
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    reading = MARGIN.over(lens.model, lens.prompts(ids))
    with torch.enable_grad(), attached(lens.model, [(lens.embedding_output, start)]):
        torch.autograd.grad(read_value(lens, reading).sum(), leaves)


WORKS = [
    Work("FB", _backward),
    Work("first_order", lambda lens, ids, _: ll.first_order(lens, ids, MARGIN)),
    Work("logit_shift, jointly", lambda lens, ids, _: ll.logit_shift(lens, ids, by_site=False)),
    Work(
        "patch_sites, by layer",
        lambda lens, ids, _: ll.patch_sites(
            lens, ids, MARGIN, "leave_one_out", group="layer", **QUIET
        ),
    ),
    Work(
        "first_order of a response",
        lambda lens, ids, said: ll.first_order(lens, ids, ll.AnswerLogProb(said)),
        long=True,
    ),
    Work("fact_margin", lambda lens, ids, _: ll.fact_margin(lens, ids, DOC, PRE, **QUIET)),
]


def model_of(shape: str, device: str, dtype: torch.dtype) -> hf.PreTrainedModel:
    """Random weights in place, in the dtype and on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = hf.AutoModelForCausalLM.from_config(
            SHAPES[shape](), dtype=dtype, attn_implementation="eager"
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
    """Weights in GiB by dtype, and the float32 factors of rank 16 in MiB, counted."""
    model = model_of(shape, "meta", torch.bfloat16)
    every = sum({id(p): p.numel() for p in model.parameters()}.values())
    inner = linears(model)
    quantised = sum(out * wide for out, wide in inner.values())
    per_rank = sum(out + wide for out, wide in inner.values())
    return {
        "shape": shape,
        "sites": len(inner),
        "float32": 4 * every / 2**30,
        "bfloat16": 2 * every / 2**30,
        "4 bit": (quantised * NF4_BITS / 8 + 2 * (every - quantised)) / 2**30,
        "rank 16": 4 * 16 * per_rank / 2**20,
    }


def adapter_of(modules: dict[str, tuple[int, int]], rank: int) -> ll.Adapter:
    """Random factors on each module, about a hundredth of its weight."""
    generator = torch.Generator().manual_seed(1)

    def factors(out: int, wide: int) -> ll.LoRAFactors:
        A = torch.randn(rank, wide, generator=generator) / wide**0.5
        B = torch.randn(out, rank, generator=generator) * 1e-2 / rank**0.5
        return ll.LoRAFactors(A, B, 1.0)

    return ll.Adapter.from_factors({path: factors(*shape) for path, shape in modules.items()})


def measure(lens: ll.LoraLens, works: list[Work]) -> Iterator[tuple[str, dict[str, float]]]:
    """Each work's time in F, and its peak in MiB."""
    generator = torch.Generator().manual_seed(2)
    every = torch.randint(4, 1024, (1, PROMPT + RESPONSE), generator=generator)
    ids, said = every[:, :PROMPT], every[0, PROMPT:]
    _backward(lens, ids[:, :8], said)
    for work in works:
        tokens = every if work.long else ids
        before = _seconds(lens, lambda tokens=tokens: _forward(lens, tokens))
        with Peak(lens.device) as peak:
            taken = _seconds(lens, lambda work=work: work.run(lens, ids, said))
        after = _seconds(lens, lambda tokens=tokens: _forward(lens, tokens))
        forward = statistics.mean([before, after])
        yield work.name, {"F": taken / forward, "MiB": peak.mib, "ms": 1e3 * forward}


def _forward(lens: ll.LoraLens, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        lens.run(lens.prompts(tokens))


def _seconds(lens: ll.LoraLens, run: Callable[[], object]) -> float:
    if lens.device.type != "cuda":  # processor time: other work on the machine does not count
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class Peak:
    """Memory that a block adds at its peak, in MiB."""

    mib = 0.0

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def __enter__(self) -> Peak:
        if self._on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        self._before = torch.cuda.memory_allocated() if self._on_gpu else _resident("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        now = torch.cuda.max_memory_allocated() if self._on_gpu else _resident("VmHWM")
        self.mib = (now - self._before) / 2**20


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def machine(device: str) -> str:
    """The card, or the processor's kind and how many threads were used."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"CPU, {platform.machine()}, threads: {torch.get_num_threads()}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}")
    options.add_argument("--sizes", action="store_true", help="only count, of every shape")
    options.add_argument("--ranks", type=int, nargs="+", default=[16])
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options.add_argument("--works", nargs="+", choices=[work.name for work in WORKS])
    options.add_argument("--write", action="store_true", help="into docs/shapes.json and .md")
    asked = options.parse_args()
    if asked.sizes:
        shapes_page.add_sizes([size_of(shape) for shape in SHAPES])
        return
    works = [work for work in WORKS if not asked.works or work.name in asked.works]
    for shape in asked.shapes:
        model = model_of(shape, asked.device, getattr(torch, asked.dtype))
        modules = linears(model)
        hooked, weights = hooked_model(model, tokenizer(), kind="TransformerBridge")[0], _mib(model)
        for rank in asked.ranks:
            lens = ll.LoraLens(hooked, adapter_of(modules, rank))
            row = {"shape": shape, "rank": rank, "sites": len(lens.sites), "weights": weights}
            row |= {"machine": machine(asked.device), "dtype": asked.dtype}
            for name, cell in measure(lens, works):
                print(shapes_page.line({**row, "cells": {name: cell}}), flush=True)
                if asked.write:
                    shapes_page.add({**row, "cells": {name: cell}})


def _mib(model: torch.nn.Module) -> float:
    held = {p.data_ptr(): p.nbytes for p in model.parameters()}
    return sum(held.values()) / 2**20


if __name__ == "__main__":
    main()
