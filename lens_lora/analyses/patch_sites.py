"""Real interventions on sites: run, and not predicted.

    add one          g(e_G) − g(0)       what group G does alone, on the base model
    leave one out    g(1) − g(1 − e_G)   what is lost without it, in the adapted model

1. Each group of sites G is a corner of the cube: gates e_G, or 1 − e_G.
2. g is run at every corner, and at both ends; corners that share their first layers share the work.
3. Zero is one thing to put in the place of δ_G; the mean of δ over texts, or another text's δ, keep
   what does not depend on the input, or what a text in general brings. Then the effect is

       g(δ_G its own) − g(δ_G replaced),   on the base with G on, or on the adapted model

   with the texts run on the base, or on the adapted model (`engine/stand_in.py`).
4. The same for one rank of a site, σ_j u_j v_jᵀx of the SVD of its ΔW (`hooked/gauge.py`).

The effects of all groups do not sum to the shift in general: what sites do together is in neither.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.arguments import word
from lens_lora.engine.activations import in_gauge
from lens_lora.engine.asked import Asked, ask
from lens_lora.engine.replaced import Points, replaced_readout, require_ranks
from lens_lora.engine.stand_in import StandIn, mean_over, resampled
from lens_lora.errors import ArgumentError, SiteError
from lens_lora.hooked.alone import alone
from lens_lora.hooked.sites import Group, Groups, group_sites, indicator, match_sites
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts, PromptsLike
from lens_lora.readouts.readout import Readout
from lens_lora.results.effects import Effects
from lens_lora.results.measured import header

__all__ = ["How", "patch_sites", "patch_sites_of", "require_how"]

How = Literal["add_one", "leave_one_out"]
Of = Literal["site", "rank"]
Replace = Literal["zero", "mean", "resample"]


@alone
def patch_sites(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    how: How = "add_one",
    *,
    sites: str | Sequence[str] | None = None,
    group: Group = "site",
    of: Of = "site",
    replace: Replace = "zero",
    texts: PromptsLike | None = None,
    progress: bool = True,
) -> Effects:
    """What each site, group of sites or single rank does to the readout, exactly.

    Cost: two forward passes, four for the noise floor, and one per group, batched; about half of
    that where the model's batch may grow from block to block (all but Bloom and OPT on a Bridge).
    Where δ is not replaced by zero, one forward pass of the texts too, and with 'add_one' two per
    group, with its own δ and without.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        how: 'add_one', on the base model, g(e_G) − g(0), or 'leave_one_out', in the adapted model,
            g(1) − g(1 − e_G).
        sites: names or globs; only these are switched. Without it, all.
        group: 'site', 'layer', 'kind', or {name: site names or globs}.
        of: 'rank' for each rank of each site, in the coordinates of the SVD of its ΔW, which are
            unique up to equal singular values; then `group` is 'site'.
        replace: what stands in the place of δ. 'mean', its mean over all tokens of `texts` but each
            text's first; 'resample', its value on another text: text i mod N for prompt i, with
            both ends aligned (a row ends with its response). The first token, a sink, keeps its own
            δ in both.
        texts: for 'mean' and 'resample', in any form that prompts take. For 'resample' each must be
            as long as the rows that it stands in for.
        progress: show a bar.

    Returns:
        Effects with values [batch, group], in the readout's units.

    Raises:
        SiteError: a name or glob that matches no site, or a named group without a chosen site.
        TokenError, PromptError: a readout or prompt that does not fit the model; texts that are too
            short, or the same as what they stand in for; a prompt of the first token only.
        NumericsError: a non-finite readout.
        ArgumentError: another `how`, `group`, `of` or `replace`, texts where none are needed or
            none where they are, or ranks of groups or of norms.
    """
    if texts is not None:
        texts = lens.prompts(texts)
    return patch_sites_of(
        ask(lens, prompts, readout),
        how,
        sites=sites,
        group=group,
        of=of,
        replace=replace,
        texts=texts,
        progress=progress,
    )


def patch_sites_of(
    asked: Asked,
    how: How = "add_one",
    *,
    sites: str | Sequence[str] | None = None,
    group: Group = "site",
    of: Of = "site",
    replace: Replace = "zero",
    texts: Prompts | None = None,
    progress: bool = True,
) -> Effects:
    """`patch_sites` of a question that is already tokenised.

    Args:
        asked: the lens, the prompts and the readout.
        how, sites, group, of, replace, texts, progress: as for `patch_sites`.

    Raises:
        SiteError: a glob that matches no site.
        NumericsError: a non-finite readout.
        ArgumentError: as for `patch_sites`.
        PromptError: texts that cannot stand in.
    """
    require_how(how)
    _require_texts(replace, texts)
    groups, ranks = _of_ranks(asked.lens, sites, group, of)
    if ranks is None and replace == "zero":
        values = _switched(asked, groups, how, progress)
    else:
        in_rank_space = _in_rank_space(asked, groups, ranks)
        stand_in = None if texts is None else _stand_in(in_rank_space, how, replace, texts)
        values = _replaced(in_rank_space, groups, ranks, how, stand_in, progress)
    count = 0 if texts is None else texts.batch
    return Effects(
        values=values,
        groups=groups,
        how=how,
        of=of,
        replace=replace,
        texts=count,
        noise_floor=asked.effect_noise(float(how == "leave_one_out")),
        **header(asked),
    )


def _switched(
    asked: Asked, groups: Groups, how: How, progress: bool
) -> Float[Tensor, "batch group"]:
    """Gates of zero: corners of the cube."""
    switched = indicator(groups, len(asked.lens.sites))
    corners, what = (switched if how == "add_one" else 1 - switched), how.replace("_", " ")
    found = asked.at_gates(corners, progress=progress, what=what)
    base, adapted = asked.ends[..., None]
    return found - base if how == "add_one" else adapted - found


def _in_rank_space(asked: Asked, groups: Groups, ranks: list[int] | None) -> Asked:
    """The same question, for ranks with each rank space in the coordinates of its SVD."""
    if ranks is None:
        return asked
    require_ranks(asked.lens, sorted({index for (index,) in groups.values()}))
    turned = dataclasses.replace(asked, lens=in_gauge(asked.lens, "svd"))
    turned.know_ends(asked.ends)
    return turned


def _stand_in(asked: Asked, how: How, replace: Replace, texts: Prompts) -> StandIn:
    gates = asked.lens.gates(float(how == "leave_one_out"))
    find = mean_over if replace == "mean" else resampled
    return find(asked.lens, texts, gates, asked.reading)


def _replaced(
    asked: Asked,
    groups: Groups,
    ranks: list[int] | None,
    how: How,
    stand_in: StandIn | None,
    progress: bool,
) -> Float[Tensor, "batch group"]:
    """g with each group's own δ, less g with what stands in for it."""
    lens, adds = asked.lens, how == "add_one"
    members = indicator(groups, len(lens.sites)).to(lens.device, lens.gate_dtype)
    about = (
        torch.full((len(members), 1), 2.0) if ranks is None else 2.0 + torch.tensor(ranks)[:, None]
    )
    states = torch.where(members > 0, about.to(members), 0.0 if adds else 1.0)
    points = Points(states, ranks is not None, alone=adds and ranks is not None, replaced=True)
    run = functools.partial(_run, asked, stand_in, progress)
    if not adds:
        return asked.ends[1][:, None] - run(points, "replaced")
    if ranks is None:
        own = asked.at_gates(members, progress=progress, what="add one")
    else:
        own = run(dataclasses.replace(points, replaced=False), "add one")
    nothing = stand_in is None
    return own - (asked.ends[0][:, None] if nothing else run(points, "replaced"))


