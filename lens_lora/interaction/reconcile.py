"""`reconcile` leaves out modules of one adapter, so that the behaviours of several all hold.

With the adapters' gates all at one except those of left-out modules,

    held_q(ε) = Σ_p s_p (g_qp(ε) − g_qp(0)) / Σ_p |g_qp(a_q) − g_qp(0)|

is the share of behaviour q that is held. The gates a_q switch on only the adapter that was trained
for q, and s_p is the sign of that adapter's effect on prompt p. The share is 1 if the behaviour is
as strong as with its own adapter alone, and 0 if nothing is left of it.

1. Each module of one adapter is left out alone. Modules are ranked by the resulting
   Σ_q min(1, held_q), so that a behaviour that is fully held gains nothing by being stronger.
2. The first n modules of the ranking are left out, for several n, and all shares are measured. The
   set with the largest smallest share is chosen, and among equals the smallest set.
3. The set is compared with nothing left out, with the whole adapter scaled down to the strength
   whose smaller share is largest, and with random sets of as many modules.
4. All four are also measured on the held-out prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.arguments import whole, word
from lens_lora.core import (
    SIGMAS,
    Adapter,
    Evaluations,
    LoraLens,
    OfSites,
    Pictured,
    PromptsLike,
    Readout,
    alone,
    tables,
)
from lens_lora.errors import ArgumentError
from lens_lora.interaction.together import adapters_by_name, side_by_side

Question = tuple[PromptsLike, Readout]

STATES = ("nothing left out", "modules left out", "scaled down", "random modules left out")
# Strengths of the scaled adapter that are tried.
_STRENGTHS = tuple(step / 10 for step in range(11))


@final
class Reconciled(OfSites, Pictured):
    """How much of two or more behaviours holds when modules of one adapter are left out.

    `plot` shows the share that is held of each behaviour, by how many modules are left out.

    Attributes:
        left_out: the modules, by their Hugging Face paths, for
            `adapter.without_modules(*left_out)`; empty if leaving modules out does not help.
        behaviours: the name of the adapter that was trained for each behaviour.
        readouts: the label of each behaviour's readout.
        held: [state, behaviour], the shares held on the prompts of `hold`, in the order of
            `STATES`.
        held_out: [state, behaviour], the shares held on the prompts of `test`; None without them.
        sizes: the numbers of modules that were left out along the ranking.
        along: [size, behaviour], the shares held at these sizes, on the prompts of `hold`.
        strength: the strength of the adapter that was scaled down.
        sites, meta: see `OfSites`.
    """

    left_out: Annotated[tuple[str, ...], "module"]
    behaviours: Annotated[tuple[str, ...], "behaviour"]
    readouts: Annotated[tuple[str, ...], "behaviour"]
    held: Float[Tensor, "state=4 behaviour"]
    held_out: Float[Tensor, "state=4 behaviour"] | None
    sizes: Annotated[tuple[int, ...], "size"]
    along: Float[Tensor, "size behaviour"]
    strength: float

    def to_frame(self) -> pd.DataFrame:
        """One row per behaviour and state: the share held on the prompts of `hold` and `test`."""
        numbers = {"keep": self.held.T}
        if self.held_out is not None:
            numbers["keep_held_out"] = self.held_out.T
        named = {"behaviour": self.behaviours, "readout": self.readouts}
        return tables.long_table(numbers, named, {"state": STATES})


@alone
def reconcile(
    lens: LoraLens,
    adapters: Mapping[str, Adapter | str | Path],
    hold: Mapping[str, Question],
    leave_out_of: str,
    *,
    test: Mapping[str, Question] | None = None,
    draws: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> Reconciled:
    """Find modules of one adapter to leave out, so that several adapters' behaviours all hold.

    Cost: for each behaviour, a forward pass for each module of `leave_out_of` and some 40 more,
    batched; with `test`, about twenty more.

    Args:
        lens: a lens over the model; its own adapter is not used, unless it is among `adapters`.
        adapters: adapters, or their folders, by name.
        hold: the behaviour that each adapter was trained for, by the adapter's name: prompts and a
            readout that the adapter moves by itself.
        leave_out_of: the name of the adapter whose modules are left out.
        test: the same behaviours on other prompts, on which nothing is chosen.
        draws: the number of random sets of modules to compare with.
        seed: the seed of those sets.
        progress: show a bar.

    Raises:
        ArgumentError: fewer than two behaviours, a behaviour or `leave_out_of` without an adapter
            of that name, anything but a pair of prompts and a readout, or a behaviour that its own
            adapter does not move.
        AdapterError: adapters of different bases; DoRA on a module that another adapts too.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a value or derivative that is not finite.
    """
    draws = whole("draws", draws, 1)
    seed = whole("seed", seed, 0)
    named = adapters_by_name(adapters)
    word("leave_out_of", leave_out_of, tuple(named))
    of_sum = lens.with_adapter(side_by_side(named))
    behaviours = _behaviours_of(of_sum, hold, "hold", progress)
    modules = _modules_of(of_sum, leave_out_of)
    ranking = _ranking(of_sum, behaviours, modules)
    sizes = _sizes(len(ranking))
    along_ranking = torch.stack([_without(of_sum, modules, ranking[:size]) for size in sizes])
    held_along = _held(behaviours, along_ranking)
    # The first of equal sets is the smallest.
    best_size = int(held_along.amin(1).argmax())
    scaled = torch.stack([_scaled(of_sum, modules, strength) for strength in _STRENGTHS])
    best_strength = int(_held(behaviours, scaled).amin(1).argmax())
    drawn = _random_sets(of_sum, modules, sizes[best_size], draws, seed)
    nothing_left_out = along_ranking[0]
    states = (nothing_left_out, along_ranking[best_size], scaled[best_strength])
    return Reconciled(
        left_out=tuple(ranking[: sizes[best_size]]),
        behaviours=tuple(behaviours),
        readouts=tuple(behaviour.label for behaviour in behaviours.values()),
        held=_of_states(behaviours, states, drawn),
        held_out=_judged(of_sum, behaviours, test, states, drawn, progress),
        sizes=tuple(sizes),
        along=held_along,
        strength=_STRENGTHS[best_strength],
        sites=of_sum.sites,
        meta=of_sum.describe(),
    )


# --- Behaviours


class _Behaviour(NamedTuple):
    """A behaviour that an adapter was trained for, as a function g.

    Attributes:
        g: the readout on the behaviour's prompts, as a function of the gates of all sites that can
            move it.
        sites: the indices of these sites among those of all adapters; all of them, unless the
            readout is inside the model.
        own: [batch], g with this adapter alone minus g of the base.
    """

    g: Evaluations
    sites: list[int]
    own: Float[Tensor, " batch"]

    @property
    def label(self) -> str:
        """The readout's label."""
        assert self.g.readout is not None, "a behaviour has a readout"
        return self.g.readout.label

    def held(self, values: Float[Tensor, "point batch"]) -> Float[Tensor, " point"]:
        """The share of the adapter's own effect that these values of g still have."""
        base, _ = self.g.ends
        shift_towards_own = (values - base) * self.own.sign()
        return shift_towards_own.sum(1) / self.own.abs().sum()


