"""Real interventions on sites, which are run rather than predicted.

    add one           g(e_G) − g(0)         what group G does alone, on the base model
    leave one out     g(1) − g(1 − e_G)     what the adapted model loses without it

Interventions on activations are in `analyses/activation_patching.py`.

1. Each group of sites G is a corner of the cube: gates e_G, or 1 − e_G. g is run at every corner
   and at both ends; corners that share their first layers share the work. In general the effects of
   all groups do not sum to the shift, as neither kind of effect contains what sites do together.
2. By default δ_G is replaced by zero. It may also be replaced by its mean over texts, which keeps
   what does not depend on the input, or by its value on another text. Then the effect is

       g(δ_G its own) − g(δ_G replaced),   on the base with G on, or on the adapted model

   where the texts are run on the same model (`function/activations.py`). A single rank of a site,
   σ_j u_j v_jᵀx of the SVD of its ΔW, is replaced in the same way (`model/gauge.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.arguments import word
from lens_lora.core.analyses.own_analyses import analysis
from lens_lora.core.function import activations
from lens_lora.core.function.activations import mean_over, replaced_readout
from lens_lora.core.function.function import Function
from lens_lora.core.function.many_gates import Bar
from lens_lora.core.model import Group, Groups, LoraLens
from lens_lora.core.readout import Prompts, PromptsLike, Reading
from lens_lora.core.results.effects import Effects
from lens_lora.errors import ArgumentError, SiteError

How = Literal["add_one", "leave_one_out"]
Of = Literal["site", "rank"]
Replace = Literal["zero", "mean", "resample"]


@analysis
def patch_sites(
    g: Function,
    how: How = "add_one",
    *,
    sites: str | Sequence[str] | None = None,
    group: Group = "site",
    of: Of = "site",
    replace: Replace = "zero",
    texts: PromptsLike | None = None,
) -> Effects:
    """The exact effect of each site, group of sites or single rank on the readout.

    Cost: two forward passes, four for the noise floor, and one per group, batched. A group's pass
    may begin at its first block, except for Bloom and OPT on a Bridge: all of them then take about
    half as long. Replacing δ by another value than zero adds a forward pass of the texts, and with
    'add_one' a second pass per group.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        how: 'add_one' switches sites on in the base model, g(e_G) − g(0); 'leave_one_out' switches
            them off in the adapted model, g(1) − g(1 − e_G).
        sites: the sites that are switched, as names or globs; by default all.
        group: what is switched together: 'site', 'layer', 'kind', or {name: site names or globs}.
        of: 'rank' for each rank of each site, in the coordinates of the SVD of its ΔW, which are
            unique up to equal singular values; then `group` is 'site'.
        replace: what δ is replaced by. 'zero', by default. 'mean': its mean over the tokens of
            `texts`, without each text's first token, where tokens with the same tokens before them
            count once. 'resample': its value on another text, text i mod N for prompt i, aligned at
            the ends of both (a row ends with its response). In 'mean' and 'resample' the first
            token, a sink, keeps its own δ.
        texts: the texts of 'mean' and 'resample', in any form that prompts take. For 'resample'
            each must be as long as the rows whose δ it replaces.
        progress: show a bar.

    Returns:
        Effects with values [batch, group], in the readout's units.

    Raises:
        SiteError: a name or glob that matches no site, or a named group without a chosen site.
        TokenError, PromptError: a readout or prompt that does not fit the model; texts that are too
            short, or the same as what they stand in for; a prompt of the first token only.
        NumericsError: a readout that is not finite.
        ArgumentError: another `how`, `group`, `of` or `replace`; texts where none are needed, or
            none where they are; ranks of groups or of norms.
    """
    word("how", how, get_args(How))
    word("of", of, get_args(Of))
    lens = g.lens
    replacing = None if texts is None else lens.prompts(texts)
    _require_texts(replace, replacing)
    groups = _chosen(lens, sites, group)
    if of == "site" and replacing is None:
        return Effects.from_function(g, _switched(g, groups, how), groups, how)

    parts = _Parts(groups)
    if of == "rank":
        if group != "site":
            raise ArgumentError(
                f"of='rank' takes each rank of each site by itself, and group is {group!r}; leave "
                "out group, or choose with sites=…"
            )
        activations.require_ranks(lens, [index for (index,) in groups.values()])
        parts = _Parts.each_rank(lens, groups)
        lens = lens.in_gauge("svd")
    stand_in = None
    if replacing is not None:
        stand_in = _stand_in(lens, g.reading, how, replace, replacing)
    values = _replaced(g, lens, parts, how, stand_in)
    text_count = 0 if replacing is None else replacing.batch
    return Effects.from_function(
        g, values, parts.groups, how, of=of, replace=replace, texts=text_count
    )


def _switched(g: Function, groups: Groups, how: How) -> Float[Tensor, "batch group"]:
    """Effects of switching groups of sites: g at corners of the cube, less g at an end."""
    members = g.lens.sites.indicator(groups)
    if how == "add_one":
        added = g.corners(members)
        base, _ = g.ends
        return (added - base).T
    without = g.corners(1 - members)
    _, adapted = g.ends
    return (adapted - without).T


def _require_texts(replace: str, texts: Prompts | None) -> None:
    word("replace", replace, get_args(Replace))
    if replace == "zero" and texts is not None:
        raise ArgumentError(
            "texts are for replace='mean' or 'resample', and this is replace='zero', which needs "
            "none."
        )
    if replace != "zero" and texts is None:
        raise ArgumentError(
            f"replace={replace!r} takes δ from other texts, and none were given; pass texts=[…]."
        )


def _chosen(lens: LoraLens, sites: str | Sequence[str] | None, group: Group) -> Groups:
    """The groups, restricted to the chosen sites."""
    groups = lens.sites.grouped(group)
    if sites is None:
        return groups
    chosen = lens.sites.chosen(sites)
    of_chosen: Groups = {}
    for name, members in groups.items():
        chosen_members = tuple(index for index in members if index in chosen)
        if chosen_members:
            of_chosen[name] = chosen_members
        elif isinstance(group, Mapping):
            raise SiteError(f"group {name!r} holds none of the sites chosen by {sites}.")
    return of_chosen


# --- δ replaced by something other than zero, and single ranks


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The parts of the adapter whose δ is replaced, each in a run of its own.

    Attributes:
        groups: the sites of each part, by its name.
        ranks: the rank of the site of each part; None if the parts are whole sites.
    """

    groups: Groups
    ranks: tuple[int, ...] | None = None

    @classmethod
    def each_rank(cls, lens: LoraLens, groups: Groups) -> _Parts:
        """Take each rank of each site as a part.

        Args:
            lens: the adapter over the model.
            groups: groups of a single site each.
        """
        by_rank: Groups = {}
        ranks: list[int] = []
        for name, (index,) in groups.items():
            for rank in range(lens.sites[index].rank):
                by_rank[f"{name}[{rank}]"] = (index,)
                ranks.append(rank)
        return cls(by_rank, tuple(ranks))

    def points(self, lens: LoraLens, how: How) -> activations.Points:
        """The state of every site in each run: one part is replaced, all other sites are off or on.

        Args:
            lens: the adapter over the model.
            how: 'add_one' for runs of the base, or 'leave_one_out' for runs of the adapted model.
        """
        adds = how == "add_one"
        is_by_rank = self.ranks is not None
        members = lens.sites.indicator(self.groups).to(lens.device, lens.gate_dtype)
        ranks = members.new_zeros(len(self.groups))
        if self.ranks is not None:
            ranks = torch.tensor(self.ranks).to(members)
        state_of_members = activations.ABOUT + ranks[:, None]
        state_of_others = activations.OFF if adds else activations.ON
        return activations.Points(
            states=torch.where(members > 0, state_of_members, state_of_others),
            of_ranks=is_by_rank,
            alone=adds and is_by_rank,
            replaced=True,
        )


