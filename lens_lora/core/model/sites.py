"""Sites: the adapted linear maps and norms, named as the model's hook points, and groups of them.

1. A Hugging Face module becomes one site, or three where it fuses q, k and v: row i of the fused
   output belongs to the kind that the family's layout names, and the site takes those rows of B
   (`resolve_sites`). A module that the model lacks is refused, with the nearest that it has.
2. Parameters that were trained whole are turned to [out, in], as factors are.
3. Sites are chosen by their own name, by their module's path as Hugging Face or PEFT writes it, or
   by a glob of either (`match_sites`). They are grouped by layer, kind of module or named subset
   (`group_sites`). A site's number may be split along `AXES` (`by_axes`).
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core.adapter.adapter import Adapter
from lens_lora.core.adapter.factors import LoRAFactors, ModuleUpdate, TrainedModule
from lens_lora.core.adapter.peft_read import PREFIX
from lens_lora.errors import AdapterError, ArgumentError, ModelStateError, SiteError, first_few
from lens_lora.families import NORM_KINDS, Family, Place

ATTENTION_KINDS = ("q", "k", "v", "o")
EMBEDDING_KINDS = ("embed", "pos_embed")
MLP_KINDS = ("gate", "up", "fc_in", "down", "fc_out")
WRITER_KINDS = ("o", "down", "fc_out", *EMBEDDING_KINDS)
OUTSIDE_KINDS = (*EMBEDDING_KINDS, "embed_ln", "ln_final", "unembed")
# The kinds of usual attention and MLPs; any other is named by its path.
USUAL_KINDS = (*ATTENTION_KINDS, *MLP_KINDS, *OUTSIDE_KINDS, *NORM_KINDS)
# The norm of its block that a linear map reads; o, down and fc_out read none.
NORM_READ_BY: dict[str, str] = {
    **dict.fromkeys(("q", "k", "v"), "ln1"),
    **dict.fromkeys(("gate", "up", "fc_in"), "ln2"),
}
AXES = ("position", "head", "expert", "rank")
Group = Literal["site", "layer", "kind"] | Mapping[str, str | Sequence[str]]
Groups = dict[str, tuple[int, ...]]
# Hook points: a name, several names or globs, or a predicate of a name.
Names = str | Sequence[str] | Callable[[str], bool]


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
        experts: how many share the ranks, one after another; 0 where the weight is no stack.
    """

    name: str
    module: str
    layer: int
    kind: str
    read: str
    write: str
    rank: int
    adapter: str = ""
    experts: int = 0

    @property
    def writes_to_stream(self) -> bool:
        """Whether its output is added to the residual stream, as that of o, down and embeddings."""
        return self.kind in WRITER_KINDS


@dataclasses.dataclass(frozen=True)
class Heads:
    """The model's attention heads.

    Attributes:
        n_heads: how many of queries.
        n_kv: how many of keys and values.
        d_head: their width.
    """

    n_heads: int
    n_kv: int
    d_head: int

    def of(self, kind: str) -> int:
        """How many heads a site of this kind has; 0 outside attention."""
        of_queries, of_keys = ("q", "o", "q_norm"), ("k", "v", "k_norm")
        return self.n_heads if kind in of_queries else self.n_kv if kind in of_keys else 0


def require_heads(sites: Iterable[Site]) -> None:
    """Check that each site's features may be split over the model's heads, or are of no heads."""
    for site in sites:
        if site.kind.partition(".")[0].endswith("attn"):
            raise ModelStateError(
                f"{site.name} ({site.module}): this attention's heads are not laid out as the "
                "model's n_heads and d_head say, so the site cannot be split by head. Leave 'head' "
                "out of by."
            )


def points_between(writers: Iterable[tuple[Site, str]]) -> tuple[str, ...]:
    """Hook points between a site's input and the point at which its δ is added.

    hook_result holds z W_O by head; where o's δ is added after the sum of the heads,
    hook_hidden_states holds that sum before.
    """
    points: dict[str, None] = {}
    for site, write in writers:
        attention = f"blocks.{site.layer}.attn."
        if site.kind == "o":
            points[f"{attention}hook_result"] = None
        if write == f"{attention}hook_out":
            points[f"{attention}hook_hidden_states"] = None
    return tuple(points)