def _behaviours_of(
    lens: LoraLens, questions: Mapping[str, Question], argument: str, progress: bool
) -> dict[str, _Behaviour]:
    """The behaviours as functions of the gates of all adapters, in two forward passes each."""
    names = {site.adapter for site in lens.sites}
    if not isinstance(questions, Mapping) or len(questions) < 2:
        raise ArgumentError(
            f"{argument}={questions!r}: expected two or more behaviours, each under the name of "
            "the adapter that was trained for it",
            remedy=f"write {argument}={{'a': (prompts, readout), 'b': (prompts, readout)}}.",
        )
    behaviours: dict[str, _Behaviour] = {}
    for name, question in questions.items():
        word(f"a name in {argument}", name, tuple(sorted(names)))
        behaviours[name] = _behaviour(lens, name, question, f"{argument}[{name!r}]", progress)
    return behaviours


def _behaviour(
    lens: LoraLens, name: str, question: Any, argument: str, progress: bool
) -> _Behaviour:
    is_pair = isinstance(question, tuple | list) and len(question) == 2
    if not is_pair or not isinstance(question[1], Readout):
        raise ArgumentError(
            f"{argument} is {question!r}; expected prompts and a readout",
            remedy="write such as (prompts, ll.Margin(' Lyon', ' Paris')).",
        )
    prompts, readout = question
    g = Evaluations(lens.function(prompts, readout, progress=progress))
    base, _ = g.ends
    of_adapter = tuple(i for i, site in enumerate(g.lens.sites) if site.adapter == name)
    (on,) = g.lens.sites.indicator({name: of_adapter})
    own = g(g.lens.gates(on)) - base
    if bool((own.abs() <= SIGMAS * g.floor).all()):
        raise ArgumentError(
            f"{argument}: {name} alone moves {readout.label} by no more than rounding, so there is "
            "no behaviour to hold",
            remedy="give prompts and a readout that this adapter was trained for.",
        )
    index_of = {site.name: index for index, site in enumerate(lens.sites)}
    return _Behaviour(g, [index_of[site.name] for site in g.lens.sites], own)


