"""Two scores of a circuit benchmark, CPR and CMD, for orders of the sites on held-out prompts.

    CPR = ∫ f dk, ranked by signed score: higher is better
    CMD = ∫ |1 − f| dk, ranked by magnitude: lower is better

    f(k) = mean s(g(e_T) − g(0)) / mean s(g(1) − g(0)),   T the first int(k·S) sites

1. f is a ratio of means over the prompts that are judged, and 0 for no site.
2. The sign s is that of the prompt's shift: without it, shifts of two signs would cancel. (MIB has
   no s, as all its readouts move one way.)
3. The integrals are taken by the trapezoid rule over MIB's ten sizes, in linear k.

Source: Mueller et al., "MIB: A Mechanistic Interpretability Benchmark" (arXiv 2504.13151).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.core import SIGMAS, Function

# The shares of all sites at which the benchmark runs circuits.
MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

Orders = Int[Tensor, "order batch site"]


class Scored(NamedTuple):
    """The scores of several orders of the sites.

    Attributes:
        cpr: CPR of each order by signed score.
        cmd: CMD of each order by magnitude.
        kept: f of each order by signed score, at MIB's sizes.
    """

    cpr: Float[Tensor, " order"]
    cmd: Float[Tensor, " order"]
    kept: Float[Tensor, "order size"]


def scored(g: Function, signed: Orders, by_magnitude: Orders) -> Scored:
    """CPR and CMD of orders of the sites, on the prompts of g.

    Cost: two forward passes per order and size between no site and all, batched; orders that agree
    on their first sites share the pass.

    NaN where the mean of |shift| is within three mean noise floors.

    Args:
        g: the function of the prompts that are judged on.
        signed: orders by signed score.
        by_magnitude: the same rankings, by magnitude.
    """
    sites = signed.shape[-1]
    base, adapted = g.ends.cpu().double()
    size = (adapted - base).abs().mean()
    noise = g.floor.cpu().double().mean()
    counts = [int(share * sites) for share in MIB_SIZES]
    inner = sorted({count for count in counts if 0 < count < sites})
    mean_shifts = _mean_moved(g, torch.cat([signed, by_magnitude]), inner)

    # f is 0 for no site and 1 for all of them; several of MIB's sizes may be the same count.
    zeros = mean_shifts.new_zeros(len(mean_shifts), 1)
    ones = mean_shifts.new_ones(len(mean_shifts), 1)
    f_at_counts = torch.cat([zeros, mean_shifts / size, ones], 1)
    distinct_counts = [0, *inner, sites]
    columns = [distinct_counts.index(count) for count in counts]
    f = f_at_counts[:, columns]
    if size <= SIGMAS * noise:
        f = torch.full_like(f, torch.nan)

    f_signed, f_by_magnitude = f.split([len(signed), len(by_magnitude)])
    sizes = torch.tensor(MIB_SIZES, dtype=torch.float64)
    return Scored(
        cpr=torch.trapezoid(f_signed, sizes),
        cmd=torch.trapezoid((1 - f_by_magnitude).abs(), sizes),
        kept=f_signed,
    )


def _mean_moved(g: Function, orders: Orders, counts: list[int]) -> Float[Tensor, "order count"]:
    """The mean over prompts of g(e_T) − g(0), in the direction of their shifts."""
    if not counts:
        return torch.zeros(len(orders), 0, dtype=torch.float64)
    gates = torch.stack([top_gates(order, counts) for order in orders])
    # From [order, batch, count, site] to one point for each order and count.
    points = gates.movedim(1, 2).flatten(0, 1)
    values = _values(g, points).cpu().double()
    base, adapted = g.ends.cpu().double()
    direction = (adapted - base).sign()
    moved = (values - base) * direction
    return moved.mean(1).view(len(orders), len(counts))


def _values(g: Function, gates: Float[Tensor, "point batch site"]) -> Float[Tensor, "point batch"]:
    """The values of g. Where all prompts have the same gates, each point is run once."""
    if not bool((gates == gates[:, :1]).all()):
        return g.each_prompt(gates)
    distinct, index = torch.unique(gates[:, 0], dim=0, return_inverse=True)
    return g(distinct)[index]


def random_orders(sites: int, batch: int, draws: int, seed: int) -> Int[Tensor, "draw batch site"]:
    """A random order for each draw and prompt, the same on every device."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = torch.rand(draws, batch, sites, generator=generator, dtype=torch.float64)
    return noise.argsort(-1)


def top_gates(
    order: Int[Tensor, "batch site"], counts: list[int] | tuple[int, ...]
) -> Float[Tensor, "batch count site"]:
    """Gates that are 1 at the first `count` sites of each prompt's order, and 0 at the others."""
    rank = order.argsort(-1)[:, None]
    return (rank < torch.tensor(counts, device=order.device)[:, None]).float()


def mean_of_draws(
    values: Float[Tensor, " order *rest"], named: int
) -> Float[Tensor, " method *rest"]:
    """The values of the named orders, and after them the mean over the random ones."""
    if len(values) == named:
        return values
    return torch.cat([values[:named], values[named:].mean(0, keepdim=True)])
