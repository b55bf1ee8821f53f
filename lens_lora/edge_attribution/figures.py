"""Edges as a heatmap, and as a graph from layer to layer."""

from __future__ import annotations

import math

from lens_lora.arguments import whole
from lens_lora.core import drawing
from lens_lora.edge_attribution.edges import Edges
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

_MOST_LAYERS = 16
_GREY = "grey: not downstream"


@drawing.figure.register(Edges)
def edges_heatmap(edges: Edges, prompt: int | None = None) -> go.Figure:
    """Writer × reader in the order of a forward pass, so that what exists is a triangle."""
    values, _ = edges.mean_over(prompt, edges.per_edge)
    firsts = dict[str, str]()  # the first reader of each block
    for name in edges.readers:
        firsts.setdefault(name if name.count(".") < 2 else name.split(".")[1], name)
    layers = figures.every_few(list(firsts.items()), _MOST_LAYERS)
    x = names_axis(edges.readers, "layer of the reader")
    x = x._replace(layout={**x.layout, **figures.ticks((name for _, name in layers), dict(layers))})
    y = names_axis(edges.groups, "writer", **group_ticks(edges))
    heading = f"{edges.readout}, {key_text(edges.key)}"
    below = f"what each reader makes of each write · {_GREY}"
    titles = heading, f"{below} · {whose(prompt, edges.str_tokens)}"
    says = f"<b>%{{y}} → %{{x}}</b><br>%{{z:+.3g}} {label(edges.units)}<extra></extra>"
    cells, height = values.masked_fill(~edges.exists, math.nan).tolist(), 600 // len(values)
    return heatmap(titles, cells, says, x, y, edges.units, row_height=height, **cut_colours(values))


_READS = ("attention reads", "logits", "MLP reads")
_LATER, _WRITES = 0.5, 0.25  # where in its layer an MLP reads, and how far on a branch writes
_WIDEST, _BENDS = 7.0, 16


@drawing.graph.register(Edges)
def edges_graph(edges: Edges, k: int, prompt: int | None = None) -> go.Figure:
    """The strongest edges, from the lane of the writer's kind to that of the reader's branch."""
    rows = edges.top(whole("k", k, 1), prompt).values.tolist()
    starts = [_writer_place(edges, writer) for writer, *_ in rows]
    ends = [_reader_place(edges, reader) for _, reader, *_ in rows]
    kinds = sorted({kind for _, kind in starts}, key=lambda kind: (*KINDS, kind).index(kind))
    above = [kind for kind in kinds if kind in KINDS[: KINDS.index("ln2")]]
    lanes = [*above, *_READS, *(kind for kind in kinds if kind not in above)][::-1]
    largest, total = (f(map(abs, edges.entries(prompt).values.tolist())) for f in (max, sum))
    figure, steps = go.Figure(), [step / _BENDS for step in range(_BENDS + 1)]
    for (writer, reader, value, _), (x, lane), (end, to) in zip(rows, starts, ends, strict=True):
        y, rise = lanes.index(lane), lanes.index(to) - lanes.index(lane)
        said = figures.value_text(value, float(edges.mean_over(prompt, edges.base)[1]), edges.units)
        xs, ys = [x + (end - x) * t for t in steps], [y + rise * t * t * (3 - 2 * t) for t in steps]
        colour = EXACT if value >= 0 else figures.NEGATIVE
        width = _WIDEST * abs(value) / (largest or 1.0)
        hover = [f"<b>{label(writer)} → {label(reader)}</b><br>{said}"] * len(steps)
        figure.add_trace(curve(xs, ys, "", colour, hover, width=max(1.0, width), opacity=0.6))
    for places, symbol in ((starts, "circle"), (ends, "square")):
        xs, ys = [x for x, _ in places], [lanes.index(lane) for _, lane in places]
        figure.add_trace(figures.points(xs, ys, None, "", color=INK, size=7, symbol=symbol))
    shown = sum(abs(value) for *_, value, _ in rows) / (total or 1.0)
    below = f"the strongest {len(rows)}, {percent(shown)} of Σ|edge|; blue pushes up, red down"
    heading = f"{edges.readout}, {key_text(edges.key)}"
    titles = heading, f"{below} · {whose(prompt, edges.str_tokens)}"
    y = figures.ticks(range(len(lanes)), lanes)
    return finish(figure, titles, ("layer", ""), 480, showlegend=False, yaxis=y)


def _writer_place(edges: Edges, writer: str) -> tuple[float, str]:
    """How far on in the pass, and the lane."""
    sites = [edges.sites[i] for i in edges.groups[writer]]
    kinds, is_later = {site.kind for site in sites}, sites[0].kind in KINDS[KINDS.index("ln2") :]
    kind = kinds.pop() if len(kinds) == 1 else "several kinds"
    return sites[0].layer + _LATER * is_later + _WRITES, kind


def _reader_place(edges: Edges, reader: str) -> tuple[float, str]:
    if reader == _READS[1]:
        return float(edges.readers[-2].split(".")[1]) + 4 * _LATER, reader
    _, layer, branch, *_ = reader.split(".")
    is_later = "mlp" in branch or "moe" in branch
    return int(layer) + _LATER * is_later, _READS[2 * is_later]