def match_sites(sites: Sequence[Site], values: Mapping[str, Any]) -> dict[int, Any]:
    """Site index → value, for a mapping from names or globs of sites; later keys win.

    Each key is a site's name or its module's path, or a glob of either.

    Raises:
        SiteError: a key that matches no site, with the nearest names.
    """
    chosen: dict[int, Any] = {}
    for glob, value in values.items():
        if not isinstance(glob, str):
            raise SiteError(f"{glob!r} names no site; give a name or a glob, such as '*.attn.v'.")
        for index in _sites_named(sites, glob):
            chosen[index] = value
    return chosen


def _sites_named(sites: Sequence[Site], glob: str) -> list[int]:
    """The sites whose name the glob matches; if there are none, those whose module it matches.

    A module's path may begin as PEFT's own names do: 'base_model.model.model.layers.3.…'.
    """
    by_name = [i for i, site in enumerate(sites) if fnmatch.fnmatchcase(site.name, glob)]
    if by_name:
        return by_name
    path = glob.removeprefix(PREFIX)
    by_module: list[int] = []
    for index, site in enumerate(sites):
        part_of_a_sum = f"{site.module}@{site.adapter}"
        if fnmatch.fnmatchcase(site.module, path) or fnmatch.fnmatchcase(part_of_a_sum, path):
            by_module.append(index)
    if by_module:
        return by_module
    names = [site.name for site in sites]
    modules = list(dict.fromkeys(site.module for site in sites))
    near = difflib.get_close_matches(path, [*names, *modules], n=3, cutoff=0.3)
    raise SiteError(f"{glob!r} matches no site; the nearest are {near or names[:3]}.")


def chosen_sites(sites: Sequence[Site], names: str | Sequence[str] | None) -> tuple[int, ...]:
    """Indices of the sites that are named, in their own order; all for None."""
    if names is None:
        return tuple(range(len(sites)))
    patterns = [names] if isinstance(names, str) else list(names)
    if not patterns:
        raise SiteError("sites=[] chooses nothing; give site names or globs, or None for all.")
    return tuple(sorted(match_sites(sites, dict.fromkeys(patterns, True))))


def one_site(sites: Sequence[Site], name: str) -> int:
    """The index of the only site that a name, a module's path, or a glob matches."""
    hits = list(match_sites(sites, {name: 0}))
    if len(hits) > 1:
        found = first_few([sites[index].name for index in hits])
        raise SiteError(f"{name!r} matches {len(hits)} sites; name one of {found}.")
    return hits[0]


def group_sites(sites: Sequence[Site], group: Group = "site") -> Groups:
    """{group name: indices of its sites}, in the order of the sites."""
    if isinstance(group, Mapping):
        if not group:
            raise ArgumentError("group={} holds no group; name at least one.")
        return {name: chosen_sites(sites, _globs(globs)) for name, globs in group.items()}
    labels = {"site": attrgetter("name"), "layer": _layer_label, "kind": attrgetter("kind")}
    if not isinstance(group, str) or group not in labels:
        raise ArgumentError(
            f"group {group!r}: expected 'site', 'layer', 'kind', or {{name: globs of sites}}."
        )
    groups: dict[str, list[int]] = {}
    for index, site in enumerate(sites):
        groups.setdefault(labels[group](site), []).append(index)
    return {name: tuple(indices) for name, indices in groups.items()}


def indicator(groups: Groups, sites: int) -> Float[Tensor, "group site"]:
    """1 where a site is in a group, else 0."""
    rows = torch.zeros(len(groups), sites, dtype=torch.float64)
    for row, indices in zip(rows, groups.values(), strict=True):
        row[list(indices)] = 1
    return rows


def _globs(globs: str | Sequence[str]) -> list[str]:
    if not globs or not isinstance(globs, Sequence):
        raise SiteError(f"a group of {globs!r}: give it a site name, a glob, or a list of them.")
    return [globs] if isinstance(globs, str) else list(globs)


def _layer_label(site: Site) -> str:
    return site.kind if site.kind in OUTSIDE_KINDS or site.layer < 0 else f"layer {site.layer}"


_BLOCK = re.compile(r"blocks\.(\d+)\.")


