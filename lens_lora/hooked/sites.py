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
    "match_sites",
    "one_site",
    "points_without_update",
]

ATTENTION_KINDS = ("q", "k", "v", "o")
EMBEDDING_KINDS = ("embed", "pos_embed")
WRITER_KINDS = ("o", "down", "fc_out", *EMBEDDING_KINDS)
OUTSIDE_KINDS = (*EMBEDDING_KINDS, "embed_ln", "ln_final", "unembed")
AXES = ("position", "head", "rank")
Group = Literal["site", "layer", "kind"] | Mapping[str, str | Sequence[str]]
Groups = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted linear map of the model, as data; or a norm whose γ or β was trained.

    Attributes:
        name: 'blocks.3.attn.q', 'blocks.3.ln1'.
        module: Hugging Face path that the adapter names.
        layer: 3; embeddings are in layer −1, the final norm and the unembedding after the last.
        kind: 'q', 'ln1'.
        read: hook point, or module, at which z is read (of a norm, the normalised value).
        write: hook point, or module, at which s·B·A·z is added.
        rank: of the update: of ΔW, one more for a change of bias; of a norm its features.
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
        of_queries, of_keys = ("q", "o", "q_norm"), ("k", "v", "k_norm")
        return self.n_heads if kind in of_queries else self.n_kv if kind in of_keys else 0


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
        if not isinstance(pattern, str):
            raise SiteError(
                f"{pattern!r} names no site; give a name or a glob, such as '*.attn.v'."
            )
        hits = fnmatch.filter(names, pattern)
        if not hits:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise SiteError(f"{pattern!r} matches no site; the nearest are {near or names[:3]}.")
        chosen.update({index[name]: value for name in hits})
    return chosen


def one_site(names: Iterable[str], name: str) -> int:
    """The index of the only site that a name or glob matches.

    Args:
        names: of all sites.
        name: of one.

    Raises:
        SiteError: no such site, or several.
    """
    hits = list(match_sites(names, {name: 0}))
    if len(hits) > 1:
        raise SiteError(f"{name!r} matches {len(hits)} sites; name one.")
    return hits[0]


def group_sites(sites: Sequence[Site], group: Group = "site") -> Groups:
    """{group name: indices of its sites}, in the order of the sites.

    Args:
        sites: to be grouped.
        group: 'site', 'layer' ('layer 3'; 'embed', 'ln_final', …), 'kind', or {name: site names or
            globs}; subsets may overlap and need not hold every site.

    Raises:
        SiteError: a glob that matches no site.
        ArgumentError: any other word.
    """
    if isinstance(group, Mapping):
        if not group:
            raise ArgumentError("group={} holds no group; name at least one.")
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
    if not isinstance(group, str) or group not in labels:
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
    if not globs or not isinstance(globs, Sequence):
        raise SiteError(f"a group of {globs!r}: give it a site name, a glob, or a list of them.")
    return [globs] if isinstance(globs, str) else list(globs)


def _layer_label(site: Site) -> str:
    return site.kind if site.kind in OUTSIDE_KINDS else f"layer {site.layer}"


def by_axes(by: tuple[str, ...] | str, axes: tuple[str, ...] = AXES) -> tuple[str, ...]:
    """`by` in canonical order.

    Args:
        by: one axis or several.
        axes: those that there are: 'position', 'head', 'rank'; of a response also 'token'.

    Raises:
        ArgumentError: any other axis.
    """
    if not isinstance(by, str | Iterable):
        raise ArgumentError(f"by={by!r}: expected any of {AXES}.")
    wanted = (by,) if isinstance(by, str) else tuple(by)
    unknown = [axis for axis in wanted if axis not in axes]
    if unknown:
        raise ArgumentError(f"by={unknown}: expected any of {axes}.")
    return tuple(axis for axis in axes if axis in wanted)
