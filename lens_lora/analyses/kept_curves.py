"""Shares of the shift that are kept or left as a ranking is cut off: the runs behind the curves.

For each order of the sites and each count k, one run with the first k on and the others off, and
one with the first k off and the others on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.analyses.rankings import switched_on
from lens_lora.arguments import numbers_of
from lens_lora.engine.asked import Asked
from lens_lora.engine.function import readout_at
from lens_lora.errors import ArgumentError

__all__ = ["counts_of", "mean_of_draws", "moved_by"]

_FRACTIONS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def counts_of(given: Sequence[float] | None, sites: int) -> tuple[int, ...]:
    """How many sites each fraction is, without repeats: 0, 1 and all of them among them.

    Args:
        given: fractions; None for the usual ones.
        sites: their number.

    Raises:
        ArgumentError: a fraction outside 0 to 1.
    """
    fractions = _FRACTIONS if given is None else numbers_of("fractions", given)
    for fraction in fractions:
        if not 0 <= fraction <= 1:
            raise ArgumentError(f"fraction {fraction:g}: expected numbers from 0 to 1.")
    return tuple(sorted({0, 1, sites, *(max(1, round(f * sites)) for f in fractions if f)}))


def moved_by(
    asked: Asked,
    orders: Int[Tensor, "method batch site"],
    counts: tuple[int, ...],
    progress: bool,
) -> tuple[Tensor, Tensor]:
    """g − g(0) where the top is kept, and where it is dropped: [method, batch, count] each.

    Args:
        asked: what is run.
        orders: indices of each prompt's sites, the first ranked first.
        counts: how many are kept or dropped, from none to all.
        progress: show a bar.
    """
    base, adapted = asked.ends.cpu().double()
    inner = counts[1:-1]
    ends = (torch.zeros_like(base), adapted - base)
    if inner:
        on = torch.stack([switched_on(order, inner) for order in orders])
        gates = torch.stack([on, 1 - on]).movedim(2, 0)  # batch, keep or drop, method, count, site
        flat, what = gates.flatten(1, 3), "keep and drop"
        found = readout_at(asked.lens, asked.reading, flat, progress=progress, what=what)
        moved = found.cpu().double().view(gates.shape[:-1]) - base[:, None, None, None]
    else:
        moved = base.new_zeros(len(base), 2, len(orders), 0)
    both: list[Tensor] = []
    for which, (first, last) in enumerate((ends, ends[::-1])):
        sides = [end[:, None, None].expand(-1, len(orders), 1) for end in (first, last)]
        curve = torch.cat([sides[0], moved[:, which], sides[1]], -1)
        both.append(curve.movedim(1, 0))
    return both[0], both[1]


def mean_of_draws(
    curves: Float[Tensor, "order *rest"], named: int
) -> Float[Tensor, "method *rest"]:
    """The named orders' curves, and the mean of the random ones after them.

    Args:
        curves: of every order.
        named: how many of them are not random.
    """
    if len(curves) == named:
        return curves
    return torch.cat([curves[:named], curves[named:].mean(0, keepdim=True)])