def _held(
    behaviours: Mapping[str, _Behaviour], points: Float[Tensor, "point site"]
) -> Float[Tensor, "point behaviour"]:
    """The share of each behaviour that is held at each point.

    Cost: a forward pass for each point and prompt.
    """
    held: list[Tensor] = []
    for behaviour in behaviours.values():
        values = behaviour.g(points[:, behaviour.sites])
        held.append(behaviour.held(values))
    return torch.stack(held, 1)


# --- Modules, and gates without some of them


_Modules = Mapping[str, tuple[int, ...]]


def _modules_of(lens: LoraLens, name: str) -> dict[str, tuple[int, ...]]:
    """The sites of each module of one adapter; several if q, k and v are one module."""
    modules: dict[str, tuple[int, ...]] = {}
    for index, site in enumerate(lens.sites):
        if site.adapter == name:
            path = site.module.rpartition("@")[0] or site.module
            modules[path] = (*modules.get(path, ()), index)
    return modules


def _ranking(lens: LoraLens, behaviours: Mapping[str, _Behaviour], modules: _Modules) -> list[str]:
    """The modules in order; the first is the one whose absence holds the behaviours best."""
    paths = list(modules)
    left_out_alone = torch.stack([_without(lens, modules, [path]) for path in paths])
    held = _held(behaviours, left_out_alone).clamp(max=1).sum(1)
    order = held.argsort(descending=True, stable=True)
    return [paths[index] for index in order.tolist()]


def _sizes(count: int) -> list[int]:
    """The numbers of modules to leave out: 0, 1, 2, 3, 5, 8, …; at least one module stays."""
    sizes = [0]
    step = 1
    while sizes[-1] < count - 1:
        sizes.append(min(count - 1, sizes[-1] + step))
        step = max(1, sizes[-2])
    return sizes


def _without(lens: LoraLens, modules: _Modules, paths: Sequence[str]) -> Float[Tensor, " site"]:
    """Gates that are 0 at the sites of these modules, and 1 elsewhere."""
    sites = tuple(itertools.chain.from_iterable(modules[path] for path in paths))
    (indicator,) = lens.sites.indicator({"left out": sites})
    return 1 - lens.gates(indicator)


def _scaled(lens: LoraLens, modules: _Modules, strength: float) -> Float[Tensor, " site"]:
    """Gates that are at this strength at the sites of the modules, and 1 elsewhere."""
    gates = _without(lens, modules, list(modules))
    return gates + (1 - gates) * strength


def _random_sets(
    lens: LoraLens, modules: _Modules, size: int, draws: int, seed: int
) -> Float[Tensor, "draw site"]:
    """Gates that leave out random modules, as many as the chosen set has."""
    generator = torch.Generator().manual_seed(seed)
    paths = list(modules)
    gates: list[Tensor] = []
    for _ in range(draws):
        order = torch.randperm(len(paths), generator=generator).tolist()
        drawn = [paths[index] for index in order[:size]]
        gates.append(_without(lens, modules, drawn))
    return torch.stack(gates)


# --- The comparison


def _of_states(
    behaviours: Mapping[str, _Behaviour],
    states: Sequence[Float[Tensor, " site"]],
    drawn: Float[Tensor, "draw site"],
) -> Float[Tensor, "state=4 behaviour"]:
    """The shares held in each state; for random sets it is their mean."""
    held = _held(behaviours, torch.stack(list(states)))
    of_random = _held(behaviours, drawn).mean(0, keepdim=True)
    return torch.cat([held, of_random])


def _judged(
    lens: LoraLens,
    behaviours: Mapping[str, _Behaviour],
    test: Mapping[str, Question] | None,
    states: Sequence[Float[Tensor, " site"]],
    drawn: Float[Tensor, "draw site"],
    progress: bool,
) -> Float[Tensor, "state=4 behaviour"] | None:
    """The shares held on the prompts of `test`, with the behaviours in the order of `hold`."""
    if test is None:
        return None
    held_out = _behaviours_of(lens, test, "test", progress)
    if set(held_out) != set(behaviours):
        raise ArgumentError(
            f"test has the behaviours {sorted(held_out)}, hold has {sorted(behaviours)}",
            remedy="give other prompts for the same behaviours.",
        )
    in_same_order = {name: held_out[name] for name in behaviours}
    return _of_states(in_same_order, states, drawn)
