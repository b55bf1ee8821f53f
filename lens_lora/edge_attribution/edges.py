"""Edges: how much of first order passes through each reader of the residual stream.

    a_l = Σ_m ⟨δ_l, G_m⟩      m: attention and MLP of every block downstream, the final norm last

δ_l is the derivative, by ε_l, of what the site's own branch (attention, or the MLP) adds to the
residual stream. G_m is the gradient of g by the input of reader m alone, before its norm. So an
edge ⟨δ_l, G_m⟩ is the part of first order that goes from site l directly to m, and from there on by
any route. The last reader is the final norm, 'logits', or the point of a readout inside the model.

1. `edges` computes all of them at one gate value, from a forward pass with tangents for δ and a
   backward pass for G (`edge_attribution/by_reader.py`). They sum to first order, which each call
   checks. Along the path they sum to the exact shift (`edge_attribution/along_path.py`).
2. By head, attention is split into what each head's q, k and v read. By position, an edge is split
   over the tokens at which it is read.
3. The exact intervention is `patch_edges` (`edge_attribution/patch_edges.py`).

An edge does not say what two modules do together; `coupling` measures that.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, final, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.arguments import number, whole, word
from lens_lora.core import (
    Attribution,
    Effects,
    Entries,
    Evaluations,
    Function,
    Group,
    Groups,
    Measured,
    Quadrature,
    Ranked,
    Reported,
    Sites,
    analysis,
    by_axes,
    drawing,
    tables,
)
from lens_lora.edge_attribution.along_path import edges_along_path
from lens_lora.edge_attribution.by_reader import edge_values, point_of
from lens_lora.edge_attribution.graph_file import EdgesOfPrompt, graph_of
from lens_lora.errors import ArgumentError, require_finite
from lens_lora.formats.directions import is_stream

Readers = Literal["block", "head"]
# The text between writer and reader in the name of a measured edge.
ARROW = " → "
# A person can still follow this many edges in a graph.
_DRAWN = 30


@final
class Edges(Ranked, Reported):
    """First order of each site, or group of sites, split by what reads its output.

    Values are in the readout's units. `plot` is a heatmap of writer × reader in the order of a
    forward pass, in which pairs without an edge are grey.

    Attributes:
        values: [batch, group, reader], or with a last axis of positions; zero if the reader is not
            downstream. Their sum over readers is first order.
        groups: {name: indices into sites}; single sites carry their own name.
        readers: 'blocks.5.attn', 'blocks.5.mlp', …, and at the end 'logits', or the hook point of a
            `Projection`; by head such as 'blocks.5.attn.3.q', where k and v count the heads of keys
            and values.
        exists: [group, reader], whether the reader is downstream of a site of the group.
        at: the gate value at which first order is split; NaN along the path.
        by: () or ('position',), the position at which it is read.
        quadrature: how edges along the path were integrated; None at one gate value.
        sites, base, adapted, str_tokens, readout, units, meta: see `Measured`.
    """

    values: Float[Tensor, "batch group reader *position"]
    groups: Annotated[Groups, "group: site"]
    readers: Annotated[tuple[str, ...], "reader"]
    exists: Bool[Tensor, "group reader"]
    at: float
    by: tuple[str, ...] = ()
    quadrature: Quadrature | None = None

    @property
    def key(self) -> str:
        """The result's stable name: 'edges@0', or 'edges/path'."""
        return "edges/path" if self.quadrature is not None else f"edges@{self.at:g}"

    @property
    def per_edge(self) -> Float[Tensor, "batch group reader"]:
        """The values, summed over positions."""
        return self.values.sum(3) if self.by else self.values

    @property
    def first_order(self) -> Float[Tensor, "batch group"]:
        """First order of each group, Σ_m ⟨δ_l, G_m⟩; along the path its integral c_l."""
        return self.per_edge.sum(2)

    def entries(self, prompt: int | None = None) -> Entries:
        """Each edge's value, summed over positions."""
        of_writers = self._writer_labels
        writers, readers = self.exists.nonzero(as_tuple=True)
        labels: dict[str, list[object]] = {}
        for name, column in of_writers.items():
            labels[name] = [column[i] for i in writers.tolist()]
        labels["reader"] = [self.readers[i] for i in readers.tolist()]
        values, shift = self.mean_over(prompt, self.per_edge[:, writers, readers])
        return Entries(labels, values, shift, "value")

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and edge (and position): writer, reader, value, share of the shift."""
        axes: list[Mapping[str, Iterable[object]]] = [
            {"prompt": range(len(self.values))},
            self._writer_labels,
            {"reader": self.readers},
        ]
        is_there = self.exists.expand(len(self.values), -1, -1)
        if self.by:
            axes.append({"position": range(self.values.shape[3])})
            is_there = is_there[..., None] & self._has_position[:, None, None]
        numbers = {"value": self.values, "share": self.share_of(self.values)}
        every = tables.long_table(numbers, *axes)
        frame = every.loc[is_there.flatten().numpy()].reset_index(drop=True)
        if self.by:
            tokens = tables.tokens_at(self.str_tokens, frame["prompt"], frame["position"])
            frame.insert(list(frame).index("position") + 1, "token", tokens)
        return frame

    @property
    def _writer_labels(self) -> dict[str, list[Any]]:
        """The writer of each group; if that is a single site, with its module, layer and kind."""
        labels = Sites(self.sites).columns_of_groups(self.groups)
        if "site" not in labels:
            return {"writer": list(self.groups)}
        return {"writer": list(self.groups), **labels}

    @property
    def _has_position(self) -> Bool[Tensor, "batch position"]:
        """Whether each prompt has each position."""
        lengths = torch.tensor([len(tokens) for tokens in self.str_tokens])
        return torch.arange(self.values.shape[3]) < lengths[:, None]

    def along(self, effects: Attribution | Effects) -> Effects:
        """These edges in the order of what `patch_edges` measured, for `compare`.

        Args:
            effects: the result of `patch_edges`.

        Raises:
            ArgumentError: other effects; or an edge whose sites these groups do not make up, or
                whose reader is not among these; the error names it.
        """
        if not isinstance(effects, Effects) or effects.of != "edge":
            raise ArgumentError(
                f"edges agree with effects of edges, and {effects.key} has none",
                remedy="measure them with ll.patch_edges.",
            )
        values: list[Tensor] = []
        for name, members in effects.groups.items():
            writer, _, reader = name.rpartition(ARROW)
            rows = self._rows_of(members)
            if rows is None or reader not in self.readers:
                raise ArgumentError(
                    f"{name} is not among these edges",
                    remedy=f"compute them by site, or with the group= of {writer!r}, and with "
                    "readers='head' where a head was patched.",
                )
            of_reader = self.per_edge[:, rows, self.readers.index(reader)]
            values.append(of_reader.sum(1))
        labels = {field.name: getattr(self, field.name) for field in dataclasses.fields(Measured)}
        return Effects(
            values=torch.stack(values, 1), groups=effects.groups, how=self.key, of="edge", **labels
        )

    def _rows_of(self, members: Sequence[int]) -> list[int] | None:
        """The groups that make up these sites; None if no groups do.

        It is one group of the same sites, or several groups without overlap.
        """
        wanted = set(members)
        parts: list[int] = []
        covered: list[int] = []
        for row, sites in enumerate(self.groups.values()):
            if set(sites) == wanted:
                return [row]
            if set(sites) <= wanted:
                parts.append(row)
                covered += sites
        if sorted(covered) != sorted(wanted):
            return None
        return parts

    def plot_graph(self, k: int = _DRAWN, prompt: int | None = None) -> drawing.Figure:
        """The k strongest edges, from writers on the left to readers on the right.

        Args:
            k: how many.
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt; k below 1.
        """
        return drawing.graph(self, k, prompt)

    def save_graph(self, path: str | Path, prompt: int | None = None, k: int | None = None) -> Path:
        """Write the graph of one prompt in the JSON that circuit-tracer and Neuronpedia read.

        Nodes are writers, readers and the readout. They are at the token at which an edge is read
        if the edges were split by position, else at the last token. A reader's link to the readout
        is the sum of the edges into it.

        Args:
            path: the file; its name without the suffix becomes the graph's name.
            prompt: an index; without it, the only prompt.
            k: only the k strongest edges; None for all.

        Returns:
            The path.

        Raises:
            ArgumentError: several prompts and none named, no such prompt, a k below 1.
        """
        path = Path(path)
        index = self.only_prompt(prompt, "graphs")
        most = None if k is None else whole("k", k, 1)
        graph = graph_of(self._of_prompt(index), path.stem, most)
        path.write_text(json.dumps(graph, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        return path

    def _of_prompt(self, index: int) -> EdgesOfPrompt:
        tokens = self.str_tokens[index]
        if self.by:
            values = self.values[index, :, :, : len(tokens)]
        else:
            values = self.values[index, :, :, None]
        return EdgesOfPrompt(
            tokens=tokens,
            values=values,
            writers={name: self.sites[sites[0]].layer for name, sites in self.groups.items()},
            readers=self.readers,
            readout=self.readout,
            units=self.units,
            at=self.at,
            model=self.meta["model"],
            adapter=self.meta["adapter"],
        )


@analysis
def edges(
    g: Evaluations,
    readers: Readers = "block",
    *,
    at: float = 0.0,
    path: bool = False,
    tol: float = 1e-3,
    by: tuple[str, ...] | str = (),
    group: Group = "site",
    max_nodes: int = 65,
) -> Edges:
    """Split first order of each site, or along the path the whole shift, by what reads its output.

    Cost: one forward and one backward pass and, for all edges together, one or two forward passes
    more; by head up to five. The exact shift takes one more forward pass, or two if `at` is neither
    0 nor 1. Along the path it is that much at each node, usually 5 or 9 of them, and eight forward
    passes for the noise floor of the shift; the end nodes give the shift itself.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read from the logits; or a `Projection` at a point of the residual
            stream. The readers are then those before the point, and the point itself in place of
            'logits'.
        readers: 'block' for attention and MLP of each block, or 'head' to split attention into each
            head's q, k and v.
        at: the gate value at which first order is taken: 0 base, 1 adapted.
        path: whether to integrate every edge along the path from the base to the adapted model, as
            `path_attribution` integrates whole sites: the edges then sum to the exact shift.
        tol: along the path, the completeness error allowed for every prompt, as a share of its
            shift.
        by: 'position' to split each edge by the token at which it is read.
        group: sum over writers by 'layer', 'kind' or {name: site names or globs}.
        max_nodes: along the path, the largest number of nodes of a rule, at least 5.
        progress: show a bar over groups of prompts.

    Returns:
        Edges with values [batch, site, reader], in the readout's units. Their sum over readers is
        first order, or along the path c_l, where `quadrature` says how completely they sum.

    Raises:
        ArgumentError: other readers, another axis or group, a KL at 0, an `at` together with
            `path`, a tol or max_nodes out of range, too little memory, or a `Projection` outside
            the residual stream.
        SiteError: a glob of a group that matches no site.
        ModelStateError: the edges of a site do not sum to its first order; heads that are not
            known; an operation without a forward-mode derivative.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a derivative is not finite.
    """
    require_stream(g)
    word("readers", readers, get_args(Readers))
    at = number("at", at)
    axes = by_axes(by, ("position",))
    if path and at:
        raise ArgumentError(
            f"at={at:g} is one point of the path, and path=True integrates over all of them",
            remedy="leave one of the two out.",
        )
    if at == 0 and not path:
        g.require_slope_at_base()
    groups = g.lens.sites.grouped(group)
    by_head = readers == "head"
    by_position = bool(axes)
    quadrature = None
    if path:
        split = edges_along_path(
            g, by_head=by_head, by_position=by_position, tol=tol, max_nodes=max_nodes
        )
        quadrature = split.quadrature
        # The values are of no single ε.
        at = math.nan
    else:
        split = edge_values(g, at, by_head=by_head, by_position=by_position)
        require_finite(split.values, "an edge")
        g.know(at, split.value)
    members = g.lens.sites.indicator(groups).to(split.values)
    sites_upstream = members.cpu() @ split.exists.to(members.dtype)
    return Edges(
        values=torch.einsum("gs,bs...->bg...", members, split.values),
        groups=groups,
        readers=split.readers,
        exists=sites_upstream > 0,
        at=at,
        by=axes,
        quadrature=quadrature,
        **g.header(),
    )


def require_stream(g: Function) -> None:
    """Refuse a readout inside the model that does not read the residual stream of a block."""
    point = point_of(g)
    if point is None:
        return
    last = f"blocks.{g.lens.host.n_layers - 1}.hook_resid_post"
    if not is_stream(point):
        raise ArgumentError(
            f"{point} is no point of the residual stream, and edges can only end at one",
            remedy=f"read the direction at a point such as {last!r}, or use ll.first_order, which "
            "takes any point.",
        )
    if not point.startswith("blocks."):
        raise ArgumentError(
            f"{point} is within the final norm, which is a reader itself",
            remedy=f"name the point before it, {last!r}, which holds the same.",
        )
