"""Edges as a heatmap, and as a graph from layer to layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lens_lora.arguments import whole
from lens_lora.core import drawing
from lens_lora.edge_attribution.edges import Edges
from lens_lora.edge_attribution.readers import LOGITS
from lens_lora.show import figures, go
from lens_lora.show.figures import (
    EXACT,
    INK,
    KINDS,
    curve,
    cut_colours,
    finish,
    group_ticks,
    heatmap,
    names_axis,
    whose,
)
from lens_lora.show.text import key_text, label, percent

_MOST_LAYERS = 16  # that are named below a heatmap
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


_ATTENTION_READS = "attention reads"
_MLP_READS = "MLP reads"
# Where in its layer an MLP stands, and how far behind its reader a branch writes.
_LATER = 0.5
_WRITES = 0.25
_WIDEST = 7.0  # the line of the largest edge, in pixels
_BENDS = 16  # pieces of a curved line
# How far on in the pass, and the lane.
_Place = tuple[float, str]
# Kinds of modules in the attention of a block, or before it.
_ABOVE = KINDS[: KINDS.index("ln2")]


@drawing.graph.register(Edges)
def edges_graph(edges: Edges, k: int, prompt: int | None = None) -> go.Figure:
    """The strongest edges, from the lane of the writer's kind to that of the reader's branch."""
    rows = edges.top(whole("k", k, 1), prompt).values.tolist()
    starts = [_writer_place(edges, writer) for writer, *_ in rows]
    ends = [_reader_place(edges, reader) for _, reader, *_ in rows]
    lanes = _lanes([lane for _, lane in starts])
    sizes = edges.entries(prompt).values.abs()
    largest = float(sizes.max()) or 1.0
    total = float(sizes.sum()) or 1.0
    _, base = edges.mean_over(prompt, edges.base)
    figure = go.Figure()
    for (writer, reader, value, _), start, end in zip(rows, starts, ends, strict=True):
        xs, ys = _bent(start, end, lanes)
        said = figures.value_text(value, float(base), edges.units)
        hover = [f"<b>{label(writer)} → {label(reader)}</b><br>{said}"] * len(xs)
        colour = EXACT if value >= 0 else figures.NEGATIVE
        width = max(1.0, _WIDEST * abs(value) / largest)
        figure.add_trace(curve(xs, ys, "", colour, hover, width=width, opacity=0.6))
    for places, symbol in ((starts, "circle"), (ends, "square")):
        xs = [x for x, _ in places]
        ys = [lanes.index(lane) for _, lane in places]
        figure.add_trace(figures.points(xs, ys, None, "", color=INK, size=7, symbol=symbol))
    shown = sum(abs(value) for *_, value, _ in rows) / total
    heading = f"{edges.readout}, {key_text(edges.key)}"
    below = f"the strongest {len(rows)}, {percent(shown)} of Σ|edge|; blue pushes up, red down"
    titles = heading, f"{below} · {whose(prompt, edges.str_tokens)}"
    yaxis = figures.ticks(range(len(lanes)), lanes)
    return finish(figure, titles, ("layer", ""), 480, showlegend=False, yaxis=yaxis)


def _lanes(writers: Sequence[str]) -> list[str]:
    """From the bottom up: kinds that write in an MLP, what is read, kinds of the attention."""
    kinds = sorted(set(writers), key=lambda kind: (*KINDS, kind).index(kind))
    above = [kind for kind in kinds if kind in _ABOVE]
    below = [kind for kind in kinds if kind not in _ABOVE]
    downwards = [*above, _ATTENTION_READS, LOGITS, _MLP_READS, *below]
    return downwards[::-1]


def _bent(start: _Place, end: _Place, lanes: Sequence[str]) -> tuple[list[float], list[float]]:
    """A smooth line between two places, level at both."""
    x, lane = start
    end_x, end_lane = end
    y = lanes.index(lane)
    rise = lanes.index(end_lane) - y
    steps = [step / _BENDS for step in range(_BENDS + 1)]
    xs = [x + (end_x - x) * t for t in steps]
    ys = [y + rise * t * t * (3 - 2 * t) for t in steps]
    return xs, ys


def _writer_place(edges: Edges, writer: str) -> _Place:
    """How far on in the pass, and the lane."""
    sites = [edges.sites[index] for index in edges.groups[writer]]
    first = sites[0]
    kinds = {site.kind for site in sites}
    is_later = first.kind in KINDS and first.kind not in _ABOVE
    lane = first.kind if len(kinds) == 1 else "several kinds"
    return first.layer + _LATER * is_later + _WRITES, lane


def _reader_place(edges: Edges, reader: str) -> _Place:
    if reader == LOGITS:
        last_layer = int(edges.readers[-2].split(".")[1])
        return float(last_layer + 4 * _LATER), LOGITS
    _, layer, branch, *_ = reader.split(".")
    is_later = "mlp" in branch or "moe" in branch
    return int(layer) + _LATER * is_later, _MLP_READS if is_later else _ATTENTION_READS
