"""Sites: the adapted linear maps, named as the model's hook points, and groups of them.

1. A Hugging Face module becomes one site, or several where it fuses q, k and v (or gate and up):
   the family's layout says which output rows belong to which, and a site takes those rows of B.
2. Sites are chosen by name or glob (`match_sites`), and grouped by layer, kind of module or named
   subset (`group_sites`).
3. A site's number may be split along `AXES` (`by_axes`).
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

from lens_lora.adapters.adapter import Adapter
from lens_lora.adapters.factors import LoRAFactors
from lens_lora.errors import AdapterError, ArgumentError, SiteError
from lens_lora.families import Family, Place

__all__ = [
    "ATTENTION_KINDS",
    "AXES",
    "Group",
    "Groups",
    "Heads",
    "Site",
    "SiteFactors",
    "by_axes",
    "group_sites",
    "indicator",
    "points_without_update",
    "resolve_sites",
]

ATTENTION_KINDS = ("q", "k", "v", "o")
EMBEDDING_KINDS = ("embed", "pos_embed")
_OUTSIDE = (*EMBEDDING_KINDS, "unembed")
WRITER_KINDS = ("o", "down", "fc_out", *EMBEDDING_KINDS)
AXES = ("position", "head", "rank")
_ORDER = (*EMBEDDING_KINDS, "q", "k", "v", "o", "gate", "up", "fc_in", "down", "fc_out", "unembed")


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


@dataclasses.dataclass(frozen=True)
class SiteFactors:
    """A site before it meets the model's basis: its own output rows, in the Hugging Face basis."""

    name: str
    module: str
    layer: int
    kind: str
    factors: LoRAFactors
    rows: Tensor | None
    adapter: str


def site_name(layer: int, kind: str) -> str:
    """'blocks.3.attn.q', or the kind alone outside the blocks.

    Args:
        layer, kind: such as 3 and 'q'.
    """
    if kind in _OUTSIDE:
        return kind
    part = "attn" if kind in ATTENTION_KINDS else "mlp"
    return f"blocks.{layer}.{part}.{kind}"


def resolve_sites(
    adapter: Adapter, family: Family, heads: Heads, n_layers: int
) -> tuple[SiteFactors, ...]:
    """Every adapted module as sites, in the order in which a forward pass meets them.

    Args:
        adapter: what was fine-tuned.
        family: how the model's modules are named.
        heads: of the model.
        n_layers: of the model.

    Raises:
        SiteError: a module that the model lacks.
        AdapterError: a fused projection of another size than the model's.
    """
    found: list[SiteFactors] = []
    for key, factors in adapter.modules.items():
        module, _, tag = key.partition("@")
        place = family.place(module)
        if place is None or (place.layer or 0) >= n_layers:
            raise _unknown_module(module, adapter, family, n_layers)
        _check_fused(module, place, heads, factors.B.shape[0], adapter.base_model)
        for kind in place.kinds:
            layer = _layer(place, kind, n_layers)
            rows = fused_rows(place, kind, heads, factors.B.shape[0])
            own = factors if rows is None else factors.rows(rows)
            name = site_name(layer, kind) + (f"@{tag}" if tag else "")
            found.append(SiteFactors(name, module, layer, kind, own, rows, tag))
    return tuple(sorted(found, key=lambda s: (s.layer, _ORDER.index(s.kind))))


def _layer(place: Place, kind: str, n_layers: int) -> int:
    if place.layer is not None:
        return place.layer
    return n_layers if kind == "unembed" else -1


def fused_rows(place: Place, kind: str, heads: Heads, out: int) -> Tensor | None:
    """Which output rows of a fused projection belong to a kind; None where it is not fused.

    Layout "blocks" is q|k|v one after another, or gate|up; "interleaved" is (head, 3, d_head).

    Args:
        place, out: of the module in its family, and how many rows it has.
        kind: one of those that it fuses.
        heads: the model's.
    """
    if place.layout == "whole":
        return None
    if place.layout == "interleaved":
        every = torch.arange(out).view(heads.n_heads, len(place.kinds), heads.d_head)
        return every[:, place.kinds.index(kind)].flatten()
    widths = [heads.of(k) * heads.d_head or out // len(place.kinds) for k in place.kinds]
    return torch.arange(out).split(widths)[place.kinds.index(kind)]


def _check_fused(module: str, place: Place, heads: Heads, out: int, base_model: str | None) -> None:
    expected = sum(heads.of(kind) for kind in place.kinds) * heads.d_head
    if place.layout != "whole" and expected and out != expected:
        raise AdapterError(
            f"{module}: the adapter writes {out} features, the model's fused projection has "
            f"{expected}. Was it trained on another base model? The adapter names {base_model!r}."
        )


def points_without_update(sites: Iterable[Site]) -> set[str]:
    """Hook points that show W z of an adapted site before its δ is added.

    Args:
        sites: the adapted ones.
    """
    found: set[str] = set()
    for site in sites:
        if site.kind == "o":
            found.add(f"blocks.{site.layer}.attn.hook_result")
        if site.kind == "unembed" and site.write == "unembed":
            found.add("unembed.hook_out")
    return found


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


def _unknown_module(module: str, adapter: Adapter, family: Family, n_layers: int) -> SiteError:
    known = [
        f"{family.layer.format(l=layer)}.{name}"
        for layer in range(n_layers)
        for name in family.linears
    ]
    near = difflib.get_close_matches(module, known, n=3, cutoff=0.3) or known[:3]
    places = (family.place(key.partition("@")[0]) for key in adapter.modules)
    if any(place is not None and (place.layer or 0) < n_layers for place in places):
        remedy = "use adapter.without(…) to leave a module out on purpose."
    else:
        remedy = (
            f"none of its {len(adapter)} modules exists here, so it is of another architecture (a "
            "UNet, an encoder, another family of language models)."
        )
    return SiteError(
        f"{module}: the model ({family.architectures[0]} naming, {n_layers} layers) has no such "
        f"linear module that can be adapted here; the nearest are {', '.join(near)}. The adapter "
        f"names the base {adapter.base_model!r}; {remedy}"
    )


Group = Literal["site", "layer", "kind"] | Mapping[str, str | Sequence[str]]
Groups = dict[str, tuple[int, ...]]


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
    return site.kind if site.kind in _OUTSIDE else f"layer {site.layer}"


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
