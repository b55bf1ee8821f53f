"""`together` measures what several adapters do beyond what each of them does alone.

Let s be the gate of all modules of adapter a, and t the gate of all modules of adapter b, with all
other adapters off. The interaction of the two is

    I_ab = g(1, 1) − g(1, 0) − g(0, 1) + g(0, 0)
         = ∫₀¹ ∫₀¹ ∂²g/∂s∂t ds dt = Σ_{l∈a, m∈b} ∫₀¹ ∫₀¹ H_lm(s, t) ds dt.

The first line is exact, from four values of g. The second splits it by pairs of modules. H is the
second derivative of g (note, §6, item 4), and the integral over the plane of both gates is that of
Integrated Hessians (arXiv 2002.04138).

1. The corners take a forward pass for the base, for each adapter, for each pair, for all adapters
   except each one, and for all. Equal corners run once, so that two adapters have four.
2. To split the interaction, H is computed between groups of modules of a and of b, at the nodes of
   nested rules over the square of both gates (`interaction/square.py`). Nodes are added until all
   parts sum to I_ab, and the parts of each group sum to its share of I_ab, which slopes along its
   own gate give. Both sums may miss a share `tol` of the largest of the three shifts
   g(1, 1) − g(0, 0), g(1, 0) − g(0, 0) and g(0, 1) − g(0, 0).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, final

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.arguments import number, whole
from lens_lora.core import (
    SIGMAS,
    Adapter,
    Entries,
    Evaluations,
    Group,
    Groups,
    LoraLens,
    PromptsLike,
    Quadrature,
    Ranked,
    Readout,
    Site,
    Sites,
    alone,
    analysis,
    load_adapter,
    tables,
)
from lens_lora.errors import ArgumentError, MissingPartError
from lens_lora.interaction.square import Bounds, Split, quadrature_of, split_by_modules

# The last rule has at least this many nodes, 3 × 3.
_FEWEST_NODES = 9

_Pair = tuple[int, int]


@final
class Together(Ranked):
    """The effects of several adapters on a readout, alone and together, in the readout's units.

    `base` is g with all adapters off, and `adapted` is g with all of them on. `top` and `plot` show
    pairs of modules if the interaction was split by modules, else pairs of adapters.

    Attributes:
        adapters: the names of the adapters.
        alone: [batch, adapter], g(a) − g(0): the effect of each adapter on the base model.
        added: [batch, adapter], g(all) − g(all but a): its effect when all the others are on.
        first, second: the two adapters of each pair.
        interaction: [batch, pair], I_ab, exact; the other adapters are off.
        noise_floor: [batch], σ of an interaction from rounding alone.
        parts: [batch, pair, group, group], the interaction by groups of modules of the first and of
            the second adapter; None if it was not split.
        groups: the names of the groups, which both adapters share; an adapter without a module in a
            group has zeros there.
        nodes: the number of points in the square of both gates, for the pair that needed most; 0 if
            nothing was split.
        allowed: [batch, pair], how much the parts were allowed to miss; None if nothing was split.
        group_error: [batch, pair], the largest error of a group: its parts with all groups of the
            other adapter are compared with its share of the interaction, which slopes along its own
            gate give. None if nothing was split.
        quadrature: how the integrals were computed, over all prompts and pairs. Its `error` and
            `site_change` are the largest `completeness_error` and `group_error`, as shares of the
            largest shift of the pair; it is `met` if neither exceeds `tol` and rounding is small
            enough to tell. None if nothing was split.
        sites, base, adapted, str_tokens, readout, units, meta: see `Measured`; the name of a site
            ends in '@' and its adapter.
    """

    adapters: Annotated[tuple[str, ...], "adapter"]
    alone: Float[Tensor, "batch adapter"]
    added: Float[Tensor, "batch adapter"]
    first: Annotated[tuple[str, ...], "pair"]
    second: Annotated[tuple[str, ...], "pair"]
    interaction: Float[Tensor, "batch pair"]
    noise_floor: Float[Tensor, " batch"]
    parts: Float[Tensor, "batch pair group group"] | None = None
    groups: Annotated[tuple[str, ...], "group"] = ()
    nodes: int = 0
    allowed: Float[Tensor, "batch pair"] | None = None
    group_error: Float[Tensor, "batch pair"] | None = None
    quadrature: Quadrature | None = None

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """The exact effect of all adapters beyond the sum of what each does alone.

        For two adapters it is their interaction; for more it has those of all pairs, triples, ….
        """
        return self.shift - self.alone.sum(1)

    @property
    def completeness_error(self) -> Float[Tensor, "batch pair"]:
        """How much of each interaction the quadrature misses, |I_ab − Σ parts|.

        Raises:
            MissingPartError: the interaction was not split.
        """
        return (self.interaction - self._split.flatten(2).sum(2)).abs()

    @property
    def is_complete(self) -> Bool[Tensor, "batch pair"]:
        """Whether all parts sum to the interaction, and the parts of each group to its share.

        Both sums may miss what `tol` allows, or the rounding of the interaction if that is larger.

        Raises:
            MissingPartError: the interaction was not split.
        """
        missed = self.completeness_error
        assert self.allowed is not None, "what was split has a bound"
        assert self.group_error is not None, "and its groups were compared with their shares"
        return (missed <= self.allowed) & (self.group_error <= self.allowed)

    @property
    def _split(self) -> Float[Tensor, "batch pair group group"]:
        if self.parts is None:
            raise MissingPartError(
                "the interaction was not split by modules",
                remedy="ask for it: ll.together(…, group='kind').",
            )
        return self.parts

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and pair of adapters, or per pair of their groups of modules."""
        prompts = {"prompt": range(len(self.base))}
        pairs = {"adapter_a": self.first, "adapter_b": self.second}
        if self.parts is None:
            return tables.long_table({"value": self.interaction}, prompts, pairs)
        of_first = {"group_a": self.groups}
        of_second = {"group_b": self.groups}
        return tables.long_table({"value": self.parts}, prompts, pairs, of_first, of_second)

    def entries(self, prompt: int | None = None) -> Entries:
        """The interaction of each pair of adapters, or of groups of their modules."""
        if self.parts is None:
            labels = {"adapter_a": self.first, "adapter_b": self.second}
            values, shift = self.mean_over(prompt, self.interaction)
            return Entries(labels, values, shift, "value")
        table = self.to_frame()
        labels_of_one_prompt = table[table["prompt"] == 0]
        columns = ("adapter_a", "adapter_b", "group_a", "group_b")
        labels = {name: labels_of_one_prompt[name].tolist() for name in columns}
        values, shift = self.mean_over(prompt, self.parts.flatten(1))
        return Entries(labels, values, shift, "value")


