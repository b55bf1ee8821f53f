"""Measure what a batch saves: the time of a prompt in it, beside that of one alone.

A pass over few tokens mostly reads weights and runs Python, which a batch does once. What already
fills a pass by itself, as interventions on many sites do, gains little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import lens_lora as ll
from benchmarks.measuring import MARGIN, median_seconds, plain_backward, plain_forward, text_prompts

__all__ = ["batch_table"]

Run = Callable[[ll.LoraLens, ll.results.Prompts], object]
WORKS: dict[str, Run] = {
    "F": plain_forward,
    "FB": plain_backward,
    "first_order": lambda lens, prompts: ll.first_order(lens, prompts, MARGIN, progress=False),
    "a bank": lambda lens, prompts: ll.bank(lens.model, prompts, MARGIN, progress=False),
    "edges": lambda lens, prompts: ll.edges(lens, prompts, MARGIN, progress=False),
    "path_attribution": lambda lens, prompts: ll.path_attribution(
        lens, prompts, MARGIN, progress=False
    ),
    "kl_shares": lambda lens, prompts: ll.kl_shares(lens, prompts, progress=False),
    "fact_margin": lambda lens, prompts: ll.fact_margin(
        lens, prompts, MARGIN.doc, MARGIN.pre, progress=False
    ),
    "patch_sites, all sites": lambda lens, prompts: ll.patch_sites(
        lens, prompts, MARGIN, "add_one", progress=False
    ),
}


def batch_table(lens: ll.LoraLens, batch: int, lengths: Sequence[int], turns: int) -> None:
    """Print how many times less a prompt takes in a batch than alone.

    Args:
        lens: over the embedded model.
        batch: how many prompts it has.
        lengths: tokens of the prompts, of each column.
        turns: of each work.
    """
    columns = [gains(lens, batch, tokens, turns) for tokens in lengths]
    turned = f"medians of {turns} turns after one that is not counted" if turns > 1 else "each once"
    print(f"The time of one prompt over that of a prompt in a batch of {batch}, {turned}.\n")
    print(f"| work | {' | '.join(f'{tokens} tokens' for tokens in lengths)} |")
    print(f"| --- |{' --- |' * len(lengths)}")
    for name in WORKS:
        cells = " | ".join(f"{gain[name]:.1f}" for gain in columns)
        print(f"| {name} | {cells} |", flush=True)


def gains(lens: ll.LoraLens, batch: int, tokens: int, turns: int) -> dict[str, float]:
    """How many times less a prompt takes in the batch than the first one takes alone."""
    many = text_prompts(lens, batch, tokens)
    one = many.cut(0, 1)
    found: dict[str, float] = {}
    for name, work in WORKS.items():
        seconds = median_seconds(
            {
                "alone": lambda work=work: work(lens, one),
                "in a batch": lambda work=work: work(lens, many),
            },
            turns,
        )
        found[name] = batch * seconds["alone"] / seconds["in a batch"]
    return found
