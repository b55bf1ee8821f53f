"""Choose the cheaper mode of differentiation: a tangent for each site, or a covector a readout.

A tangent costs one product with each weight from its site's block on, and a covector one with each
weight back to the first block. Counted in passes through all blocks, they cost

    forward mode    Σ_l share of the blocks at and after l      however many readouts
    reverse mode    the number of readouts                      however many sites

besides one forward pass each. As measured, a tangent and a covector cost the same within a third,
for short and for long prompts (benchmarks/RESULTS.md), so the smaller number is cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from lens_lora.arguments import word
from lens_lora.core.model import LoraLens

Mode = Literal["auto", "forward", "reverse"]


def chosen_mode(
    mode: Mode, lens: LoraLens, readouts: int, starts: Sequence[int] | None = None
) -> Literal["forward", "reverse"]:
    """The mode that is asked for; for 'auto', the one that takes less work.

    Args:
        mode: what is asked for.
        lens: the adapter over the model.
        readouts: how many numbers are differentiated.
        starts: the block in which each tangent would begin; None for one tangent a site.

    Raises:
        ArgumentError: another mode.
    """
    word("mode", mode, get_args(Mode))
    if mode != "auto":
        return mode
    forward_passes = max(1.0, tangent_passes(lens, starts))
    return "reverse" if readouts <= forward_passes else "forward"


def tangent_passes(lens: LoraLens, starts: Sequence[int] | None = None) -> float:
    """How many passes through all blocks are taken by tangents that begin in these blocks.

    By default there is one tangent for each site.
    """
    if starts is None:
        starts = [site.layer for site in lens.sites]
    if not lens.host.grows:
        return float(len(starts))
    layers = lens.host.n_layers
    blocks_run = 0
    for start in starts:
        first_block = min(max(start, 0), layers - 1)
        blocks_run += layers - first_block
    return blocks_run / layers
