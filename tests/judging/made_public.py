"""What `judging` makes public, for the tests of every result."""

from __future__ import annotations

import math

import torch
from results_by_hand import HEADER, SITES

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