def _run(
    asked: Asked,
    stand_in: StandIn | None,
    progress: bool,
    points: Points,
    what: str,
) -> Float[Tensor, "batch point"]:
    lens, reading = asked.lens, asked.reading
    return replaced_readout(lens, reading, points, stand_in, progress=progress, what=what)


def require_how(how: str) -> None:
    """Check the word for the intervention.

    Args:
        how: 'add_one' or 'leave_one_out'.

    Raises:
        ArgumentError: any other word.
    """
    word("how", how, get_args(How))


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


def _of_ranks(
    lens: LoraLens, sites: str | Sequence[str] | None, group: Group, of: str
) -> tuple[Groups, list[int] | None]:
    """The groups; for ranks one for each rank of each site, and which rank it is."""
    word("of", of, get_args(Of))
    groups = _chosen(lens, sites, group)
    if of == "site":
        return groups, None
    if group != "site":
        raise ArgumentError(
            f"of='rank' takes each rank of each site by itself, and group is {group!r}; leave out "
            "group, or choose with sites=…"
        )
    each = [
        (f"{name}[{rank}]", index, rank)
        for name, (index,) in groups.items()
        for rank in range(lens.sites[index].rank)
    ]
    return {name: (index,) for name, index, _ in each}, [rank for *_, rank in each]


def _chosen(lens: LoraLens, sites: str | Sequence[str] | None, group: Group) -> Groups:
    """The groups, of the chosen sites alone."""
    groups = group_sites(lens.sites, group)
    if sites is None:
        return groups
    patterns = [sites] if isinstance(sites, str) else list(sites)
    if not patterns:
        raise SiteError("sites=[] chooses nothing; give site names or globs, or None for all.")
    names = [site.name for site in lens.sites]
    chosen = match_sites(names, dict.fromkeys(patterns, 1.0))
    kept = {name: tuple(i for i in of if i in chosen) for name, of in groups.items()}
    if isinstance(group, Mapping):
        empty = [name for name, of in kept.items() if not of]
        if empty:
            raise SiteError(f"group {empty[0]!r} holds none of the sites chosen by {patterns}.")
    return {name: of for name, of in kept.items() if of}