@alone
def together(
    lens: LoraLens,
    adapters: Mapping[str, Adapter | str | Path],
    prompts: PromptsLike,
    readout: Readout,
    *,
    group: Group | None = None,
    tol: float = 1e-3,
    max_nodes: int = 441,
    progress: bool = True,
) -> Together:
    """Measure what two or more adapters do to a readout beyond what each of them does alone.

    If the parts of a split cannot meet `tol` (rounding, kinks of ReLU models, experts that switch,
    too few nodes), they are those of the last rule, and `quadrature` says what was reached and
    probably why. The interaction itself is exact.

    Cost: 4 forward passes for two adapters, at most 2 + 2k + k(k − 1)/2 for k, batched, and five
    for the noise floor at each end. If the interaction is split by groups of modules, each pair of
    adapters takes two forward and two backward passes at 3 to 63 values of each gate, and then at
    least 9 and at most `max_nodes` nodes of both gates. A node takes a forward and a backward pass,
    and two backward passes for each group in which the second adapter of the pair has modules.

    Args:
        lens: a lens over the model; its own adapter is not used, unless it is among `adapters`.
        adapters: adapters, or their folders, by the names that they shall have.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: what is read from the logits.
        group: split the interactions by 'kind', 'layer' or 'site' of module, or by {name: site
            names or globs}; None to compute only the corners.
        tol: how much the parts may miss of an interaction, and the parts of a group of its share,
            as a share of the largest shift of the pair.
        max_nodes: the largest number of points in the square of both gates, at least 9; a rule has
            3, 7, 15, 31 or 63 values of each gate, more along the gate along which the readout
            bends more.
        progress: show a bar.

    Raises:
        ArgumentError: fewer than two adapters, an empty name or one with '@', an adapter that is a
            sum of others, groups that hold a module twice or not at all, `tol` or `max_nodes` out
            of range.
        AdapterError: adapters of different bases; DoRA on a module that another adapts too.
        SiteError: a glob of a group that matches no site of either adapter.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a value or derivative that is not finite.
    """
    tol = number("tol", tol)
    max_nodes = whole("max_nodes", max_nodes, _FEWEST_NODES)
    if tol <= 0:
        raise ArgumentError(f"tol={tol:g}: expected a share above 0, such as 1e-3.")
    named = adapters_by_name(adapters)
    of_sum = lens.with_adapter(side_by_side(named))
    split = None if group is None else _Splitting(group, tol, max_nodes)
    return _together(of_sum, prompts, readout, tuple(named), split, progress=progress)