def layer_order(names: Sequence[str]) -> list[int]:
    """Indices that put the blocks' names in the order of layers; others keep their places.

    A TransformerBridge has its hook points in the order of the alphabet: 0, 1, 10, 11, …, 2.
    """
    layers = {i: int(match[1]) for i, name in enumerate(names) if (match := _BLOCK.match(name))}
    ordered = iter(sorted(layers, key=layers.__getitem__))
    return [next(ordered) if i in layers else i for i in range(len(names))]


def by_axes(by: tuple[str, ...] | str, axes: tuple[str, ...] = AXES) -> tuple[str, ...]:
    """`by` in canonical order."""
    wanted = tuple(by) if isinstance(by, Iterable) and not isinstance(by, str) else (by,)
    unknown = [axis for axis in wanted if axis not in axes]
    if unknown:
        groups = " Layers and kinds are sums over sites: .sum('layer') of the result, or group="
        remedy = f"{groups}'layer' with by='token'." if {"layer", "kind"} & {*wanted} else ""
        raise ArgumentError(f"by={by!r}: expected any of {axes}.{remedy}")
    if {"expert", "rank"} <= set(wanted):
        raise ArgumentError(
            f"by={by!r}: the ranks of a stack of experts are those of one expert after another, so "
            "'rank' alone tells both."
        )
    return tuple(axis for axis in axes if axis in wanted)


# --- an adapter's modules as sites, before they meet the model's basis


# The order in which a forward pass meets the kinds.
_ORDER = (
    *("embed", "pos_embed", "embed_ln"),
    *("ln1", "q", "k", "v", "q_norm", "k_norm", "o", "ln1_post"),
    *("ln2", "gate", "up", "fc_in", "down", "fc_out", "ln2_post"),
    *("ln_final", "unembed"),
)


_OF_STACKS = {"gate_up_proj": "up", "up_proj": "up", "down_proj": "down"}


@dataclasses.dataclass(frozen=True)
class SiteFactors:
    """A site before it meets the model's basis: its own output rows, in the Hugging Face basis.

    Attributes:
        name: 'blocks.3.attn.q', with the part of a sum behind '@'.
        module: path that the adapter names.
        path: that of the module of these rows: another one where the base ties it to `module`.
        layer: its number.
        kind: such as 'q'.
        factors: those of these rows; trained parameters are [out, in].
        rows: those of a fused module; None for all.
        adapter: the part of a sum.
        base_model: the base that the adapter names.
    """

    name: str
    module: str
    path: str
    layer: int
    kind: str
    factors: ModuleUpdate
    rows: Tensor | None
    adapter: str
    base_model: str | None

    @property
    def label(self) -> str:
        """For errors: 'blocks.3.attn.q (model.layers.3.self_attn.q_proj)'."""
        return f"{self.name} ({self.module})"

    def misfit(self, facts: str) -> AdapterError:
        """The error for parameters that do not fit the model's."""
        return _misfit(self.label, facts, self.base_model)

    @property
    def key(self) -> str:
        """The adapter's own key of the module, with the part of a sum behind '@'."""
        return f"{self.module}@{self.adapter}" if self.adapter else self.module


def site_name(layer: int, kind: str, adapter: str = "") -> str:
    """'blocks.3.attn.q', or the kind alone outside the blocks; then the part of a sum."""
    tag = f"@{adapter}" if adapter else ""
    if kind in OUTSIDE_KINDS or layer < 0:
        return f"{kind}{tag}"
    if kind in (*ATTENTION_KINDS, "q_norm", "k_norm"):
        return f"blocks.{layer}.attn.{kind}{tag}"
    return f"blocks.{layer}.{f'mlp.{kind}' if kind in MLP_KINDS else kind}{tag}"


def resolve_sites(
    adapter: Adapter, family: Family, heads: Heads, n_layers: int
) -> tuple[SiteFactors, ...]:
    """Every adapted module as sites, in the order in which a forward pass meets them.

    Raises:
        SiteError: a module that the model lacks.
        AdapterError: a fused projection of another size than the model's.
    """
    sites: list[SiteFactors] = []
    for key, factors in adapter.modules.items():
        module, _, tag = key.partition("@")
        place = family.place(module)
        if place is None or not _can_hold(place, factors, n_layers):
            raise _unknown_module(module, adapter, family, n_layers)
        factors = _turned(factors, family, place)
        out = _out(factors)
        expected = sum(heads.of(kind) for kind in place.kinds) * heads.d_head
        expected = sum(map(len, place.rows.values())) or expected
        if place.layout != "whole" and expected not in (0, out):
            facts = f"the adapter writes {out} features, the fused projection has {expected}"
            raise _misfit(module, facts, adapter.base_model)
        for kind in place.kinds:
            layer = outside_layer(kind, n_layers) if place.layer is None else place.layer
            rows = fused_rows(place, kind, heads, out)
            part = factors if rows is None else factors.rows(rows)
            name, base = site_name(layer, kind, tag), adapter.base_model
            sites.append(SiteFactors(name, module, module, layer, kind, part, rows, tag, base))
    return tuple(sorted(sites, key=in_order))


