"""A repaired adapter beside the whole one, scaled down to the same kept share, and random sets.

1. Shares of every question at strengths of the whole adapter, from nothing to all of it.
2. On the questions given, and on those held out, the strength that keeps what the repair keeps: the
   first one on the way up, refined by bisection on exact forward passes; 1 where none up to 1 does.
3. Every question at the repaired gates, at the matched strengths, and at random sets of as many
   gates.

Cost: 11 forward passes of every question, one for each random set, six more of those to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.analyses.repair_questions import Part
from lens_lora.engine.rank_gates import GateLayout, value_at

__all__ = ["RANDOM", "STATES", "judged"]

STATES = ("whole", "repaired", "scaled", "random")
RANDOM = "seed of random sets"
_SCALES = tuple(i / 8 for i in range(9))
_BISECTIONS = 6


def judged(
    layout: GateLayout,
    parts: Sequence[Part],
    kept: Bool[Tensor, "gate"],
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """The fields of `Repair` that judge.

    Args:
        layout: of the gates.
        parts: questions of both kinds, given and held out.
        kept: the gates that are kept.
        draws: how many random sets.
        seed: of them.

    Raises:
        NumericsError: a non-finite readout.
    """
    with torch.no_grad():
        whole = layout.alive.to(kept.device, layout.lens.gate_dtype)
        ends = [part.asked.ends for part in parts]
        along = torch.stack([_shares(layout, parts, whole * scale) for scale in _SCALES])
        repaired = _values(layout, parts, kept.to(whole))
        own = _as_shares(parts, repaired)
        matched = _matched(layout, parts, whole, along, own)
        scaled = [
            value_at(layout, part.asked.reading, whole * matched[part.held_out]) for part in parts
        ]
        sets = _random_sets(layout, kept, draws, seed)
        random = [_values(layout, parts, gates.to(whole)) for gates in sets]
        of_random = torch.stack([_as_shares(parts, values) for values in random])
        mean = [torch.stack(values).mean(0) for values in zip(*random, strict=True)]
    states = [[base for base, _ in ends], [one for _, one in ends], repaired, scaled, mean]
    values = torch.stack([_as_means(parts, state) for state in states])
    shares = torch.stack([_as_shares(parts, state) for state in states[1:4]])
    return {
        "shares": torch.cat([shares, of_random.mean(0)[None]]),
        "values": values,
        "random": of_random,
        "scales": torch.tensor(_SCALES, dtype=torch.float64),
        "along": along,
        "matched": tuple(matched[held_out] for held_out in sorted(matched)),
    }


def _matched(
    layout: GateLayout,
    parts: Sequence[Part],
    whole: Tensor,
    along: Float[Tensor, "scale question"],
    own: Float[Tensor, "question"],
) -> dict[bool, float]:
    """{held out or not: the strength that keeps what the repair keeps}; given ones' without others.

    Where only questions to be dropped are held out, they are judged at the strength of those given.
    """
    found: dict[bool, float] = {}
    for held_out in (False, True):
        which = [i for i, part in enumerate(parts) if part.keep and part.held_out == held_out]
        if which:
            found[held_out] = _strength(layout, [parts[i] for i in which], whole, along, own, which)
    found.setdefault(True, found[False])
    return found


def _strength(
    layout: GateLayout,
    keeps: Sequence[Part],
    whole: Tensor,
    along: Tensor,
    own: Tensor,
    which: Sequence[int],
) -> float:
    target = float(own[list(which)].mean())
    reached = (along[:, list(which)].mean(1) >= target).tolist()
    if not any(reached):
        return 1.0
    first = reached.index(True)
    if not first:
        return 0.0
    low, high = _SCALES[first - 1], _SCALES[first]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_enough = float(_shares(layout, keeps, whole * middle).mean()) >= target
        low, high = (low, middle) if is_enough else (middle, high)
    return high


def _random_sets(
    layout: GateLayout, kept: Tensor, draws: int, seed: int
) -> list[Bool[Tensor, "gate"]]:
    """As many gates as are kept, of those that move anything."""
    generator = torch.Generator().manual_seed(seed)
    alive = layout.alive.nonzero()[:, 0]
    sets = []
    for _ in range(draws):
        chosen = alive[torch.randperm(len(alive), generator=generator)[: int(kept.sum())]]
        sets.append(torch.zeros(layout.count, dtype=torch.bool).index_fill(0, chosen, value=True))
    return sets


def _values(layout: GateLayout, parts: Sequence[Part], gates: Tensor) -> list[Tensor]:
    return [value_at(layout, part.asked.reading, gates) for part in parts]


def _shares(layout: GateLayout, parts: Sequence[Part], gates: Tensor) -> Tensor:
    return _as_shares(parts, _values(layout, parts, gates))


def _as_shares(parts: Sequence[Part], values: Sequence[Tensor]) -> Float[Tensor, "question"]:
    pairs = zip(parts, values, strict=True)
    return torch.stack([part.share(value).cpu().double() for part, value in pairs])


def _as_means(parts: Sequence[Part], values: Sequence[Tensor]) -> Float[Tensor, "question"]:
    pairs = zip(parts, values, strict=True)
    return torch.stack([part.mean(value).cpu().double() for part, value in pairs])
