"""Sites: the adapted linear maps and norms, named as the model's hook points.

`Sites` holds those of a lens, in order. They are chosen by their own name, by their module's path
as Hugging Face or PEFT writes it, or by a glob of either. They are grouped by layer, by kind of
module or in named subsets. A site's number may be split along `AXES` (`by_axes`).
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora import guesses
from lens_lora.core.adapter.peft_read import PREFIX
from lens_lora.errors import (
    ArgumentError,
    ModelStateError,
    NumericsError,
    SiteError,
    first_few,
    setting,
)
from lens_lora.families import NORM_KINDS

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
class Site(guesses.Answering):
    """One adapted linear map of the model, as data; or a norm whose γ or β was trained.

    Attributes:
        name: its name, such as 'blocks.3.attn.q' or 'blocks.3.ln1'.
        module: the Hugging Face path that the adapter names.
        layer: the number of the block; −1 for embeddings, and the number of blocks for the final
            norm and the unembedding.
        kind: its kind, such as 'q' or 'ln1'.
        read: the hook point or module at which z is read; a norm reads the normalised value.
        write: the hook point or module at which s·B·A·z is added.
        rank: the rank of the factors of ΔW, plus one for a change of bias; for a norm, the number
            of its features, plus one for a change of β.
        adapter: the adapter of a sum to which it belongs; the site's name then ends in '@' and that
            name.
        experts: the number of experts whose ranks follow one another; 0 if the weight is no stack.
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

    remedies: ClassVar[Mapping[str, str]] = guesses.OF_SITE

    @property
    def writes_to_stream(self) -> bool:
        """Whether its output is added to the residual stream, as for o, down and embeddings."""
        return self.kind in WRITER_KINDS

    @property
    def is_outside(self) -> bool:
        """Whether it is outside the blocks: an embedding, the final norm or the unembedding."""
        return self.kind in OUTSIDE_KINDS