def _can_hold(place: Place, factors: ModuleUpdate, n_layers: int) -> bool:
    """A norm has no factors."""
    is_norm = place.kinds[0] in NORM_KINDS
    return (place.layer or 0) < n_layers and not (is_norm and isinstance(factors, LoRAFactors))


def in_order(site: SiteFactors) -> tuple[int, int, str]:
    """Sort key: the order in which a forward pass meets the sites.

    A kind that is named by its path ('conv.in', 'mlp.shared_expert.up') comes where an o, or what
    an MLP writes, would; a stack of experts where up and down are.
    """
    usual = "fc_out" if site.kind.startswith("mlp.") else "o"
    usual = _OF_STACKS.get(site.kind.rpartition(".")[2], usual)
    return site.layer, _ORDER.index(site.kind if site.kind in _ORDER else usual), site.kind


def _turned(factors: ModuleUpdate, family: Family, place: Place) -> ModuleUpdate:
    """Weights of the base or trained ones as [out, in]; A and B are so already."""
    if not family.stores_transposed(place.kinds[0]):
        return factors
    if isinstance(factors, TrainedModule):
        return factors.turned()
    stored = factors.base_weight
    return factors if stored is None else dataclasses.replace(factors, base_weight=stored.T)


def _out(factors: ModuleUpdate) -> int:
    """The number of output rows."""
    if isinstance(factors, LoRAFactors):
        return len(factors.B)
    held = factors.bias if factors.weight is None else factors.weight
    return 0 if held is None else len(held)


def outside_layer(kind: str, n_layers: int) -> int:
    """The layer of what lies outside the blocks: −1, or after the last."""
    return n_layers if kind in ("ln_final", "unembed") else -1


def fused_rows(place: Place, kind: str, heads: Heads, out: int) -> Tensor | None:
    """Which output rows of a fused projection belong to a kind; None where it is not fused.

    Layout "blocks" is q|k|v one after another, or gate|up; "interleaved" is (head, 3, d_head).
    """
    if place.layout in ("whole", "measured"):
        return place.rows.get(kind)
    rows, index = torch.arange(out), place.kinds.index(kind)
    if place.layout == "interleaved":
        return rows.view(heads.n_heads, -1, heads.d_head)[:, index].flatten()
    widths = [heads.of(k) * heads.d_head or out // len(place.kinds) for k in place.kinds]
    return rows.split(widths)[index]


def _misfit(where: str, facts: str, base_model: str | None) -> AdapterError:
    return AdapterError(
        f"{where}: {facts}. Was it trained on another base model? The adapter names {base_model!r}."
    )


def _unknown_module(module: str, adapter: Adapter, family: Family, n_layers: int) -> SiteError:
    known = family.linear_paths(n_layers)
    near = difflib.get_close_matches(module, known, n=3, cutoff=0.3) or known[:3]
    places = (family.place(key.partition("@")[0]) for key in adapter.modules)
    fact = (
        f"{module}: the model ({family.architectures[0]} naming, {n_layers} layers) has no such "
        f"linear module, embedding or norm that can be adapted here; the nearest are "
        f"{', '.join(near)}. The adapter names the base {adapter.base_model!r}"
    )
    if any(place is not None and (place.layer or 0) < n_layers for place in places):
        without = "adapter.without(…)"
        return SiteError(
            fact,
            remedy=f"use {without} to leave a module out on purpose.",
            in_shell=f"to leave a module out on purpose, in Python: {without}.save(folder).",
        )
    return SiteError(
        f"{fact}; none of its {len(adapter)} modules exists here, so it is of another architecture "
        "(a UNet, an encoder, another family of language models)."
    )
