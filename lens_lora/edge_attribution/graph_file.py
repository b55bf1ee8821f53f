"""Edges as an attribution graph in the JSON that circuit-tracer and Neuronpedia read.

A node is a writer, a reader, or the readout, at one token. Links are

    writer → reader     the edge ⟨δ_l, G_m⟩
    writer → readout    the edge to the last reader: 'logits', or the point of a `Projection`
    reader → readout    Σ_l of the edges into this reader: everything that passes through it

so that every path from a writer leads to the readout. A writer adds to the residual stream at the
token at which its reader reads, so both are at that token. If edges are summed over positions, all
nodes are at the last token.

The fields are those of `circuit_tracer/frontend/graph_models.py` (github.com/safety-research/
circuit-tracer) and of the graph schema of Neuronpedia (github.com/hijohnnylin/neuronpedia), which
both draw nodes by layer and token. `influence` is the cumulative share of Σ|link| over nodes, the
strongest first, by which both hide weak nodes.

Both programs expect more of the fields than their schemas say:

- The label of the node of feature type 'logit' has to end in '(p=' and a number, or they fail. A
  readout has no probability, so the number is 0, like `token_prob`.
- From schema version 1 on, `feature` is the Cantor pair of layer and index, which they take apart.
- Neuronpedia does not draw a graph whose writers and readers are all in block 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from lens_lora._version import __version__

# At first the viewer shows the strongest nodes, up to this share of Σ|link|.
_SHOWN_SHARE = 0.8
# Nodes are pinned until there are at least so many; without any, the viewer's subgraph is empty.
_PINNED = 10
# The viewers' name of the layer of embeddings.
_EMBEDDINGS = "E"
_GENERATOR = {"name": "lens_lora", "version": __version__}


@dataclasses.dataclass(frozen=True)
class EdgesOfPrompt:
    """The edges of one prompt.

    Attributes:
        tokens: the prompt's tokens.
        values: the edges, at each position or with a single last entry, the sum over positions.
        writers: the layer of each writer's first site, by the writer's name.
        readers: the names of the readers, in the order of a forward pass.
        readout, units: the readout's label and its units.
        at: the gate value at which first order is taken; NaN along the path.
        model, adapter: the names of the model and the adapter.
    """

    tokens: Sequence[str]
    values: Float[Tensor, "writer reader position"]
    writers: Mapping[str, int]
    readers: Sequence[str]
    readout: str
    units: str
    at: float
    model: str
    adapter: str


class _Node(NamedTuple):
    """A writer, a reader or the readout, at one token.

    Attributes:
        name: the name of the writer or reader.
        is_writer: whether it writes.
        layer: the layer in the viewers' numbering.
        number: its index among all writers and readers.
        position: the index of its token.
    """

    name: str
    is_writer: bool
    layer: str
    number: int
    position: int

    @property
    def node_id(self) -> str:
        """The node's name in links: layer, index and token."""
        return f"{self.layer}_{self.number}_{self.position}"

    @property
    def feature(self) -> int:
        """The Cantor pairing of layer and index, one number; for an embedding the index alone."""
        if self.layer == _EMBEDDINGS:
            return self.number
        layer = int(self.layer)
        return (layer + self.number) * (layer + self.number + 1) // 2 + self.number


class _Link(NamedTuple):
    source: str
    target: str
    weight: float


def graph_of(edges: EdgesOfPrompt, slug: str, k: int | None) -> dict[str, Any]:
    """The graph of one prompt, as plain data for JSON.

    Args:
        edges: the prompt's edges.
        slug: the name of the graph.
        k: only the k strongest edges; None for all that are not zero.
    """
    n_layers = _layer_count(edges.readers)
    readout = _Node(
        name=edges.readout,
        is_writer=False,
        layer=str(n_layers + 1),
        number=0,
        position=len(edges.tokens) - 1,
    )
    last_reader = len(edges.readers) - 1
    nodes = {readout.node_id: readout}
    links: list[_Link] = []
    # Σ_l of the edges into each reader.
    through: dict[str, float] = {}
    for edge in _strongest(edges, k):
        writer = _writer_node(edges, edge.writer, n_layers, edge.position)
        nodes[writer.node_id] = writer
        if edge.reader == last_reader:
            links.append(_Link(writer.node_id, readout.node_id, edge.value))
            continue
        reader = _reader_node(edges, edge.reader, edge.position)
        nodes[reader.node_id] = reader
        links.append(_Link(writer.node_id, reader.node_id, edge.value))
        through[reader.node_id] = through.get(reader.node_id, 0.0) + edge.value
    for node_id, value in through.items():
        links.append(_Link(node_id, readout.node_id, value))

    influence = _influence(links)
    return {
        "metadata": _metadata(edges, slug),
        "qParams": {
            "pinnedIds": _pinned(links),
            "supernodes": [],
            "linkType": "both",
            "clickedId": readout.node_id,
            "sg_pos": "",
        },
        "nodes": [_node_fields(node, readout, influence) for node in nodes.values()],
        "links": [link._asdict() for link in links],
    }


