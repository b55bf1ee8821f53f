"""A repaired adapter beside the whole one, scaled down, and beside random sets of gates.

A scaled-down adapter leaves less the less it keeps, so the two are compared at the same kept share:
at the first strength of the whole adapter, on the way up from the base, that keeps as much as the
repair. That strength is bracketed on a grid and refined by bisection; it is 1 where no strength up
to 1 keeps as much.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

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


@dataclasses.dataclass(frozen=True, eq=False)
class Judgement:
    """How well a repair does: the fields of `Repair` of the same names, which describes them."""

    shares: Float[Tensor, "state=4 question"]
    values: Float[Tensor, "state_and_base=5 question"]
    random: Float[Tensor, "draw question"]
    scales: Float[Tensor, " scale"]
    along: Float[Tensor, "scale question"]
    matched: tuple[float, float]


@torch.no_grad()
def judged(goals: Sequence[Goal], kept: Kept, draws: int, seed: int) -> Judgement:
    """The repair beside the whole adapter, scaled down, and beside random sets of gates.

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
    base = [goal.g.ends[0] for goal in goals]
    adapted = [goal.g.ends[1] for goal in goals]
    repaired = values_at(goals, kept.to(whole))
    matched = _matched_strengths(goals, whole, along, shares_of(goals, repaired))
    scaled = _values_scaled(goals, whole, matched)
    drawn = [values_at(goals, gates.to(whole)) for gates in _random_sets(layout, kept, draws, seed)]

    random = torch.stack([shares_of(goals, values) for values in drawn])
    shares = [shares_of(goals, values) for values in (adapted, repaired, scaled)]
    states = (base, adapted, repaired, scaled, _mean_over_draws(drawn))
    return Judgement(
        shares=torch.stack([*shares, random.mean(0)]),
        values=torch.stack([_means_of(goals, values) for values in states]),
        random=random,
        scales=torch.tensor(_SCALES, dtype=torch.float64),
        along=along,
        matched=(matched.given, matched.held_out),
    )


def _values_scaled(
    goals: Sequence[Goal], whole: Gates, matched: _Matched
) -> list[Float[Tensor, " batch"]]:
    """The value of each question under the whole adapter at its matched strength."""
    values: list[Tensor] = []
    for goal in goals:
        strength = matched.held_out if goal.held_out else matched.given
        values.append(goal.values(whole * strength))
    return values


def _mean_over_draws(drawn: Sequence[Sequence[Tensor]]) -> list[Float[Tensor, " batch"]]:
    """The mean value of each question over the random sets, whose values are given set by set."""
    return [torch.stack(by_draw).mean(0) for by_draw in zip(*drawn, strict=True)]


def _means_of(goals: Sequence[Goal], values: Sequence[Tensor]) -> Float[Tensor, " question"]:
    """The mean of each question's readout over its prompts, in float64 on the CPU."""
    pairs = zip(goals, values, strict=True)
    return torch.stack([goal.mean(value).cpu().double() for goal, value in pairs])


class _Matched(NamedTuple):
    """The strengths of the whole adapter at which it keeps what the repair keeps.

    Attributes:
        given: on the questions given.
        held_out: on those held out.
    """

    given: float
    held_out: float


def _matched_strengths(
    goals: Sequence[Goal],
    whole: Gates,
    along: Float[Tensor, "scale question"],
    repaired: Float[Tensor, " question"],
) -> _Matched:
    """The strengths of the whole adapter that keep the repair's mean share.

    Where no question to be kept is held out, the held-out ones to be dropped are judged at the
    strength of the questions given.
    """

    def strength_on(kept: list[int]) -> float:
        target = float(repaired[kept].mean())
        kept_goals = [goals[i] for i in kept]
        return _strength(kept_goals, whole, along[:, kept].mean(1), target)

    given = [i for i, goal in enumerate(goals) if goal.keep and not goal.held_out]
    held_out = [i for i, goal in enumerate(goals) if goal.keep and goal.held_out]
    strength = strength_on(given)
    if not held_out:
        return _Matched(strength, strength)
    return _Matched(strength, strength_on(held_out))


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
