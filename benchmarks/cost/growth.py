"""Measure how cost grows with layers, tokens, sites and rank, on models of random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lens_lora as ll
from benchmarks.measuring import WORDS, median_seconds, plain_forward, tokenizer_of_words
from lens_lora.hosts.build import hooked_model

READOUT = ll.Margin(5, 9)
# Each time is the median of this many.
TURNS = 5
# The sizes that grow.
LAYERS = (5, 10, 20)
TOKENS = (16, 32, 64)
SITES_OF_BLOCK = (1, 3, 7)
RANKS = (1, 8, 64)
# The sizes that stay fixed while another one grows.
USUAL_LAYERS = 10
USUAL_TOKENS = 32
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def llama(layers: int) -> LlamaForCausalLM:
    """A model of SmolLM2's blocks, with a small vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def lens_over(layers: int, sites: int = 7, rank: int = 8) -> ll.LoraLens:
    """A lens of random updates of the first `sites` linear maps of every block."""
    hf_model = llama(layers)
    factors: dict[str, ll.LoRAFactors] = {}
    for layer in range(layers):
        for name in LINEARS[:sites]:
            path = f"model.layers.{layer}.{name}"
            outputs, inputs = hf_model.get_submodule(path).weight.shape
            A = torch.randn(rank, inputs) / inputs**0.5
            B = torch.randn(outputs, rank) * 1e-2
            factors[path] = ll.LoRAFactors(A, B, 1.0)
    model, _ = hooked_model(hf_model, tokenizer_of_words())
    return ll.LoraLens(model, ll.Adapter.from_factors(factors))


def costs(lens: ll.LoraLens, tokens: int) -> dict[str, float]:
    """Median seconds of a plain forward, of one readout's slopes and of every site's shift."""
    prompts = lens.prompts(torch.randint(10, 1000, (1, tokens)))
    calls = {
        "F": lambda: plain_forward(lens, prompts),
        "one readout": lambda: lens.function(prompts, READOUT).slopes(),
        "every site's shift": lambda: ll.logit_shift(lens, prompts, progress=False),
    }
    return median_seconds(calls, TURNS)


def growth_tables() -> None:
    """Print a table for each size that grows."""
    tables: dict[str, tuple[Sequence[int], Callable[[int], dict[str, float]]]] = {
        "layers": (LAYERS, lambda layers: costs(lens_over(layers), USUAL_TOKENS)),
        "tokens": (TOKENS, lambda tokens: costs(lens_over(USUAL_LAYERS), tokens)),
        "sites a block": (
            SITES_OF_BLOCK,
            lambda sites: costs(lens_over(USUAL_LAYERS, sites=sites), USUAL_TOKENS),
        ),
        "rank": (RANKS, lambda rank: costs(lens_over(USUAL_LAYERS, rank=rank), USUAL_TOKENS)),
    }
    for what, (sizes, costs_of_size) in tables.items():
        print_table(what, sizes, [costs_of_size(size) for size in sizes])


def print_table(what: str, sizes: Sequence[int], rows: list[dict[str, float]]) -> None:
    """Print milliseconds at each size, and the exponent of growth."""
    print(f"| {what} | {' | '.join(map(str, sizes))} | exponent |")
    print(f"| --- |{' --- |' * (len(sizes) + 1)}")
    for name in rows[0]:
        times = [row[name] for row in rows]
        exponent, _ = np.polyfit(np.log(sizes), np.log(times), 1)
        cells = " | ".join(f"{1e3 * seconds:.0f} ms" for seconds in times)
        print(f"| {name} | {cells} | {exponent:.2f} |", flush=True)
    print()
