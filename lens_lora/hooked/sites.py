"""Sites: the adapted linear maps, named as the model's hook points, and groups of them.

1. Sites are chosen by name or glob (`match_sites`), and grouped by layer, kind of module or named
   subset (`group_sites`).
2. A site's number may be split along `AXES` (`by_axes`).
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.errors import ArgumentError, SiteError

__all__ = [
    "ATTENTION_KINDS",
    "AXES",
    "Group",
    "Groups",
    "Heads",
    "Site",
    "by_axes",
    "group_sites",
    "indicator",
    "points_without_update",
]

ATTENTION_KINDS = ("q", "k", "v", "o")
EMBEDDING_KINDS = ("embed", "pos_embed")
WRITER_KINDS = ("o", "down", "fc_out", *EMBEDDING_KINDS)
AXES = ("position", "head", "rank")
Group = Literal["site", "layer", "kind"] | Mapping[str, str | Sequence[str]]
Groups = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted linear map of the model, as data.

    Attributes:
        name: 'blocks.3.attn.q'.
        module: Hugging Face path that the adapter names.
        layer: 3; embeddings are in layer −1, the unembedding after the last.
        kind: 'q'.
        read: hook point at which z is read.
        write: hook point at which s·B·A·z is added.
        rank: of ΔW.
        adapter: which part of a sum of adapters; the name then ends in '@' and this.
    """

    name: str
    module: str
    layer: int
    kind: str
    read: str
    write: str
    rank: int
    adapter: str = ""


@dataclasses.dataclass(frozen=True)
class Heads:
    """The model's attention heads.

    Attributes:
        n_heads: of queries.
        n_kv: of keys and values.
        d_head: their width.
    """

    n_heads: int
    n_kv: int
    d_head: int

    def of(self, kind: str) -> int:
        """How many heads a site of this kind has; 0 outside attention.

        Args:
            kind: such as 'q' or 'down'.
        """
        return {"q": self.n_heads, "o": self.n_heads, "k": self.n_kv, "v": self.n_kv}.get(kind, 0)


def points_without_update(sites: Iterable[Site]) -> set[str]:
    """Hook points that show W z of an adapted site before its δ is added.

    Args:
        sites: the adapted ones.
    """
    return {f"blocks.{site.layer}.attn.hook_result" for site in sites if site.kind == "o"}


def match_sites(names: Iterable[str], values: Mapping[str, Any]) -> dict[int, Any]:
    """Site index → value, for a mapping from site names or globs; later keys win.

    Args:
        names: of all sites.
        values: by name or glob.

    Raises:
        SiteError: a key that matches no site.
    """
    names = list(names)
    index = {name: i for i, name in enumerate(names)}
    chosen: dict[int, Any] = {}
    for pattern, value in values.items():
        hits = fnmatch.filter(names, pattern)
        if not hits:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise SiteError(f"{pattern!r} matches no site; the nearest are {near or names[:3]}.")
        chosen.update({index[name]: value for name in hits})
    return chosen


def group_sites(sites: Sequence[Site], group: Group = "site") -> Groups:
    """{group name: indices of its sites}, in the order of the sites.

    Args:
        sites: to be grouped.
        group: 'site', 'layer' ('layer 3'; 'embed', 'unembed'), 'kind', or {name: site names or
            globs}; subsets may overlap and need not hold every site.

    Raises:
        SiteError: a glob that matches no site.
        ArgumentError: any other word.
    """
    if isinstance(group, Mapping):
        names = [site.name for site in sites]
        return {
            name: tuple(sorted(match_sites(names, dict.fromkeys(_globs(globs), 1.0))))
            for name, globs in group.items()
        }
    labels = {
        "site": attrgetter("name"),
        "layer": _layer_label,
        "kind": attrgetter("kind"),
    }
    if group not in labels:
        raise ArgumentError(
            f"group {group!r}: expected 'site', 'layer', 'kind', or {{name: globs of sites}}."
        )
    found: dict[str, list[int]] = {}
    for index, site in enumerate(sites):
        found.setdefault(labels[group](site), []).append(index)
    return {name: tuple(indices) for name, indices in found.items()}


def indicator(groups: Groups, sites: int) -> Float[Tensor, "group site"]:
    """1 where a site is in a group, else 0.

    Args:
        groups, sites: the groups, and the number of all sites.
    """
    rows = torch.zeros(len(groups), sites, dtype=torch.float64)
    for row, indices in zip(rows, groups.values(), strict=True):
        row[list(indices)] = 1
    return rows


def _globs(globs: str | Sequence[str]) -> list[str]:
    if not globs:
        raise SiteError("a group without sites: give it a site name or a glob.")
    return [globs] if isinstance(globs, str) else list(globs)


def _layer_label(site: Site) -> str:
    return site.kind if site.kind in (*EMBEDDING_KINDS, "unembed") else f"layer {site.layer}"


def by_axes(by: tuple[str, ...] | str) -> tuple[str, ...]:
    """`by` in canonical order.

    Args:
        by: one axis or several of 'position', 'head', 'rank'.

    Raises:
        ArgumentError: any other axis.
    """
    wanted = (by,) if isinstance(by, str) else tuple(by)
    unknown = [axis for axis in wanted if axis not in AXES]
    if unknown:
        raise ArgumentError(f"by={unknown}: expected any of {AXES}.")
    return tuple(axis for axis in AXES if axis in wanted)
