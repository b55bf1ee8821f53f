"""Cost of a LoRA on experts: a mixture of the shape of Qwen3-30B-A3B, cut to two layers, bfloat16.

    OMP_NUM_THREADS=1 python benchmarks/experts.py                 # a few minutes, 12 GB
    OMP_NUM_THREADS=1 python benchmarks/experts.py --hidden 256    # a smaller one

Weights and adapter are random: only sizes matter here. F is a forward pass of 64 tokens of the
model with nothing on it, FB one with a backward pass to its embeddings. Each row is timed beside F,
in turns, and the median of the ratios is printed; the path has four nodes. Memory is the most that
a call takes beside the model, in a process of its own (one thread, as it is forked).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import transformers
from cost_growth import tokenizer
from cost_works import plain_forward
from memory import WORKS, Run, in_child, prompts

import lens_lora as ll
from lens_lora.core.adapter.factors import LoRAFactors
from lens_lora.core.model.hooks import attached
from lens_lora.core.model.kernels import each_shape, is_experts, stacks_of
from lens_lora.core.model.modules import names_by_path

TURNS, TOKENS, RANK, EXPERTS, LIMIT = 5, 64, 8, 128, 20e9
MARGIN = ll.Margin(5, 9)


def backward(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """FB, of the margin."""
    leaves: list[torch.Tensor] = []

    def start(tensor: torch.Tensor, hook: object) -> torch.Tensor:
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad(), attached(lens.model, [(lens.embedding_output, start)]):
        logits = lens.run(prompts)[0, -1]
        torch.autograd.grad(logits[5] - logits[9], leaves)


ROWS: dict[str, Run] = {
    "F": plain_forward,
    "FB": backward,
    "first_order": lambda lens, p: ll.first_order(lens, p, MARGIN),
    "first_order by expert": lambda lens, p: ll.first_order(lens, p, MARGIN, by="expert"),
    "path_attribution": lambda lens, p: ll.path_attribution(
        lens, p, MARGIN, tol=1e9, max_nodes=4, progress=False
    ),
    "remainder": lambda lens, p: ll.remainder(lens, p, MARGIN, progress=False),
}
WORKS.update(ROWS)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=2048)
    torch.manual_seed(0)
    base = model_of(parser.parse_args().hidden)
    weights = sum(p.numel() * p.element_size() for p in base.parameters())
    adapter = ll.Adapter.from_factors(factors_of(base))
    start = time.perf_counter()
    lens = ll.load(base, adapter, tokenizer=tokenizer())
    seconds = time.perf_counter() - start
    print(f"{weights / 2**20:,.0f} MiB of weights, {adapter}, lens in {seconds:.0f} s")
    rows = prompts(lens, TOKENS)
    for work in ROWS:
        ratios = [_seconds(lens, rows, work) / _seconds(lens, rows, "F") for _ in range(TURNS)]
        memory = in_child(lens, work, TOKENS, LIMIT)
        print(f"{work}: {statistics.median(ratios):.2f} F, {memory}", flush=True)


def _seconds(lens: ll.LoraLens, rows: ll.results.Prompts, work: str) -> float:
    start = time.perf_counter()
    WORKS[work](lens, rows)
    return time.perf_counter() - start


def model_of(hidden: int) -> transformers.PreTrainedModel:
    """Two layers of 128 experts, eight of which a token reaches."""
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


def factors_of(base: torch.nn.Module) -> dict[str, LoRAFactors]:
    """Random ones of every stack of experts and every linear map of attention."""
    factors: dict[str, LoRAFactors] = {}
    for path in names_by_path(base):
        module = base.get_submodule(path)
        if is_experts(module):
            for name in stacks_of(module):
                out, width = each_shape(module, module.get_parameter(name))
                factors[f"{path}.{name}"] = _random(out, width, EXPERTS)
        elif path.endswith(("q_proj", "k_proj", "v_proj", "o_proj")):
            factors[path] = _random(*module.weight.shape, 0)
    return factors


def _random(out: int, width: int, experts: int) -> LoRAFactors:
    rank = RANK * max(experts, 1)
    return LoRAFactors(
        torch.randn(rank, width) / width**0.5, 0.05 * torch.randn(out, rank), experts=experts
    )


if __name__ == "__main__":
    main()
