"""Edges as a heatmap of writer × reader."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lens_lora.core import drawing
from lens_lora.edge_attribution.edges import Edges
from lens_lora.edge_attribution.readers import LOGITS
from lens_lora.show import figures, go
from lens_lora.show.figures import (
    cut_colours,
    group_ticks,
    heatmap,
    names_axis,
    whose,
)
from lens_lora.show.text import key_text, label

# How many layers are named below a heatmap.
_MOST_LAYERS = 16
_GREY = "grey: not downstream"


@drawing.figure.register(Edges)
def edges_heatmap(edges: Edges, prompt: int | None = None) -> go.Figure:
    """A heatmap of writer × reader in the order of a forward pass; edges make a triangle."""
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
    return heatmap(
        titles,
        cells,
        says,
        x,
        y,
        edges.units,
        reach=colours.reach,
        note=colours.note,
        row_height=height,
    )


def _layer_ticks(readers: Sequence[str]) -> dict[str, Any]:
    """Ticks with the number of every few layers at the layer's first reader, and the logits."""
    firsts: dict[str, str] = {}
    for name in readers:
        layer = name if name == LOGITS else name.split(".")[1]
        firsts.setdefault(layer, name)
    ticks = figures.every_few(list(firsts.items()), _MOST_LAYERS)
    return figures.ticks((name for _, name in ticks), (layer for layer, _ in ticks))
