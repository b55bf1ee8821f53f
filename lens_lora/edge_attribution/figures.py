"""Edges as a heatmap of writer × reader, and as a graph from writers to readers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lens_lora.arguments import whole
from lens_lora.core import drawing
from lens_lora.edge_attribution.edges import Edges
from lens_lora.edge_attribution.readers import LOGITS
from lens_lora.show import figures, go
from lens_lora.show.figures import (
    EXACT,
    INK,
    curve,
    cut_colours,
    finish,
    group_ticks,
    heatmap,
    names_axis,
    whose,
)
from lens_lora.show.text import cut_in_the_middle, key_text, label, magnitude, percent

# How many layers are named below a heatmap.
_MOST_LAYERS = 16
_GREY = "grey: not downstream"


@drawing.figure.register(Edges)
def edges_heatmap(edges: Edges, prompt: int | None = None) -> go.Figure:
    """Writer × reader in the order of a forward pass, so that what exists is a triangle."""
    values, _ = edges.mean_over(prompt, edges.per_edge)
    x = names_axis(edges.readers, "layer of the reader", **_layer_ticks(edges.readers))
    y = names_axis(edges.groups, "writer", **group_ticks(edges))
    heading = f"{edges.readout}, {key_text(edges.key)}"
    below = f"what each reader makes of each write · {_GREY}"
    titles = heading, f"{below} · {whose(prompt, edges.str_tokens)}"
    says = f"<b>%{{y}} → %{{x}}</b><br>%{{z:+.3g}} {label(edges.units)}<extra></extra>"
    cells = values.masked_fill(~edges.exists, math.nan).tolist()
    height = 600 // len(values)
    colours = cut_colours(values)
    return heatmap(titles, cells, says, x, y, edges.units, row_height=height, **colours)


def _layer_ticks(readers: Sequence[str]) -> dict[str, Any]:
    """The number of a layer at its first reader, of every few layers; and the logits."""
    firsts: dict[str, str] = {}
    for name in readers:
        layer = name if name == LOGITS else name.split(".")[1]
        firsts.setdefault(layer, name)
    shown = figures.every_few(list(firsts.items()), _MOST_LAYERS)
    return figures.ticks((name for _, name in shown), (layer for layer, _ in shown))


# --- The graph: writers on the left, readers on the right, and a line for each edge

_WIDEST = 9.0  # the line of the largest edge, in pixels
_THINNEST = 1.0
_BENDS = 24  # pieces of a curved line
# The space between two nodes of a column, where an edge takes 1 at each of its nodes.
_GAP = 0.6
_PIXELS = 17  # of the figure's height for each edge of the longer column
_LONGEST_NAME = 28
_ROOM_FOR_HEADS = 2.0
_BELOW = {"orientation": "h", "x": 0.5, "xanchor": "center", "y": 0, "yanchor": "top"}
# What part of the figure's width names have on each side, beside the lines at 0 to 1.
_ROOM_FOR_NAMES = 0.42
_OF_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_OF_HEAD = re.compile(r"attn\.(\d+)\.(\w+)")
_BRANCHES = {"attn": "attention", "mlp": "MLP"}


class _Edge(NamedTuple):
    """One edge that is drawn."""

    writer: str
    reader: str
    value: float


@drawing.graph.register(Edges)
def edges_graph(edges: Edges, k: int, prompt: int | None = None) -> go.Figure:
    """The strongest edges, from writers on the left to readers on the right.

    Both columns are in the order of a forward pass, from the bottom up. A node is as long as it has
    edges, which meet it one beside another, and has its name beside it.
    """
    table = edges.top(whole("k", k, 1), prompt)
    drawn = [
        _Edge(writer, reader, value)
        for writer, reader, value in zip(
            table["writer"], table["reader"], table["value"], strict=True
        )
    ]
    writers = _ordered(edges.groups, [edge.writer for edge in drawn])
    readers = _ordered(edges.readers, [edge.reader for edge in drawn])
    starts, writer_spans = _column(writers, [edge.writer for edge in drawn], drawn, readers)
    ends, reader_spans = _column(readers, [edge.reader for edge in drawn], drawn, writers)
    _, base = edges.mean_over(prompt, edges.base)
    largest = max(abs(edge.value) for edge in drawn) or 1.0

    figure = go.Figure()
    for edge, start, end in zip(drawn, starts, ends, strict=True):
        said = figures.value_text(edge.value, float(base), edges.units)
        hover = f"<b>{label(edge.writer)} → {label(edge.reader)}</b><br>{said}"
        figure.add_trace(_line(edge, start, end, hover, largest))
    for trace in (*_nodes(writer_spans, 0.0, "left"), *_nodes(reader_spans, 1.0, "right")):
        figure.add_trace(trace)
    for trace in _legend(edges, largest):
        figure.add_trace(trace)

    total = float(edges.entries(prompt).values.abs().sum()) or 1.0
    shown = sum(abs(edge.value) for edge in drawn) / total
    heading = f"{edges.readout}, {key_text(edges.key)}"
    below = f"the strongest {len(drawn)} edges by layer and module, {percent(shown)} of Σ|edge|"
    titles = heading, f"{below} · {whose(prompt, edges.str_tokens)}"
    longest = max(_length(writer_spans), _length(reader_spans))
    sides = {"range": [-_ROOM_FOR_NAMES, 1 + _ROOM_FOR_NAMES], "visible": False}
    upwards = {"range": [-longest / 2 - _GAP, longest / 2 + _ROOM_FOR_HEADS], "visible": False}
    figure.add_trace(_heads(longest / 2 + _ROOM_FOR_HEADS / 2))
    height = max(300, 150 + round(_PIXELS * longest))
    return finish(figure, titles, ("", ""), height, xaxis=sides, yaxis=upwards, legend=_BELOW)


def _heads(height: float) -> go.Scatter:
    """What stands in both columns, above them."""
    return go.Scatter(
        x=[-0.02, 1.02],
        y=[height, height],
        text=["<b>writes</b>", "<b>reads</b>"],
        mode="text",
        textposition=["middle left", "middle right"],
        hoverinfo="skip",
        showlegend=False,
    )


def _ordered(names: Iterable[str], drawn: Sequence[str]) -> list[str]:
    """The names that are drawn, each once, in the order of a forward pass."""
    return [name for name in names if name in set(drawn)]


# Of each node of a column, by name, where it begins and ends.
_Spans = dict[str, tuple[float, float]]


def _column(
    names: Sequence[str], own: Sequence[str], drawn: Sequence[_Edge], others: Sequence[str]
) -> tuple[list[float], _Spans]:
    """Where each edge meets the nodes of one column, and where these nodes are.

    At a node the edges are in the order of the nodes at their other ends, so that they do not cross
    there. Columns are centred at zero.

    Args:
        names: the nodes of this column.
        own: the node of each edge in this column.
        drawn: the edges.
        others: the nodes of the other column.
    """
    places = {name: index for index, name in enumerate(others)}
    meets = [0.0] * len(drawn)
    spans: _Spans = {}
    length = len(drawn) + _GAP * (len(names) - 1)
    at = -length / 2
    for name in names:
        mine = [index for index, node in enumerate(own) if node == name]
        mine.sort(key=lambda index: places[_other_end(drawn[index], name)])
        for slot, index in enumerate(mine):
            meets[index] = at + slot + 0.5
        spans[name] = (at, at + len(mine))
        at += len(mine) + _GAP
    return meets, spans


def _other_end(edge: _Edge, name: str) -> str:
    return edge.reader if edge.writer == name else edge.writer


def _length(spans: _Spans) -> float:
    starts = [start for start, _ in spans.values()]
    ends = [end for _, end in spans.values()]
    return max(ends) - min(starts)


def _line(edge: _Edge, start: float, end: float, hover: str, largest: float) -> go.Scatter:
    """A smooth line from its writer to its reader, level at both; its width is its size."""
    steps = [step / _BENDS for step in range(_BENDS + 1)]
    rise = end - start
    heights = [start + rise * step * step * (3 - 2 * step) for step in steps]
    colour = EXACT if edge.value >= 0 else figures.NEGATIVE
    width = _width(edge.value, largest)
    texts = [hover] * len(steps)
    return curve(steps, heights, "", colour, texts, width=width, opacity=0.65, showlegend=False)


def _width(value: float, largest: float) -> float:
    return max(_THINNEST, _WIDEST * abs(value) / largest)


def _nodes(spans: _Spans, x: float, side: str) -> Iterator[go.Scatter]:
    """A bar for each node of a column, with its name on the outer side."""
    for name, (start, end) in spans.items():
        bar = curve(
            [x, x], [start + 0.1, end - 0.1], "", INK, [label(name)] * 2, width=5, showlegend=False
        )
        yield bar
    middles = [(start + end) / 2 for start, end in spans.values()]
    outside = x - 0.02 if side == "left" else x + 0.02
    names = [label(_short(name)) for name in spans]
    yield go.Scatter(
        x=[outside] * len(middles),
        y=middles,
        text=names,
        mode="text",
        textposition=f"middle {side}",
        textfont={"size": 12},
        hoverinfo="skip",
        showlegend=False,
        cliponaxis=False,
    )


def _short(name: str) -> str:
    """'29 gate', '29 MLP', '5 head 3 q': the layer, and what stands there; a group's own name."""
    of_block = _OF_BLOCK.fullmatch(name)
    if of_block is None:
        return cut_in_the_middle(name, _LONGEST_NAME)
    layer, rest = of_block.groups()
    of_head = _OF_HEAD.fullmatch(rest)
    if of_head is not None:
        head, kind = of_head.groups()
        return f"{layer} head {head} {kind}"
    if rest in _BRANCHES:
        return f"{layer} {_BRANCHES[rest]}"
    # A site has its branch before its kind.
    return f"{layer} {rest.rpartition('.')[2]}"


def _legend(edges: Edges, largest: float) -> Iterator[go.Scatter]:
    """What colours and widths mean, as lines that the legend alone shows."""
    for name, colour in (("raises it", EXACT), ("lowers it", figures.NEGATIVE)):
        yield curve([None], [None], name, colour, width=4)
    for size in (largest, largest / 4):
        name = f"{magnitude(size)} {edges.units}"
        yield curve([None], [None], name, INK, width=_width(size, largest))
