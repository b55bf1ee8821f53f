"""The k sites that keep most of a shift: gates, optimised and rounded, then swaps.

    maximise   kept(ε) = Σ_p s_p (g_p(ε) − g_p(0)) / Σ_p |g_p(1) − g_p(0)|,   ε ∈ {0, 1}^S, Σ ε = k

with s_p the sign of prompt p's shift: one set for all prompts, judged by the ratio of means of CPR.

1. Gates in [0, 1] with Σ ε = k start at k/S. Each step goes along the gradient (Adam), and back to
   the nearest gates that are allowed. The k largest gates after each step are a candidate, and so
   are the tops of the slopes at 0, ½ and 1, and those of rankings that the caller gives.
2. All candidates are run; swaps start from the best few. At a set's own corner the slopes say what
   adding each other site and taking out each of its own would do. The most promising exchanges, of
   one pair and of several at once, are run, and the best is taken if it keeps more, until none
   does.
3. Where there are few exchanges of one pair, all of them are run before a set is called the best.

Every value is one of an exact run at the corner itself, so none is above what is attainable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_lora.engine.asked import Asked
from lens_lora.engine.function import gated_readout
from lens_lora.engine.reverse import site_slopes

__all__ = ["Found", "Search", "best_set"]

_RATE = 0.1
_STARTS = 3
_OUTS, _INS = 4, 4
_FEW_PAIRS = 64
_ROUNDS = 40

Sets = Bool[Tensor, "set site"]


@dataclasses.dataclass(frozen=True)
class Found:
    """A set of sites, what it keeps, and where the search for it began.

    Attributes:
        members: which sites are in it.
        kept: share of the shift, all prompts together.
        start: 'gates', or the key of a ranking; with '+swaps' where exchanges improved on it.
    """

    members: Bool[Tensor, "site"]
    kept: float
    start: str


class Search:
    """kept(ε) and its gradient, and how often each was run.

    Args:
        asked: the lens, the prompts and the readout.
        steps: of the gates.
        bar: of all steps of all sizes.

    Attributes:
        forwards: forward passes of all prompts.
        gradients: forward passes with a backward pass.
    """

    def __init__(self, asked: Asked, steps: int, bar: Any) -> None:
        base, adapted = asked.ends
        self._asked = asked
        self.steps: int = steps
        self.bar: Any = bar
        self._base = base.double().cpu()
        self._signs = (adapted - base).sign().double().cpu()
        self._size = (adapted - base).abs().sum().double().cpu()
        self.sites: int = len(asked.lens.sites)
        self.forwards: int = 0
        self.gradients: int = 0

    def kept(self, gates: Float[Tensor, "point site"]) -> Float[Tensor, "point"]:
        """kept(ε) at several gate vectors. A forward pass each, batched.

        Args:
            gates: the same for every prompt.

        Raises:
            NumericsError: a non-finite readout.
        """
        found = gated_readout(
            self._asked.lens, self._asked.reading, gates, progress=False, what="sets"
        )
        self.forwards += len(gates)
        moved = (found.double().cpu() - self._base[:, None]) * self._signs[:, None]
        return moved.sum(0) / self._size

    def gradient(self, gates: Float[Tensor, "site"]) -> Float[Tensor, "site"]:
        """∂kept/∂ε. One forward and one backward pass.

        Args:
            gates: the same for every prompt.
        """
        asked = self._asked
        slopes = site_slopes(asked.lens, asked.reading, gates.to(asked.lens.gates(0.0)))
        self.gradients += 1
        return (slopes.double().cpu() * self._signs[:, None]).sum(0) / self._size


def best_set(
    search: Search,
    count: int,
    scores: Mapping[str, Float[Tensor, "site"]],
    slopes: Mapping[str, Float[Tensor, "site"]],
) -> Found:
    """The best set of so many sites that is found.

    Args:
        search: what is run.
        count: of sites in the set.
        scores: rankings that it must not fall behind, by key; the largest score first.
        slopes: the gradient at some gates, by the key of that ranking.

    Raises:
        NumericsError: a non-finite readout or slope.
    """
    every = torch.ones(search.sites, dtype=torch.bool)
    if count == search.sites:
        search.bar.update(search.steps)
        return Found(every, float(search.kept(every[None].double())[0]), "all sites")
    tops = {key: _top(score, count) for key, score in {**slopes, **scores}.items()}
    gates = _climbed(search, count)
    names = [*tops, *["gates"] * len(gates)]
    sets, which = _distinct(torch.stack([*tops.values(), *gates]))
    kept = search.kept(sets.double())
    best: Found | None = None
    for index in kept.argsort(descending=True)[:_STARTS].tolist():
        start = Found(sets[index], float(kept[index]), names[which.index(index)])
        found = _swapped(search, start)
        best = found if best is None or found.kept > best.kept else best
    assert best is not None
    return best


def _top(score: Float[Tensor, "site"], count: int) -> Bool[Tensor, "site"]:
    members = torch.zeros(len(score), dtype=torch.bool)
    members[score.argsort(descending=True, stable=True)[:count]] = True
    return members


def _distinct(sets: Sets) -> tuple[Bool[Tensor, "_set site"], list[int]]:
    """Each set once, and which of them each one given is."""
    found, which = torch.unique(sets, dim=0, return_inverse=True)
    return found, which.tolist()


def _climbed(search: Search, count: int) -> list[Bool[Tensor, "site"]]:
    """The k largest gates, after each step."""
    gates = torch.full((search.sites,), count / search.sites, dtype=torch.float64)
    adam = torch.optim.Adam([gates], lr=_RATE, maximize=True)
    found: list[Tensor] = []
    for _ in range(search.steps):
        gates.grad = search.gradient(gates)
        adam.step()
        gates.copy_(_allowed(gates, count))
        found.append(_top(gates, count))
        search.bar.update()
    return found


def _allowed(gates: Float[Tensor, "site"], count: int) -> Float[Tensor, "site"]:
    """The nearest ε with 0 ≤ ε ≤ 1 and Σ ε = k: clamp(ε + c), c by bisection."""
    low, high = -gates.max(), 1 - gates.min()
    for _ in range(60):
        middle = (low + high) / 2
        if (gates + middle).clamp(0, 1).sum() < count:
            low = middle
        else:
            high = middle
    return (gates + high).clamp(0, 1)


def _swapped(search: Search, start: Found) -> Found:
    """Exchanges that keep more, until none of those tried does."""
    best = start
    for _ in range(_ROUNDS):
        tried = _exchanges(best.members, search.gradient(best.members.double()))
        better = _best_of(search, best, tried)
        if better is None and _pairs(best.members) <= _FEW_PAIRS:
            better = _best_of(search, best, _every_pair(best.members))
        if better is None:
            return best
        best = better
    return best


def _best_of(search: Search, found: Found, tried: Sets) -> Found | None:
    kept = search.kept(tried.double())
    index = int(kept.argmax())
    if not float(kept[index]) > found.kept:
        return None
    start = f"{found.start.removesuffix('+swaps')}+swaps"
    return Found(tried[index], float(kept[index]), start)


def _exchanges(members: Bool[Tensor, "site"], slopes: Float[Tensor, "site"]) -> Sets:
    """The least of the set for the most promising outside: one pair, or the first 2, 4, 8, …."""
    outs = _ordered(slopes, members, descending=False)
    ins = _ordered(slopes, ~members, descending=True)
    most = min(len(outs), len(ins))
    tried = [_exchanged(members, outs[i, None], ins[j, None])
             for i in range(min(_OUTS, len(outs))) for j in range(min(_INS, len(ins)))]  # fmt: skip
    several = 2
    while several <= most:
        tried.append(_exchanged(members, outs[:several], ins[:several]))
        several *= 2
    return torch.stack(tried)


def _ordered(
    slopes: Float[Tensor, "site"], which: Bool[Tensor, "site"], *, descending: bool
) -> Int[Tensor, "some"]:
    order = slopes.argsort(descending=descending)
    return order[which[order]]


def _exchanged(
    members: Bool[Tensor, "site"], outs: Int[Tensor, "some"], ins: Int[Tensor, "some"]
) -> Bool[Tensor, "site"]:
    changed = members.clone()
    changed[outs], changed[ins] = False, True
    return changed


def _pairs(members: Bool[Tensor, "site"]) -> int:
    inside = int(members.sum())
    return inside * (len(members) - inside)


def _every_pair(members: Bool[Tensor, "site"]) -> Sets:
    inside, outside = members.nonzero()[:, 0], (~members).nonzero()[:, 0]
    return torch.stack([_exchanged(members, i[None], j[None]) for i in inside for j in outside])