def _stand_in(
    lens: LoraLens, reading: Reading, how: How, replace: Replace, texts: Prompts
) -> activations.StandIn:
    """Take what replaces δ from the texts, run on the model that is intervened on."""
    gates = lens.gates(float(how == "leave_one_out"))
    if replace == "mean":
        return mean_over(lens, texts, texts.distinct(), gates, reading)
    return activations.resampled(lens, texts, gates, reading)


def _replaced(
    g: Function,
    lens: LoraLens,
    parts: _Parts,
    how: How,
    stand_in: activations.StandIn | None,
) -> Float[Tensor, "batch group"]:
    """The effects: g with each part's own δ, less g with δ replaced.

    Args:
        g: the function.
        lens: the lens of g; for single ranks, with rank spaces in the coordinates of the SVD.
        parts: what is replaced in each run.
        how: 'add_one' on the base, or 'leave_one_out' in the adapted model.
        stand_in: what δ is replaced by; None for zero.
    """

    def run(points: activations.Points, title: str) -> Float[Tensor, "batch group"]:
        return replaced_readout(lens, g.reading, points, stand_in, bar=Bar(title, g.progress))

    points = parts.points(lens, how)
    if how == "leave_one_out":
        _, adapted = g.ends
        return adapted[:, None] - run(points, "replaced")
    if points.of_ranks:
        added = run(dataclasses.replace(points, replaced=False), "add one")
    else:
        members = lens.sites.indicator(parts.groups).to(lens.device, lens.gate_dtype)
        added = g.corners(members).T
    if stand_in is None:
        base, _ = g.ends
        return added - base[:, None]
    return added - run(points, "replaced")
