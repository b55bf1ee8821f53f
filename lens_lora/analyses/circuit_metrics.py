"""CPR and CMD: how well a ranking keeps the shift of prompts held out, as MIB scores it.

1. Over the prompts judged, a ratio of means: f(k) = mean s(g(e_T) − g(0)) / mean s(g(1) − g(0)), T
   the first int(k·S) sites of the ranking, s the sign of the prompt's shift; no site, f = 0. MIB
   has no s: its readouts all move one way. Without it, shifts of two signs would cancel.
2. CPR = ∫ f dk, ranked by signed score: higher is better. CMD = ∫ |1 − f| dk, ranked by magnitude:
   lower is better. The trapezoid rule over MIB's ten sizes, in linear k.

Source: Mueller et al., "MIB: A Mechanistic Interpretability Benchmark" (arXiv 2504.13151).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.analyses.rankings import switched_on
from lens_lora.engine.asked import Asked
from lens_lora.engine.function import gated_readout, readout_at
from lens_lora.results.measured import SIGMAS

__all__ = ["MIB_SIZES", "Scored", "scored"]

MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Scored(NamedTuple):
    """Of each order: CPR of the signed one, CMD of that by magnitude, and f of the signed one."""

    cpr: Float[Tensor, "order"]
    cmd: Float[Tensor, "order"]
    kept: Float[Tensor, "order size"]


def scored(
    asked: Asked,
    signed: Int[Tensor, "order batch site"],
    by_magnitude: Int[Tensor, "order batch site"],
    *,
    progress: bool,
) -> Scored:
    """CPR and CMD of orders of the sites, on the prompts asked about.

    Cost: 2 forward passes per order and size between no site and all, batched; orders that agree on
    their first sites share the pass.

    NaN where the mean of |shift| is within three mean noise floors.

    Args:
        asked: the prompts and the readout that the orders are judged on.
        signed, by_magnitude: of each order, indices of each prompt's sites, first ranked first.
        progress: show a bar.
    """
    sites = signed.shape[-1]
    counts = [int(size * sites) for size in MIB_SIZES]
    inner = tuple(sorted({count for count in counts if 0 < count < sites}))
    base, adapted = asked.ends.cpu().double()
    size, noise = (adapted - base).abs().mean(), asked.noise_floor.cpu().double().mean()
    moved = _moved(asked, torch.cat([signed, by_magnitude]), inner, progress)
    nothing = moved.new_zeros(len(moved), 1)
    known = torch.cat([nothing, moved / size, nothing + 1], 1)
    every = (0, *inner, sites)
    shares = known[:, [every.index(count) for count in counts]]
    if size <= SIGMAS * noise:
        shares = torch.full_like(shares, float("nan"))
    sizes = torch.tensor(MIB_SIZES, dtype=torch.float64)
    kept, matched = shares.split([len(signed), len(by_magnitude)])
    cmd = torch.trapezoid((1 - matched).abs(), sizes)
    return Scored(torch.trapezoid(kept, sizes), cmd, kept)


def _moved(
    asked: Asked,
    orders: Int[Tensor, "order batch site"],
    counts: tuple[int, ...],
    progress: bool,
) -> Float[Tensor, "order count"]:
    """The mean over prompts of g(e_T) − g(0), each in the direction of its own shift."""
    if not counts:
        return torch.zeros(len(orders), 0, dtype=torch.float64)
    on = torch.stack([switched_on(order, counts) for order in orders], 1).flatten(1, 2)
    found = _of_distinct(asked, on, progress).cpu().double()
    base, adapted = asked.ends.cpu().double()[..., None]
    moved = (found - base) * (adapted - base).sign()
    return moved.mean(0).view(len(orders), len(counts))


def _of_distinct(
    asked: Asked, gates: Float[Tensor, "batch point site"], progress: bool
) -> Float[Tensor, "batch point"]:
    """g at each prompt's gate vectors; where all prompts have the same ones, each is run once."""
    lens, reading, what = asked.lens, asked.reading, "CPR and CMD"
    if not bool((gates == gates[:1]).all()):
        return readout_at(lens, reading, gates, progress=progress, what=what)
    once, which = torch.unique(gates[0], dim=0, return_inverse=True)
    return gated_readout(lens, reading, once, progress=progress, what=what)[:, which]
