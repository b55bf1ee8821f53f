"""What each analysis costs, in plain forward passes of the same hooked model on the same tokens.

    python benchmarks/cost.py [--repeats 5]

Interleaved in one run on the embedded model and its adapter (210 sites, rank 8); medians. F is one
forward pass, FB one forward and one backward down to the embeddings.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import lens_lora as ll
from lens_lora.calculus.reverse import site_gradients
from lens_lora.demo.embedded import load_embedded
from lens_lora.demo.hooked import hooked_model, transformer_lens_version
from lens_lora.hooked.gates import attached

MARGIN = ll.Margin(" Lyon", " Paris")


def bare_backward(lens: ll.LoraLens, prompts: ll.Prompts) -> None:
    """FB: no hook but the one that makes the embedding's output a leaf."""
    leaves: list[torch.Tensor] = []

    def start(tensor, hook):
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad(), attached(lens.model, [(lens.embedding_output, start)]):
        logits = lens.run(prompts)[:, -1]
        torch.autograd.grad(MARGIN.bind(lens.model, prompts.batch)(logits).sum(), leaves)


def one_gradient(lens: ll.LoraLens, prompts: ll.Prompts) -> None:
    """The reverse pass of first_order, without the exact ends beside it."""
    reading = MARGIN.over(lens.model, prompts)
    site_gradients(lens, reading, lens.gates(0.0), lambda *visit: None)


def forward(lens: ll.LoraLens, prompts: ll.Prompts) -> None:
    with torch.no_grad():
        lens.run(prompts)


WORK: dict[str, Callable[[ll.LoraLens, ll.Prompts], object]] = {
    "F: plain forward": forward,
    "FB: plain forward and backward": bare_backward,
    "adapted forward, lens.logits": lambda lens, p: lens.logits(p),
    "first_order, the reverse pass alone": one_gradient,
    "first_order, with the exact ends": lambda lens, p: ll.first_order(lens, p, MARGIN),
    "first_order by position, head, rank": lambda lens, p: ll.first_order(
        lens, p, MARGIN, by=("position", "head", "rank")
    ),
    "logit_shift, all sites together": lambda lens, p: ll.logit_shift(lens, p, by_site=False),
    "fact_margin": lambda lens, p: ll.fact_margin(lens, p, " Lyon", " Paris", progress=False),
}
SLOW = {
    "logit_shift, every site": lambda lens, p: ll.logit_shift(lens, p, progress=False),
    "remainder, every single site": lambda lens, p: ll.remainder(
        lens, p, MARGIN, by_site=True, progress=False
    ),
}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(lens: ll.LoraLens, tokens: int, repeats: int) -> dict[str, float]:
    """Median seconds of each piece of work, interleaved."""
    ids = torch.randint(1000, 40000, (1, tokens), generator=torch.Generator().manual_seed(0))
    prompts = lens.prompts(ids)
    times: dict[str, list[float]] = {name: [] for name in (*WORK, *SLOW)}
    for turn in range(repeats + 1):
        for name, work in WORK.items():
            taken = seconds(lambda work=work: work(lens, prompts))
            if turn:
                times[name].append(taken)
    for name, work in SLOW.items():
        times[name].append(seconds(lambda work=work: work(lens, prompts)))
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=5)
    repeats = options.parse_args().repeats
    adapter = ll.load_adapter(Path(ll.__file__).parent / "demo" / "lyon_adapter")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n")
    for kind in ("HookedTransformer", "TransformerBridge"):
        try:
            model, _ = hooked_model(*load_embedded(quiet=True), kind=kind)
        except ll.ModelStateError as error:
            print(f"{kind}: {error}\n")
            continue
        lens = ll.LoraLens(model, adapter)
        rows = {tokens: measure(lens, tokens, repeats) for tokens in (8, 64)}
        print(f"{kind}, transformer-lens {transformer_lens_version()}\n")
        print("| work | 8 tokens | 64 tokens |\n| --- | --- | --- |")
        base = {tokens: times["F: plain forward"] for tokens, times in rows.items()}
        for name in rows[8]:
            cells = " | ".join(f"{rows[t][name] / base[t]:.1f} F" for t in rows)
            print(f"| {name} | {cells} |")
        print(f"\nF = {1e3 * base[8]:.0f} ms at 8 tokens, {1e3 * base[64]:.0f} ms at 64\n")


if __name__ == "__main__":
    main()
