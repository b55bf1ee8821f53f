"""How cost grows with layers, tokens, sites and rank: models and adapters of random weights."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lens_lora as ll
from lens_lora.core.function.reverse import site_slopes
from lens_lora.hosts.build import hooked_model

READOUT = ll.Margin(5, 9)
FOLDER = tempfile.TemporaryDirectory()  # TransformerLens reads the tokenizer from it once more
LAYERS, TOKENS, SITES, RANKS = (5, 10, 20), (16, 32, 64), (1, 3, 7), (1, 8, 64)
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
    """Blocks of SmolLM2's shape, with a small vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One word for each id, from a folder, as TransformerLens loads it; nothing is tokenised."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(1024)}, unk_token="w0"))
    special = {"unk_token": "w0", "pad_token": "w1", "bos_token": "w2", "eos_token": "w3"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(FOLDER.name)
    return PreTrainedTokenizerFast.from_pretrained(FOLDER.name)


def lens_over(layers: int, sites: int = 7, rank: int = 8) -> ll.LoraLens:
    """Random updates of the first `sites` linear maps of every block."""
    hf = llama(layers)
    factors = {}
    for layer in range(layers):
        for name in LINEARS[:sites]:
            path = f"model.layers.{layer}.{name}"
            out, wide = hf.get_submodule(path).weight.shape
            A, B = torch.randn(rank, wide) / wide**0.5, torch.randn(out, rank) * 1e-2
            factors[path] = ll.LoRAFactors(A, B, 1.0)
    adapter = ll.Adapter.from_factors(factors)
    model, _ = hooked_model(hf, tokenizer())
    return ll.LoraLens(model, adapter)


def timed(works: dict[str, Callable[[], object]], turns: int = 5) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if turn:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def costs(lens: ll.LoraLens, tokens: int) -> dict[str, float]:
    """Seconds of a plain forward, of one readout's slopes and of the whole sweep."""
    prompts = lens.prompts(torch.randint(10, 1000, (1, tokens)))
    reading = READOUT.over(lens.model, prompts)

    def forward() -> None:
        with torch.no_grad():
            lens.run(prompts)

    return timed(
        {
            "F": forward,
            "one readout": lambda: site_slopes(lens, reading, lens.gates(0.0)),
            "every site's shift": lambda: ll.logit_shift(lens, prompts, progress=False),
        }
    )


def growth_tables() -> None:
    """Seconds relative to the smallest size, and the exponent of growth."""
    for what, sizes, of in (
        ("layers", LAYERS, lambda n: costs(lens_over(n), 32)),
        ("tokens", TOKENS, lambda n: costs(lens_over(10), n)),
        ("sites a block", SITES, lambda n: costs(lens_over(10, sites=n), 32)),
        ("rank", RANKS, lambda n: costs(lens_over(10, rank=n), 32)),
    ):
        _table(what, sizes, [of(size) for size in sizes])


def _table(what: str, sizes: Sequence[int], rows: list[dict[str, float]]) -> None:
    print(f"| {what} | {' | '.join(map(str, sizes))} | exponent |")
    print(f"| --- |{' --- |' * (len(sizes) + 1)}")
    for name in rows[0]:
        times = [row[name] for row in rows]
        exponent = np.polyfit(np.log(sizes), np.log(times), 1)[0]
        cells = " | ".join(f"{1e3 * t:.0f} ms" for t in times)
        print(f"| {name} | {cells} | {exponent:.2f} |", flush=True)
    print()