def adapters_by_name(adapters: Mapping[str, Adapter | str | Path]) -> dict[str, Adapter]:
    """The adapters by the names that they are given; folders are read.

    Raises:
        ArgumentError: fewer than two adapters, an empty name or one with '@', or an adapter that is
            a sum of others.
    """
    if not isinstance(adapters, Mapping) or len(adapters) < 2:
        raise ArgumentError(
            f"adapters={adapters!r}: expected two or more adapters by name",
            remedy="write {'a': adapter, 'b': 'path/to/another'}.",
        )
    named: dict[str, Adapter] = {}
    for name, adapter in adapters.items():
        if not isinstance(name, str) or not name or "@" in name:
            raise ArgumentError(
                f"an adapter is called {name!r}", remedy="name it by a word without '@'."
            )
        loaded = load_adapter(adapter)
        # The sites of a sum keep the names of its summands, so no name given here would find them.
        if any("@" in key for key in loaded.modules):
            raise ArgumentError(
                f"{name!r} is {loaded.name!r}, a sum of adapters",
                remedy="name each of its summands.",
            )
        named[name] = loaded.named(name)
    return named


def side_by_side(named: Mapping[str, Adapter]) -> Adapter:
    """The sum of all these adapters; their sites stay apart."""
    first, *others = named.values()
    total = first
    for adapter in others:
        total = total + adapter
    return total


class _Splitting(NamedTuple):
    """The settings by which an interaction is split."""

    group: Group
    tol: float
    max_nodes: int


@analysis
def _together(g: Evaluations, names: tuple[str, ...], split: _Splitting | None) -> Together:
    """Evaluate g at the corners, and split the interactions if this is asked for."""
    members = _members(g.lens.sites, names).to(g.lens.gate_dtype).to(g.lens.device)
    pairs = list(itertools.combinations(range(len(names)), 2))
    base, adapted = g.ends

    of_pairs = torch.stack([members[a] + members[b] for a, b in pairs])
    corners = torch.cat([members, 1 - members, of_pairs])
    distinct, place = corners.unique(dim=0, return_inverse=True)
    values = g(distinct)[place]
    of_each, of_all_but_each, of_pair = values.split([len(names), len(names), len(pairs)])

    alone = of_each - base
    added = adapted - of_all_but_each
    interactions: list[Tensor] = []
    for both_on, (a, b) in zip(of_pair, pairs, strict=True):
        interactions.append(both_on - base - alone[a] - alone[b])
    # The four values are in the order of the formula of I_ab. The noise with one adapter on is
    # taken to be that with all adapters on.
    noise_floor = g.noise((1, -1, -1, 1), at=(1.0, 1.0, 1.0, 0.0))
    result = Together(
        adapters=names,
        alone=alone.T,
        added=added.T,
        first=tuple(names[a] for a, _ in pairs),
        second=tuple(names[b] for _, b in pairs),
        interaction=torch.stack(interactions, 1),
        noise_floor=noise_floor,
        **g.header(),
    )
    if split is None:
        return result
    return _with_parts(g, result, pairs, split)


