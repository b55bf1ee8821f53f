"""The cheaper mode of differentiation: a tangent for each site, or a covector for each readout.

A tangent costs one product with each weight from its site's block on; a covector one with each
weight on the way back to the first block. In passes through all blocks,

    forward mode    Σ_l share of the blocks at and after l      tangents, whatever the readouts
    reverse mode    k                                           covectors, whatever the sites

and one forward pass each. Measured, the cost of a tangent and of a covector differs by at most a
third, for short and long prompts (benchmarks/RESULTS.md); so the smaller number is cheaper.
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
    """The given mode; for 'auto' the one that takes less work for so many readouts.

    Args:
        mode: what was asked for.
        lens: the adapter over the model.
        readouts: of how many numbers the derivatives are taken.
        starts: the block in which each tangent would begin; None for a tangent of every site.

    Raises:
        ArgumentError: another mode.
    """
    word("mode", mode, get_args(Mode))
    if mode != "auto":
        return mode
    forward_passes = max(1.0, tangent_passes(lens, starts))
    return "reverse" if readouts <= forward_passes else "forward"


def tangent_passes(lens: LoraLens, starts: Sequence[int] | None = None) -> float:
    """How many passes through all blocks tangents take that begin in these blocks.

    Without `starts`: of a tangent for every site.
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