class _Edge(NamedTuple):
    """One edge: the indices of its writer, its reader and its token, and its value."""

    writer: int
    reader: int
    position: int
    value: float


def _strongest(edges: EdgesOfPrompt, k: int | None) -> Iterator[_Edge]:
    """The k strongest edges, or all; without those that are zero."""
    values = edges.values.double()
    _, n_readers, n_positions = values.shape
    # Sums over positions are put at the last token.
    first_position = len(edges.tokens) - 1 if n_positions == 1 else 0
    order = values.abs().flatten().argsort(descending=True, stable=True)
    for place in order[:k].tolist():
        value = float(values.flatten()[place])
        if value == 0:
            return
        pair, position = divmod(place, n_positions)
        writer, reader = divmod(pair, n_readers)
        yield _Edge(writer, reader, first_position + position, value)


def _layer_count(readers: Iterable[str]) -> int:
    """One more than the number of the last block that a reader is named after."""
    in_blocks = [name for name in readers if name.startswith("blocks.")]
    return 1 + max(int(name.split(".")[1]) for name in in_blocks)


def _writer_node(edges: EdgesOfPrompt, index: int, n_layers: int, position: int) -> _Node:
    """The node of a writer, in the layer of its first site."""
    name, layer = list(edges.writers.items())[index]
    shown_layer = _EMBEDDINGS if layer < 0 else str(min(layer, n_layers))
    return _Node(name, is_writer=True, layer=shown_layer, number=index, position=position)


def _reader_node(edges: EdgesOfPrompt, index: int, position: int) -> _Node:
    """The node of a reader in a block; readers are numbered after the writers."""
    name = edges.readers[index]
    layer = name.split(".")[1]
    number = len(edges.writers) + index
    return _Node(name, is_writer=False, layer=layer, number=number, position=position)


def _metadata(edges: EdgesOfPrompt, slug: str) -> dict[str, Any]:
    at: str | float = edges.at
    of_what = "first order"
    where = f"at ε = {edges.at:g}"
    if math.isnan(edges.at):
        at = "path"
        of_what = "path attribution"
        where = "along the path to the adapted model"
    return {
        "slug": slug,
        "scan": edges.model,
        "transcoder_list": [],
        "prompt_tokens": list(edges.tokens),
        "prompt": "".join(edges.tokens),
        "node_threshold": _SHOWN_SHARE,
        "schema_version": 1,
        "info": {
            "description": f"Edges of the adapter {edges.adapter} by {of_what}: "
            f"{edges.readout}, in {edges.units}, {where}.",
            "generator": _GENERATOR,
        },
        "generation_settings": {
            "adapter": edges.adapter,
            "readout": edges.readout,
            "units": edges.units,
            "at": at,
        },
    }


def _pinned(links: Sequence[_Link]) -> list[str]:
    """The nodes of the strongest links."""
    pinned: dict[str, None] = {}
    for link in sorted(links, key=lambda link: -abs(link.weight)):
        if len(pinned) >= _PINNED:
            break
        pinned |= {link.source: None, link.target: None}
    return list(pinned)


def _influence(links: Sequence[_Link]) -> dict[str, float]:
    """For each source of links, the cumulative share of Σ|link|, the strongest first."""
    sizes: dict[str, float] = {}
    for link in links:
        sizes[link.source] = sizes.get(link.source, 0.0) + abs(link.weight)
    total = sum(sizes.values())
    shares: dict[str, float] = {}
    so_far = 0.0
    for node_id, size in sorted(sizes.items(), key=lambda item: -item[1]):
        so_far += size
        shares[node_id] = so_far / total
    return shares


def _node_fields(node: _Node, readout: _Node, influence: Mapping[str, float]) -> dict[str, Any]:
    is_readout = node is readout
    if is_readout:
        quoted = node.name.replace('"', "'")
        label = f'Output "{quoted}" (p=0.000)'
        feature_type = "logit"
    elif node.is_writer:
        label = node.name
        feature_type = "lora writer"
    else:
        label = f"{node.name} reads"
        feature_type = "reader"
    return {
        "node_id": node.node_id,
        "feature": node.feature,
        "layer": node.layer,
        "ctx_idx": node.position,
        "feature_type": feature_type,
        "token_prob": 0.0,
        "is_target_logit": is_readout,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{node.layer}_{node.number}-{node.position}",
        "clerp": label,
        "influence": influence.get(node.node_id),
        "activation": None,
    }