class Sites(guesses.Answering, tuple[Site, ...]):
    """The sites of a lens or a result, in the order in which a forward pass meets them."""

    remedies: ClassVar[Mapping[str, str]] = guesses.OF_SITES

    if not TYPE_CHECKING:  # A tuple's overloads take numbers and slices alone.

        def __getitem__(self, key: Any) -> Any:
            """A site by its number or its name, or the sites of a slice.

            Args:
                key: a number, a slice, or the name of one site, the path of its module, or a glob
                    that matches it alone.

            Raises:
                SiteError: no such site, or a glob that matches several.
            """
            if isinstance(key, str):
                key = self.one(key)
            found = tuple.__getitem__(self, key)
            return Sites(found) if isinstance(found, tuple) else found

    def chosen(self, names: str | Sequence[str] | None) -> tuple[int, ...]:
        """The indices of the sites that some names match, in order.

        Args:
            names: names of sites, paths of their modules, or globs of either; None for all sites.

        Raises:
            SiteError: a name that matches no site (the nearest are given), or no name at all.
        """
        if names is None:
            return tuple(range(len(self)))
        if not isinstance(names, Iterable):
            raise SiteError(
                f"{setting('sites', names)}: expected site names or globs, or None for all."
            )
        patterns = [names] if isinstance(names, str) else list(names)
        if not patterns:
            raise SiteError("sites=[] chooses nothing; give site names or globs, or None for all.")
        matched = match_sites(self, dict.fromkeys(patterns, True))
        return tuple(sorted(matched))

    def one(self, name: str) -> int:
        """The index of the one site that a name, a module's path or a glob matches.

        Args:
            name: the name, the path, or a glob of either.

        Raises:
            SiteError: no such site, or a glob that matches several.
        """
        matched = list(match_sites(self, {name: True}))
        if len(matched) > 1:
            names = first_few([self[index].name for index in matched])
            fact = f"{name!r} matches {len(matched)} sites; name one of {names}"
            raise SiteError(f"{fact}, or all of them with sites.chosen({name!r}).")
        return matched[0]

    def require_finite(self, slopes: Float[Tensor, "batch site *by"]) -> None:
        """Check that slopes are finite.

        Args:
            slopes: ∂g/∂ε_l, or parts of it.

        Raises:
            NumericsError: some slope is not finite; the error names its site.
        """
        by_part = slopes.flatten(2) if slopes.ndim > 2 else slopes[..., None]
        is_finite = torch.isfinite(by_part).all(-1).all(0)
        broken = (~is_finite).nonzero()
        if len(broken):
            site = self[int(broken[0])]
            raise NumericsError(
                f"the derivative at {site.name} ({site.write}) is not finite; lens.logits(prompts) "
                "names the first hook point with non-finite activations, if the model has one. If "
                "it has none, the readout has no derivative there, as a root or a norm has none at "
                "zero."
            )

    def grouped(self, group: Group = "site") -> Groups:
        """The indices of the sites of each group, by the name of the group.

        Args:
            group: 'site', 'layer', 'kind', or {name: globs of its sites}.

        Raises:
            ArgumentError: another word, or no group.
            SiteError: a glob that matches no site.
        """
        if isinstance(group, Mapping):
            if not group:
                raise ArgumentError("group={} holds no group; name at least one.")
            return {name: self.chosen(_globs(globs)) for name, globs in group.items()}
        if not isinstance(group, str) or group not in _LABELS:
            meant = guesses.meant_choice("group", group, _LABELS)
            raise ArgumentError(
                f"group {group!r}: expected 'site', 'layer', 'kind', or {{name: globs of sites}}."
                f"{meant}"
            )
        label = _LABELS[group]
        groups: dict[str, list[int]] = {}
        for index, site in enumerate(self):
            groups.setdefault(label(site), []).append(index)
        return {name: tuple(indices) for name, indices in groups.items()}

    def is_partition(self, groups: Groups) -> bool:
        """Whether every site is in exactly one of these groups.

        Args:
            groups: the indices of the sites of each group, as from `grouped`.
        """
        members = itertools.chain.from_iterable(groups.values())
        return sorted(members) == list(range(len(self)))

    def indicator(self, groups: Groups) -> Float[Tensor, "group site"]:
        """The gates that switch on one group each: 1 for its sites, 0 for the others.

        Args:
            groups: groups of these sites, as from `grouped`.
        """
        rows = torch.zeros(len(groups), len(self), dtype=torch.float64)
        for row, indices in zip(rows, groups.values(), strict=True):
            row[list(indices)] = 1
        return rows

    def columns(self) -> dict[str, list[Any]]:
        """The columns site, module, layer and kind of a table with these sites as rows."""
        return {
            "site": [site.name for site in self],
            "module": [site.module for site in self],
            "layer": [site.layer for site in self],
            "kind": [site.kind for site in self],
        }

    def columns_of_groups(self, groups: Groups, *, sizes: bool = True) -> dict[str, list[Any]]:
        """The columns of a table with groups as rows.

        If every group is a single site, these are the labels of the sites; a group that has another
        name than its site, as a rank has, is named in a column of its own. Otherwise they are the
        names of the groups, and the number of sites in each.

        Args:
            groups: groups of these sites.
            sizes: whether the number of sites is a column.
        """
        by_name: dict[str, list[Any]] = {"group": list(groups)}
        counts = [len(members) for members in groups.values()]
        if any(count != 1 for count in counts):
            return {**by_name, "sites": counts} if sizes else by_name
        only_sites = Sites(self[members[0]] for members in groups.values())
        labels = only_sites.columns()
        has_own_names = labels["site"] != by_name["group"]
        return {**by_name, **labels} if has_own_names else labels


@dataclasses.dataclass(frozen=True)
class Heads:
    """The model's attention heads.

    Attributes:
        n_heads: the number of heads of queries.
        n_kv: the number of heads of keys and values.
        d_head: the width of a head.
    """

    n_heads: int
    n_kv: int
    d_head: int

    def of(self, kind: str) -> int:
        """How many heads a site of this kind has; 0 outside attention."""
        if kind in ("q", "o", "q_norm"):
            return self.n_heads
        if kind in ("k", "v", "k_norm"):
            return self.n_kv
        return 0


