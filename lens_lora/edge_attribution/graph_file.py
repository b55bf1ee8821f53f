"""Write edges as an attribution graph, in the JSON that circuit-tracer and Neuronpedia read.

A node is a writer, a reader or the readout, at one token. There are three kinds of links:

    writer → reader     the edge ⟨δ_l, G_m⟩
    writer → readout    the edge to the last reader: 'logits', or the point of a `Projection`
    reader → readout    Σ_l of the edges into this reader: everything that passes through it

So every path from a writer leads to the readout. A reader reads the residual stream at the token at
which its writer adds to it, so both nodes are at that token. If edges are summed over positions,
all nodes are at the last token.

`graph_of` works in three steps:

1. Take the strongest edges, and make a node for each of their ends (`_nodes_and_links`).
2. Compute the influence of each node: the cumulative share of Σ|link|, the strongest node first.
   The viewers hide weak nodes by it.
3. Write the fields that the viewers read. They are those of circuit-tracer's
   `circuit_tracer/frontend/graph_models.py` (github.com/safety-research/circuit-tracer) and of
   Neuronpedia's schema of graphs (github.com/hijohnnylin/neuronpedia).

Both viewers expect more of the fields than their schemas say:

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

# The viewer begins with the strongest nodes, up to this share of Σ|link|.
_SHOWN_SHARE = 0.8
# The ends of the strongest links are pinned until there are at least so many nodes; without any,
# the viewer's subgraph is empty.
_PINNED = 10
# The viewers' name of the layer of embeddings.
_EMBEDDINGS = "E"
_GENERATOR = {"name": "lens_lora", "version": __version__}


@dataclasses.dataclass(frozen=True)
class EdgesOfPrompt:
    """The edges of one prompt.

    Attributes:
        tokens: the prompt's tokens.
        values: the edges at each position, or their sum over positions as a single last entry.
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
        """The id by which links name the node: layer, index and token."""
        return f"{self.layer}_{self.number}_{self.position}"

    @property
    def feature(self) -> int:
        """The Cantor pairing of layer and index, one number; for an embedding the index alone."""
        if self.layer == _EMBEDDINGS:
            return self.number
        layer = int(self.layer)
        return (layer + self.number) * (layer + self.number + 1) // 2 + self.number


class _Link(NamedTuple):
    """A link of the graph, with the field names of the file. Its ends are ids of nodes."""

    source: str
    target: str
    weight: float


def graph_of(edges: EdgesOfPrompt, slug: str, k: int | None) -> dict[str, Any]:
    """Write the graph of one prompt as plain data for JSON.

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
    nodes, links = _nodes_and_links(edges, readout, n_layers, k)
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
        "nodes": [_node_fields(node, readout, influence) for node in nodes],
        "links": [link._asdict() for link in links],
    }


def _nodes_and_links(
    edges: EdgesOfPrompt, readout: _Node, n_layers: int, k: int | None
) -> tuple[list[_Node], list[_Link]]:
    """Make a node for each end of the strongest edges, and the three kinds of links.

    Args:
        edges: the prompt's edges.
        readout: the node of the readout, which is the first node.
        n_layers: the number of blocks.
        k: only the k strongest edges; None for all that are not zero.
    """
    last_reader = len(edges.readers) - 1
    nodes = {readout.node_id: readout}
    links: list[_Link] = []
    sum_into_reader: dict[str, float] = {}
    for edge in _strongest(edges, k):
        writer = _writer_node(edges, edge.writer, n_layers, edge.position)
        nodes[writer.node_id] = writer
        if edge.reader == last_reader:
            links.append(_Link(writer.node_id, readout.node_id, edge.value))
            continue
        reader = _reader_node(edges, edge.reader, edge.position)
        nodes[reader.node_id] = reader
        links.append(_Link(writer.node_id, reader.node_id, edge.value))
        sum_into_reader.setdefault(reader.node_id, 0.0)
        sum_into_reader[reader.node_id] += edge.value
    for node_id, value in sum_into_reader.items():
        links.append(_Link(node_id, readout.node_id, value))
    return list(nodes.values()), links


class _Edge(NamedTuple):
    """One edge: the indices of its writer, its reader and its token, and its value."""

    writer: int
    reader: int
    position: int
    value: float


def _strongest(edges: EdgesOfPrompt, k: int | None) -> Iterator[_Edge]:
    """Yield the k strongest edges, or all of them, the strongest first and none that is zero."""
    values = edges.values.double()
    _, n_readers, n_positions = values.shape
    # Sums over positions are put at the last token.
    first_position = len(edges.tokens) - 1 if n_positions == 1 else 0
    flat_values = values.flatten()
    order = flat_values.abs().argsort(descending=True, stable=True)
    for index in order[:k].tolist():
        value = float(flat_values[index])
        if value == 0:
            return
        # The axes are [writer, reader, position], the last of which varies fastest.
        index_of_pair, position = divmod(index, n_positions)
        writer, reader = divmod(index_of_pair, n_readers)
        yield _Edge(writer, reader, first_position + position, value)


def _layer_count(readers: Iterable[str]) -> int:
    """Count the blocks up to the last one in which there is a reader."""
    in_blocks = [name for name in readers if name.startswith("blocks.")]
    return 1 + max(_block_of(name) for name in in_blocks)


def _block_of(reader: str) -> int:
    """Return the number of a reader's block: 3 for 'blocks.3.attn'."""
    return int(reader.split(".")[1])


def _writer_node(edges: EdgesOfPrompt, index: int, n_layers: int, position: int) -> _Node:
    """Make the node of a writer, in the layer of its first site."""
    name = list(edges.writers)[index]
    layer = edges.writers[name]
    shown_layer = _EMBEDDINGS if layer < 0 else str(min(layer, n_layers))
    return _Node(name, is_writer=True, layer=shown_layer, number=index, position=position)


def _reader_node(edges: EdgesOfPrompt, index: int, position: int) -> _Node:
    """Make the node of a reader in a block; readers are numbered after the writers."""
    name = edges.readers[index]
    layer = str(_block_of(name))
    number = len(edges.writers) + index
    return _Node(name, is_writer=False, layer=layer, number=number, position=position)


def _metadata(edges: EdgesOfPrompt, slug: str) -> dict[str, Any]:
    """Write the fields on the graph as a whole: model, prompt, and how the edges were computed."""
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
    """Return the ids of the nodes at the ends of the strongest links."""
    pinned: dict[str, None] = {}
    for link in sorted(links, key=lambda link: -abs(link.weight)):
        if len(pinned) >= _PINNED:
            break
        pinned |= {link.source: None, link.target: None}
    return list(pinned)


def _influence(links: Sequence[_Link]) -> dict[str, float]:
    """Compute the cumulative share of Σ|link| of each node with outgoing links, by its id.

    Nodes are taken in decreasing order of the Σ|link| of their own outgoing links, and each share
    includes those of the nodes before.
    """
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
    """Write the fields of one node.

    Args:
        node: the node.
        readout: the node of the readout.
        influence: the influence of each node that has outgoing links, by its id.
    """
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
