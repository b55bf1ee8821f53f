"""Real interventions on sites: corners of the cube [0,1]^S, run and not predicted.

    add one          g(e_G) − g(0)       what group G does alone, on the base model
    leave one out    g(1) − g(1 − e_G)   what is lost without it, in the adapted model

1. Each group of sites G is a corner of the cube: gates e_G, or 1 − e_G.
2. g is run at every corner, and at both ends; corners that share their first layers share the work.

The effects of all groups do not sum to the shift in general: what sites do together is in neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from lens_lora.engine.function import gated_readout
from lens_lora.errors import ArgumentError, SiteError
from lens_lora.hooked.sites import Group, Groups, group_sites, indicator, match_sites
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.readouts.readout import Readout, bound
from lens_lora.results.effects import Effects

__all__ = ["patch_sites"]

How = Literal["add_one", "leave_one_out"]


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
        how: 'add_one', g(e_G) − g(0), or 'leave_one_out', g(1) − g(1 − e_G).
        sites: names or globs; only these are switched. Without it, all.
        group: 'site', 'layer', 'kind', or {name: site names or globs}.

    Returns:
        Effects with values [batch, group], in the readout's units.

    Raises:
        SiteError: a name or glob that matches no site, or a named group without a chosen site.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a non-finite readout.
        ArgumentError: another `how` or `group`.
    """
    if how not in ("add_one", "leave_one_out"):
        raise ArgumentError(f"how={how!r}: expected 'add_one' or 'leave_one_out'.")
    reading = bound(readout, lens.model, lens.prompts(prompts))
    groups = _chosen(lens, sites, group)
    switched = indicator(groups, len(lens.sites)).to(lens.device, lens.gate_dtype)
    none, every = lens.gates(0.0)[None], lens.gates(1.0)[None]
    corners = switched if how == "add_one" else 1 - switched
    values = gated_readout(
        lens,
        reading,
        torch.cat([none, every, corners]),
        progress=progress,
        what=how.replace("_", " "),
    )
    base, adapted, found = values[:, 0], values[:, 1], values[:, 2:]
    effects = found - base[:, None] if how == "add_one" else adapted[:, None] - found
    return Effects(
        values=effects,
        groups=groups,
        sites=lens.sites,
        base=base.contiguous(),
        adapted=adapted.contiguous(),
        str_tokens=reading.tokens_of(lens.str_tokens(reading.prompts)),
        readout=readout.label,
        units=readout.units,
        how=how,
        meta=lens.describe(),
    )


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
