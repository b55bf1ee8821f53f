"""Groups of sites: single sites, layers, kinds of module, or any named subsets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.errors import ArgumentError, SiteError
from lens_lora.hooked.sites import Site, match_sites

__all__ = ["Group", "Groups", "group_sites", "indicator"]

Group = Literal["site", "layer", "kind"] | Mapping[str, str | Sequence[str]]
Groups = dict[str, tuple[int, ...]]


def group_sites(sites: Sequence[Site], group: Group = "site") -> Groups:
    """{group name: indices of its sites}, in the order of the sites.

    Args:
        group: 'site', 'layer' ('layer 3'; 'embed', 'unembed'), 'kind', or {name: site names or
            globs}; subsets may overlap and need not hold every site.

    Raises:
        SiteError: a glob that matches no site.
        ArgumentError: another word.
    """
    if isinstance(group, Mapping):
        names = [site.name for site in sites]
        return {
            name: tuple(sorted(match_sites(names, dict.fromkeys(_globs(globs), 1.0))))
            for name, globs in group.items()
        }
    labels = {"site": _site_label, "layer": _layer_label, "kind": _kind_label}
    if group not in labels:
        raise ArgumentError(
            f"group {group!r}: expected 'site', 'layer', 'kind', or {{name: globs of sites}}."
        )
    found: dict[str, list[int]] = {}
    for index, site in enumerate(sites):
        found.setdefault(labels[group](site), []).append(index)
    return {name: tuple(indices) for name, indices in found.items()}


def indicator(groups: Groups, sites: int) -> Float[Tensor, "group site"]:
    """1 where a site is of a group."""
    rows = torch.zeros(len(groups), sites, dtype=torch.float64)
    for row, indices in zip(rows, groups.values(), strict=True):
        row[list(indices)] = 1
    return rows


def _globs(globs: str | Sequence[str]) -> list[str]:
    if not globs:
        raise SiteError("a group of no sites; give it a site name or a glob.")
    return [globs] if isinstance(globs, str) else list(globs)


def _site_label(site: Site) -> str:
    return site.name


def _kind_label(site: Site) -> str:
    return site.kind


def _layer_label(site: Site) -> str:
    return site.kind if site.kind in ("embed", "pos_embed", "unembed") else f"layer {site.layer}"
