"""Real interventions on sites: corners of the cube [0,1]^S, run and not predicted.

    add one          g(e_G) − g(0)       what group G does alone, on the base model
    leave one out    g(1) − g(1 − e_G)   what is lost without it, in the adapted model

1. Each group of sites G is a corner of the cube: gates e_G, or 1 − e_G.
2. g is run at every corner, and at both ends; corners that share their first layers share the work.

The effects of all groups do not sum to the shift in general: what sites do together is in neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from lens_lora.arguments import word
from lens_lora.engine.asked import Asked, ask
from lens_lora.errors import SiteError
from lens_lora.hooked.alone import alone
from lens_lora.hooked.sites import Group, Groups, group_sites, indicator, match_sites
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.readouts.readout import Readout
from lens_lora.results.effects import Effects
from lens_lora.results.measured import header

__all__ = ["How", "patch_sites", "patch_sites_of", "require_how"]

How = Literal["add_one", "leave_one_out"]


@alone
def patch_sites(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    how: How = "add_one",
    *,
    sites: str | Sequence[str] | None = None,
    group: Group = "site",
    progress: bool = True,
) -> Effects:
    """What switching each site, or group of sites, on or off does to the readout, exactly.

    Cost: two forward passes and one per group, batched; about half of that where the model's batch
    may grow from block to block (all but Bloom and OPT on a Bridge).

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        how: 'add_one', g(e_G) − g(0), or 'leave_one_out', g(1) − g(1 − e_G).
        sites: names or globs; only these are switched. Without it, all.
        group: 'site', 'layer', 'kind', or {name: site names or globs}.
        progress: show a bar.

    Returns:
        Effects with values [batch, group], in the readout's units.

    Raises:
        SiteError: a name or glob that matches no site, or a named group without a chosen site.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a non-finite readout.
        ArgumentError: another `how` or `group`.
    """
    return patch_sites_of(
        ask(lens, prompts, readout), how, sites=sites, group=group, progress=progress
    )


def patch_sites_of(
    asked: Asked,
    how: How = "add_one",
    *,
    sites: str | Sequence[str] | None = None,
    group: Group = "site",
    progress: bool = True,
) -> Effects:
    """`patch_sites` of a question that is already tokenised.

    Args:
        asked: the lens, the prompts and the readout.
        how, sites, group, progress: as for `patch_sites`.

    Raises:
        SiteError: a glob that matches no site.
        NumericsError: a non-finite readout.
        ArgumentError: another `how` or `group`.
    """
    require_how(how)
    groups = _chosen(asked.lens, sites, group)
    switched = indicator(groups, len(asked.lens.sites))
    corners, what = (switched if how == "add_one" else 1 - switched), how.replace("_", " ")
    found = asked.at_gates(corners, progress=progress, what=what)
    base, adapted = asked.ends[..., None]
    values = found - base if how == "add_one" else adapted - found
    return Effects(values=values, groups=groups, how=how, **header(asked))


def require_how(how: str) -> None:
    """Check the word for the intervention.

    Args:
        how: 'add_one' or 'leave_one_out'.

    Raises:
        ArgumentError: any other word.
    """
    word("how", how, get_args(How))


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
