"""Edges as a graph: writers on the left, readers on the right, and a line for each edge.

1. Both columns are in the order of a forward pass, from the bottom up.
2. A node is a bar whose length is the number of its edges. The edges meet it side by side, in the
   order of their other ends, so that they do not cross there. Its name is beside it.
3. The width of a line is the size of its edge. A legend says what colours and widths mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from lens_lora.arguments import whole
from lens_lora.core import drawing
from lens_lora.edge_attribution.edges import Edges
from lens_lora.show import figures, go
from lens_lora.show.figures import EXACT, INK, NEGATIVE, curve, finish, whose
from lens_lora.show.text import cut_in_the_middle, key_text, label, magnitude, percent

# The width of lines and bars, in pixels: that of the largest edge, and of the smallest.
_WIDEST = 9.0
_THINNEST = 1.0
_WIDTH_OF_BAR = 5.0
# The pieces of a curved line.
_BENDS = 24
# The space between two nodes of a column. An edge takes 1 at each of its nodes.
_GAP = 0.6
# The space for the headings of the columns, above them.
_ROOM_FOR_HEADINGS = 2.0
# Pixels of a name's character, and of the gap beside it. Names stand in the margins, so that a
# phone shows those of both sides.
_PIXELS_OF_CHARACTER = 7
_PIXELS_BESIDE = 16
_LONGEST_NAME = 28
# How far a name is from its node.
_BESIDE = 0.02
# The figure's height, in pixels: for each edge of the longer column, for the rest, and at least.
_HEIGHT_OF_EDGE = 17
_HEIGHT_OF_REST = 150
_LEAST_HEIGHT = 300
_LEGEND = {"orientation": "h", "x": 0.5, "xanchor": "center", "y": 0, "yanchor": "top"}

_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_HEAD = re.compile(r"attn\.(\d+)\.(\w+)")
_BRANCHES = {"attn": "attention", "mlp": "MLP"}


class _Column(NamedTuple):
    """The nodes of one side.

    Attributes:
        meets: the height at which each edge meets its node.
        bars: the heights at which the bar of each node begins and ends, by the node's name.
    """

    meets: list[float]
    bars: dict[str, tuple[float, float]]

    @classmethod
    def of(cls, names: Iterable[str], ends: Sequence[str], other_places: Sequence[int]) -> _Column:
        """The column of the nodes that have edges, centred at zero.

        Args:
            names: the nodes of this side, from the bottom up.
            ends: the node of each edge on this side.
            other_places: how far up the node of each edge is on the other side.
        """
        with_edges = [name for name in names if name in ends]
        meets = [0.0] * len(ends)
        bars: dict[str, tuple[float, float]] = {}
        at = -(len(ends) + _GAP * (len(with_edges) - 1)) / 2
        for name in with_edges:
            edges_of_node = [edge for edge, end in enumerate(ends) if end == name]
            edges_of_node.sort(key=other_places.__getitem__)
            for slot, edge in enumerate(edges_of_node):
                meets[edge] = at + slot + 0.5
            bars[name] = (at, at + len(edges_of_node))
            at += len(edges_of_node) + _GAP
        return cls(meets, bars)

    @property
    def top(self) -> float:
        """Where the uppermost bar ends; 0 without bars."""
        return max((end for _, end in self.bars.values()), default=0.0)


@drawing.graph.register(Edges)
def edges_graph(edges: Edges, k: int, prompt: int | None = None) -> go.Figure:
    """The strongest edges, from writers on the left to readers on the right."""
    table = edges.top(whole("k", k, 1), prompt)
    writers = table["writer"].tolist()
    readers = table["reader"].tolist()
    values = table["value"].tolist()
    all_writers = list(edges.groups)
    left = _Column.of(all_writers, writers, [edges.readers.index(name) for name in readers])
    right = _Column.of(edges.readers, readers, [all_writers.index(name) for name in writers])
    largest = max(map(abs, values), default=0.0) or 1.0

    figure = go.Figure()
    for index, hover in enumerate(_hovers(edges, writers, readers, values, prompt)):
        start = left.meets[index]
        end = right.meets[index]
        figure.add_trace(_line(start, end, values[index], largest, hover))
    traces = [*_nodes(left, 0.0, "left"), *_nodes(right, 1.0, "right")]
    top = max(left.top, right.top)
    traces.append(_headings(top + _ROOM_FOR_HEADINGS / 2))
    figure.add_traces([*traces, *_legend(edges.units, largest)])

    total = float(edges.entries(prompt).values.abs().sum()) or 1.0
    share = sum(map(abs, values)) / total
    heading = f"{edges.readout}, {key_text(edges.key)}"
    below = f"the strongest {len(values)} edges by layer and module, {percent(share)} of Σ|edge|"
    titles = heading, f"{below} · {whose(prompt, edges.str_tokens)}"
    across = {"range": [-_BESIDE, 1 + _BESIDE], "visible": False}
    upwards = {"range": [-top - _GAP, top + _ROOM_FOR_HEADINGS], "visible": False}
    height = max(_LEAST_HEIGHT, _HEIGHT_OF_REST + round(_HEIGHT_OF_EDGE * 2 * top))
    layout = {"xaxis": across, "yaxis": upwards, "legend": _LEGEND}
    margin = {"l": _room_for(left.bars), "r": _room_for(right.bars)}
    return finish(figure, titles, ("", ""), height, **layout).update_layout(margin=margin)


def _room_for(names: Iterable[str]) -> int:
    """The pixels that the longest of these names takes next to its bar."""
    longest = max((len(short_name(name)) for name in names), default=0)
    return _PIXELS_BESIDE + _PIXELS_OF_CHARACTER * longest


def _hovers(
    edges: Edges,
    writers: Sequence[str],
    readers: Sequence[str],
    values: Sequence[float],
    prompt: int | None,
) -> Iterator[str]:
    """The text at the line of each edge."""
    _, base = edges.mean_over(prompt, edges.base)
    for writer, reader, value in zip(writers, readers, values, strict=True):
        number = figures.value_text(value, float(base), edges.units)
        yield f"<b>{label(writer)} → {label(reader)}</b><br>{number}"


def _line(start: float, end: float, value: float, largest: float, hover: str) -> go.Scatter:
    """A smooth line from a writer to a reader, level at both."""
    across = [step / _BENDS for step in range(_BENDS + 1)]
    heights = [start + (end - start) * x * x * (3 - 2 * x) for x in across]
    colour = EXACT if value >= 0 else NEGATIVE
    texts = [hover] * len(across)
    width = _width(value, largest)
    return curve(across, heights, "", colour, texts, width=width, opacity=0.65, showlegend=False)


def _width(value: float, largest: float) -> float:
    return max(_THINNEST, _WIDEST * abs(value) / largest)


def _nodes(column: _Column, x: float, side: str) -> Iterator[go.Scatter]:
    """A bar for each node of a column, with its name on the outer side."""
    for name, (start, end) in column.bars.items():
        ends = [start + 0.1, end - 0.1]
        texts = [label(name)] * 2
        yield curve([x, x], ends, "", INK, texts, width=_WIDTH_OF_BAR, showlegend=False)
    middles = [(start + end) / 2 for start, end in column.bars.values()]
    names = [label(short_name(name)) for name in column.bars]
    outside = x - _BESIDE if side == "left" else x + _BESIDE
    yield _texts([outside] * len(names), middles, names, [f"middle {side}"] * len(names))


def _headings(height: float) -> go.Scatter:
    """The headings of both columns."""
    texts = ["<b>writes</b>", "<b>reads</b>"]
    return _texts([-_BESIDE, 1 + _BESIDE], [height] * 2, texts, ["middle left", "middle right"])


def _texts(
    x: Sequence[float], y: Sequence[float], texts: Sequence[str], places: Sequence[str]
) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=y,
        text=texts,
        mode="text",
        textposition=places,
        textfont={"size": 12},
        cliponaxis=False,
        hoverinfo="skip",
        showlegend=False,
    )


def _legend(units: str, largest: float) -> Iterator[go.Scatter]:
    """The entries of the legend, which say what colours and widths mean."""
    for name, colour in (("raises it", EXACT), ("lowers it", NEGATIVE)):
        yield curve([None], [None], name, colour, width=4)
    for size in (largest, largest / 4):
        name = f"{magnitude(size)} {label(units)}"
        yield curve([None], [None], name, INK, width=_width(size, largest))


def short_name(name: str) -> str:
    """The layer and the module of a node, such as '29 gate', '29 MLP' or '5 head 3 q'.

    A name outside the blocks, such as a group's own name, stays as it is.
    """
    path, at, adapter = name.partition("@")
    in_block = _IN_BLOCK.fullmatch(path)
    if in_block is None:
        return cut_in_the_middle(name, _LONGEST_NAME)
    layer, place = in_block.groups()
    head = _HEAD.fullmatch(place)
    if head is not None:
        return f"{layer} head {head[1]} {head[2]}"
    if place in _BRANCHES:
        return f"{layer} {_BRANCHES[place]}"
    # A site has its branch before its kind.
    kind = place.rpartition(".")[2]
    return cut_in_the_middle(f"{layer} {kind}{at}{adapter}", _LONGEST_NAME)
