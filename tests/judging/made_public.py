"""What `judging` makes public, for the tests of every result and of every call."""

from __future__ import annotations

import math
from typing import Any

import torch
from results_by_hand import HEADER, SITES
from shared_questions import MARGIN, MARGIN_OF_WORDS, PROMPT, QUIET
from torch import Tensor

import lens_lora as ll


def best_subset() -> ll.results.BestSubset:
    """Two sizes of four sites, on two prompts, of which one has no shift above the noise."""
    return ll.results.BestSubset(
        counts=(1, 2),
        members=torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]]).bool(),
        names=tuple(site.name for site in SITES),
        over="sites",
        held_out=(0,),
        kept=torch.tensor([0.5, 0.75]),
        kept_by_prompt=torch.tensor([[0.5, math.nan]] * 2),
        found_by=("gates", "first_order@0+swaps"),
        gradients=40,
        forwards=200,
        **HEADER,
    )


RESULTS = [best_subset]


# --- Calls, and the numbers that come back


def score(lens: ll.LoraLens) -> Tensor:
    """A number for each site, by which sites can be ranked."""
    return torch.arange(1.0, len(lens.sites) + 1, device="cpu")


CALLS = {
    "faithfulness": lambda lens, t: ll.faithfulness(lens, t, MARGIN, score(lens), **QUIET),
    "best_subset": lambda lens, t: ll.best_subset(
        lens, t, MARGIN, k=2, steps=2, starts=score(lens), **QUIET
    ),
    "best heads": lambda lens, t: ll.best_subset(
        lens, t, MARGIN, k=2, steps=2, over="heads", **QUIET
    ),
    "foils": lambda lens, t: torch.stack(
        [one.values for one in ll.foils(lens, t, MARGIN).values()]
    ),
    "reliability": lambda lens, t: ll.reliability(lens, t, MARGIN, **QUIET),
    "null_test": lambda lens, t: ll.null_test(lens, t, MARGIN, draws=2, **QUIET),
}


# --- Calls that show a bar


def _faithfulness_with_bar(tiny: Any, folder: Any, **options: Any) -> ll.results.Faithfulness:
    first = ll.first_order(tiny.lens, PROMPT, MARGIN_OF_WORDS)
    return ll.faithfulness(
        tiny.lens, PROMPT, MARGIN_OF_WORDS, first, greedy=True, draws=2, **options
    )


WITH_BAR = {
    "best_subset": lambda t, folder, **o: ll.best_subset(
        t.lens, PROMPT, MARGIN_OF_WORDS, k=2, steps=4, **o
    ),
    "faithfulness": _faithfulness_with_bar,
    "null_test": lambda t, folder, **o: ll.null_test(t.lens, PROMPT, MARGIN_OF_WORDS, draws=2, **o),
    "reliability": lambda t, folder, **o: ll.reliability(
        t.deep, PROMPT, MARGIN_OF_WORDS, threshold=0.99, floor=0.0, fix=True, **o
    ),
}


# --- Calls that show none, as they are short

WITHOUT_BAR = {"foils": lambda t: ll.foils(t.lens, PROMPT, MARGIN_OF_WORDS)}
