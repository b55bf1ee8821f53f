"""A repaired adapter beside the whole one, scaled down, and beside random sets of gates.

A scaled-down adapter leaves less the less it keeps, so the two are compared at the same kept share:
at the first strength of the whole adapter, on the way up from the base, that keeps as much as the
repair. That strength is bracketed on a grid and refined by bisection; it is 1 where no strength up
to 1 keeps as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.two_adapters.goals import Gates, Goal, shares_of, values_at
from lens_lora.two_adapters.rank_gates import GateLayout

# The strengths that bracket the matched one.
_SCALES = tuple(i / 8 for i in range(9))
# How often a bracket is halved: down to a width of 1/512.
_BISECTIONS = 6

Kept = Bool[Tensor, " gate"]


@torch.no_grad()
def judged(goals: Sequence[Goal], kept: Kept, draws: int, seed: int) -> dict[str, Any]:
    """The fields of `Repair` that judge.

    Cost: 11 forward passes of every question, one for each random set, six more of those to be
    kept.

    Args:
        goals: all questions, held out or given.
        kept: which gates the repair keeps.
        draws: how many random sets of as many gates.
        seed: the seed of the random sets.
    """
    layout = goals[0].layout
    whole = layout.alive.to(kept.device, layout.lens.gate_dtype)
    along = torch.stack([shares_of(goals, values_at(goals, whole * scale)) for scale in _SCALES])
    repaired = values_at(goals, kept.to(whole))
    matched = _matched_strengths(goals, whole, along, shares_of(goals, repaired))
    scaled = [goal.values(whole * matched[goal.held_out]) for goal in goals]
    drawn: list[list[Tensor]] = []
    for gates in _random_sets(layout, kept, draws, seed):
        drawn.append(values_at(goals, gates.to(whole)))

    base = [goal.g.ends[0] for goal in goals]
    adapted = [goal.g.ends[1] for goal in goals]
    mean_of_drawn = [torch.stack(values).mean(0) for values in zip(*drawn, strict=True)]
    means: list[list[Tensor]] = []
    for state in (base, adapted, repaired, scaled, mean_of_drawn):
        pairs = zip(goals, state, strict=True)
        means.append([goal.mean(values).cpu().double() for goal, values in pairs])

    random = torch.stack([shares_of(goals, values) for values in drawn])
    shares = [shares_of(goals, values) for values in (adapted, repaired, scaled)]
    return {
        "shares": torch.stack([*shares, random.mean(0)]),
        "values": torch.tensor(means, dtype=torch.float64),
        "random": random,
        "scales": torch.tensor(_SCALES, dtype=torch.float64),
        "along": along,
        "matched": tuple(matched[held_out] for held_out in sorted(matched)),
    }


def _matched_strengths(
    goals: Sequence[Goal],
    whole: Gates,
    along: Float[Tensor, "scale question"],
    repaired: Float[Tensor, " question"],
) -> dict[bool, float]:
    """{held out or not: the strength that keeps what the repair keeps}.

    Where no question to be kept is held out, the held-out ones to be dropped are judged at the
    strength of the questions given.
    """
    matched: dict[bool, float] = {}
    for held_out in (False, True):
        kept = [i for i, goal in enumerate(goals) if goal.keep and goal.held_out == held_out]
        if not kept:
            continue
        target = float(repaired[kept].mean())
        kept_goals = [goals[i] for i in kept]
        matched[held_out] = _strength(kept_goals, whole, along[:, kept].mean(1), target)
    return {True: matched[False], **matched}


def _strength(
    goals: Sequence[Goal], whole: Gates, along: Float[Tensor, " scale"], target: float
) -> float:
    """The first strength of the whole adapter that keeps the target of these questions."""
    reached = (along >= target).tolist()
    if not any(reached):
        return 1.0
    first = reached.index(True)
    if first == 0:
        return 0.0
    low = _SCALES[first - 1]
    high = _SCALES[first]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        kept = float(shares_of(goals, values_at(goals, whole * middle)).mean())
        if kept >= target:
            high = middle
        else:
            low = middle
    return high


def _random_sets(layout: GateLayout, kept: Kept, draws: int, seed: int) -> list[Kept]:
    """Random sets of as many gates as are kept, drawn from those that move anything."""
    generator = torch.Generator().manual_seed(seed)
    alive = layout.alive.nonzero()[:, 0]
    count = int(kept.sum())
    none = torch.zeros(layout.count, dtype=torch.bool)
    sets: list[Kept] = []
    for _ in range(draws):
        order = torch.randperm(len(alive), generator=generator)
        sets.append(none.index_fill(0, alive[order[:count]], value=True))
    return sets