def _members(sites: Sequence[Site], names: Sequence[str]) -> Float[Tensor, "adapter site"]:
    """A row for each adapter, 1 at its own sites and 0 elsewhere."""
    of_adapter: Groups = {}
    for name in names:
        of_adapter[name] = tuple(i for i, site in enumerate(sites) if site.adapter == name)
    return Sites(sites).indicator(of_adapter)


# --- By pairs of modules


def _groups_of_each(sites: Sequence[Site], names: Sequence[str], group: Group) -> list[Groups]:
    """The groups of modules of each adapter, under the same names for all of them.

    The names and globs of a group are matched against the names of sites without '@adapter'.
    """
    bare = [dataclasses.replace(site, name=site.name.rpartition("@")[0]) for site in sites]
    of_all = Sites(bare).grouped(group)
    members = list(itertools.chain.from_iterable(of_all.values()))
    if sorted(members) != list(range(len(sites))):
        raise ArgumentError(
            f"group={group!r} holds {len(members)} modules of {len(sites)}, some twice or not at "
            "all, so that the parts of an interaction would not add up to it",
            remedy="use 'kind', 'layer' or 'site', or name every module once.",
        )
    groups: list[Groups] = []
    for name in names:
        of_adapter: Groups = {}
        for label, indices in of_all.items():
            of_adapter[label] = tuple(i for i in indices if sites[i].adapter == name)
        groups.append(of_adapter)
    return groups


def _with_parts(
    g: Evaluations, result: Together, pairs: Sequence[_Pair], splitting: _Splitting
) -> Together:
    """The result with the parts of each interaction, and what they miss."""
    groups = _groups_of_each(g.lens.sites, result.adapters, splitting.group)
    bounds: list[Bounds] = []
    splits: list[Split] = []
    for row, (a, b) in enumerate(pairs):
        interaction = result.interaction[:, row]
        bound = _bounds(result, interaction, result.alone[:, [a, b]], splitting.tol)
        split = split_by_modules(
            g, groups[a], groups[b], interaction, bound.allowed, splitting.max_nodes
        )
        bounds.append(bound)
        splits.append(split)
    pairs_by_name = zip(result.first, result.second, strict=True)
    names = [f"{first} and {second}" for first, second in pairs_by_name]
    quadrature = quadrature_of(splits, bounds, names, g.lens.describe()["dtype"])
    return dataclasses.replace(
        result,
        parts=torch.stack([split.parts for split in splits], 1),
        groups=tuple(groups[0]),
        nodes=quadrature.nodes,
        allowed=torch.stack([bound.allowed for bound in bounds], 1),
        group_error=torch.stack([split.missed_of_group for split in splits], 1),
        quadrature=quadrature,
    )


def _bounds(
    result: Together,
    interaction: Float[Tensor, " batch"],
    alone: Float[Tensor, "batch two"],
    tol: float,
) -> Bounds:
    """The bounds of a pair, from its interaction and the shift of each adapter alone."""
    both = alone.sum(1) + interaction
    largest = torch.maximum(alone.abs().amax(1), both.abs())
    return Bounds(largest, tol, SIGMAS * result.noise_floor.to(largest))