def require_heads(sites: Iterable[Site]) -> None:
    """Check that every site of attention can be split by head.

    Raises:
        ModelStateError: attention whose heads are not laid out as the model says.
    """
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
    """The value of each site that some name matches, by the site's index.

    Args:
        sites: all sites.
        values: {name of a site, path of its module, or a glob of either: value}. If several keys
            match a site, the last one counts.

    Raises:
        SiteError: a key that matches no site; the nearest names are given.
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
    by_name: list[int] = []
    for index, site in enumerate(sites):
        if fnmatch.fnmatchcase(site.name, glob):
            by_name.append(index)
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
    raise _matches_no_site(sites, glob, path)


def _matches_no_site(sites: Sequence[Site], glob: str, path: str) -> SiteError:
    """The error for a glob that matches no site, with the nearest names, or with a wider glob.

    Args:
        sites: all sites.
        glob: the glob as it was given.
        path: the same without PEFT's prefix.
    """
    names = [site.name for site in sites]
    modules = list(dict.fromkeys(site.module for site in sites))
    near = difflib.get_close_matches(path, [*names, *modules], n=3, cutoff=0.3)
    fact = f"{glob!r} matches no site; the nearest are {near or names[:3]}"
    wider = f"*{path}*"
    is_part_of_a_name = any(fnmatch.fnmatchcase(name, wider) for name in (*names, *modules))
    if path and is_part_of_a_name:
        return SiteError(fact, remedy=f"the glob {wider!r} takes all whose name holds it.")
    return SiteError(f"{fact}.")


def _globs(globs: str | Sequence[str]) -> list[str]:
    if not globs or not isinstance(globs, Sequence):
        raise SiteError(f"a group of {globs!r}: give it a site name, a glob, or a list of them.")
    return [globs] if isinstance(globs, str) else list(globs)


def _layer_label(site: Site) -> str:
    is_outside = site.kind in OUTSIDE_KINDS or site.layer < 0
    return site.kind if is_outside else f"layer {site.layer}"


# How the groups of sites are named.
_LABELS: dict[str, Callable[[Site], str]] = {
    "site": attrgetter("name"),
    "layer": _layer_label,
    "kind": attrgetter("kind"),
}
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def layer_order(names: Sequence[str]) -> list[int]:
    """Indices that sort the names of blocks by layer; all other names keep their places.

    A TransformerBridge lists its hook points in alphabetical order: 0, 1, 10, 11, …, 2.
    """
    layers: dict[int, int] = {}
    for index, name in enumerate(names):
        match = _BLOCK.match(name)
        if match:
            layers[index] = int(match[1])
    order = list(range(len(names)))
    # Python's sort is stable: names of the same layer stay as they are.
    in_layers = sorted(layers, key=layers.__getitem__)
    for place, index in zip(layers, in_layers, strict=True):
        order[place] = index
    return order


def by_axes(
    by: tuple[str, ...] | str, axes: tuple[str, ...] = AXES, *, with_token: bool = False
) -> tuple[str, ...]:
    """Check the axes along which a site's number is to be split, and return them in order.

    Args:
        by: an axis, or several.
        axes: the axes that exist.
        with_token: whether 'token', the tokens of a response, is one as well; it comes last.

    Raises:
        ArgumentError: another axis, or 'expert' beside 'rank'.
    """
    if with_token:
        axes = (*axes, "token")
    is_one = isinstance(by, str) or not isinstance(by, Iterable)
    wanted = {by} if is_one else {*by}
    if not wanted <= {*axes}:
        if wanted & {"layer", "kind", "module", "site"}:
            remedy = (
                " Without by= there is a number for each site; layers and kinds are sums of them: "
                ".sum('layer') of the result, or group='layer' with by='token'."
            )
        else:
            remedy = guesses.meant_choice("by", by, axes)
        raise ArgumentError(f"by={by!r}: expected any of {axes}.{remedy}")
    if {"expert", "rank"} <= wanted:
        raise ArgumentError(
            f"by={by!r}: the ranks of a stack of experts are those of one expert after another, so "
            "'rank' alone tells both."
        )
    return tuple(axis for axis in axes if axis in wanted)


def site_name(layer: int, kind: str, adapter: str = "") -> str:
    """The name of a site, such as 'blocks.3.attn.q', 'unembed', or in a sum 'blocks.3.attn.q@a'."""
    tag = f"@{adapter}" if adapter else ""
    if kind in OUTSIDE_KINDS or layer < 0:
        return f"{kind}{tag}"
    if kind in (*ATTENTION_KINDS, "q_norm", "k_norm"):
        return f"blocks.{layer}.attn.{kind}{tag}"
    if kind in MLP_KINDS:
        return f"blocks.{layer}.mlp.{kind}{tag}"
    return f"blocks.{layer}.{kind}{tag}"
