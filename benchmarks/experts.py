"""Measure what a LoRA on experts costs, in a mixture shaped like Qwen3-30B-A3B with two layers.

    OMP_NUM_THREADS=1 python -m benchmarks.experts                 # a few minutes, 12 GB
    OMP_NUM_THREADS=1 python -m benchmarks.experts --hidden 256    # a smaller model

It prints the numbers that docs/performance_data.md quotes. Weights and adapter are random, in
bfloat16: only sizes matter here. F is a plain forward pass of 64 tokens, FB adds a backward pass to
the embeddings. Each work takes turns with F, and the median of the ratios is printed; the path has
four nodes. Memory is the peak that a call adds to the model, measured in a forked process, which is
why only one thread may run.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import transformers

import lens_lora as ll
from benchmarks.measuring import (
    backward_to_embeddings,
    cpu_seconds,
    plain_forward,
    random_prompts,
    tokenizer_of_words,
)
from benchmarks.memory import Run, peak_of_prompt
from lens_lora.hosts.bridged import names_by_path
from lens_lora.hosts.experts import each_shape, is_experts, stacks_of

TURNS = 5
TOKENS = 64
RANK = 8
EXPERTS = 128
# Bytes of address space of a call.
LIMIT = 20e9
DOC = 5
PRE = 9
MARGIN = ll.Margin(DOC, PRE)


def backward(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Run FB: a forward pass, and a backward pass of the margin."""

    def margin() -> torch.Tensor:
        logits = lens.run(prompts)[0, -1]
        return logits[DOC] - logits[PRE]

    backward_to_embeddings(lens, margin)


ROWS: dict[str, Run] = {
    "F": plain_forward,
    "FB": backward,
    "first_order": lambda lens, prompts: ll.first_order(lens, prompts, MARGIN),
    "first_order by expert": lambda lens, prompts: ll.first_order(
        lens, prompts, MARGIN, by="expert"
    ),
    "path_attribution": lambda lens, prompts: ll.path_attribution(
        lens, prompts, MARGIN, tol=1e9, max_nodes=5, progress=False
    ),
    "remainder": lambda lens, prompts: ll.remainder(lens, prompts, MARGIN, progress=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=2048, help="width of the residual stream")
    asked = parser.parse_args()
    torch.manual_seed(0)
    base = model_of(asked.hidden)
    weights = sum(weight.nbytes for weight in base.parameters())
    adapter = ll.Adapter.from_factors(factors_of(base))
    start = time.perf_counter()
    lens = ll.load(base, adapter, tokenizer=tokenizer_of_words())
    seconds = time.perf_counter() - start
    print(f"{weights / 2**20:,.0f} MiB of weights, {adapter}, lens in {seconds:.0f} s")
    prompts = random_prompts(lens, 1, TOKENS)
    for name, run in ROWS.items():
        ratios: list[float] = []
        for _ in range(TURNS):
            taken = cpu_seconds(lambda run=run: run(lens, prompts))
            forward = cpu_seconds(lambda: plain_forward(lens, prompts))
            ratios.append(taken / forward)
        peak = peak_of_prompt(lens, run, TOKENS, LIMIT)
        print(f"{name}: {statistics.median(ratios):.2f} F, {peak}", flush=True)


def model_of(hidden: int) -> transformers.PreTrainedModel:
    """A model of two layers of 128 experts, of which each token reaches eight."""
    config = transformers.Qwen3MoeConfig(
        num_hidden_layers=2,
        hidden_size=hidden,
        num_attention_heads=hidden // 64,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=3 * hidden,
        moe_intermediate_size=3 * hidden // 8,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        vocab_size=151_936,
        experts_implementation="eager",
        dtype=torch.bfloat16,
    )
    with torch.device("cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.02)
    return model.eval()


def factors_of(base: torch.nn.Module) -> dict[str, ll.LoRAFactors]:
    """Random factors of every stack of experts and every linear map of attention."""
    factors: dict[str, ll.LoRAFactors] = {}
    for path in names_by_path(base):
        module = base.get_submodule(path)
        if is_experts(module):
            for name in stacks_of(module):
                out, width = each_shape(module, module.get_parameter(name))
                factors[f"{path}.{name}"] = _random(out, width, experts=EXPERTS)
        elif path.endswith(("q_proj", "k_proj", "v_proj", "o_proj")):
            out, width = module.weight.shape
            factors[path] = _random(out, width, experts=0)
    return factors


def _random(outputs: int, inputs: int, experts: int) -> ll.LoRAFactors:
    """Random factors of one module, with a block of ranks for each expert.

    Args:
        outputs: of the module, or of one expert.
        inputs: likewise.
        experts: how many; 0 for a module that is no stack of experts.
    """
    rank = RANK * max(experts, 1)
    A = torch.randn(rank, inputs) / inputs**0.5
    B = 0.05 * torch.randn(outputs, rank)
    return ll.LoRAFactors(A, B, experts=experts)


if __name__ == "__main__":
    main()
