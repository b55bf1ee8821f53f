"""Heatmaps whose rows are layers: what lies outside the layers has its own name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lens_lora.show.figures.parts import Scale, heatmap
from lens_lora.show.figures.style import KINDS, OUTSIDE, Cells, Labels
from lens_lora.show.text import label

__all__ = ["by_layer", "kinds_by_layer", "layers_of"]

_MOST_LAYER_TICKS = 20


def layers_of(sites: Sequence[Any]) -> range:
    """Every layer up to the last adapted one; embeddings, where adapted, are layer −1.

    Args:
        sites: at least one.
    """
    found = [site.layer for site in sites]
    return range(min(0, *found), 1 + max(found))


def by_layer(
    z: Cells,
    hover: Labels,
    x: Sequence[str | int],
    sites: Sequence[Any],
    units: str,
    scale: Scale = "pushes",
) -> go.Figure:
    """Rows of layers.

    Args:
        z, hover: a row for each of `layers_of(sites)`.
        x: a label for each column.
        sites: of the rows.
        units: of the values.
        scale: as for `heatmap`.
    """
    layers = layers_of(sites)
    figure = heatmap(z, hover, x, layers, units, scale=scale)
    ticks = _layer_ticks(sites, layers)
    figure.update_yaxes(title_text="layer", tickvals=list(ticks), ticktext=list(ticks.values()))
    return figure


def kinds_by_layer(
    sites: Sequence[Any],
    values: Sequence[float],
    says: Sequence[str],
    units: str,
    scale: Scale = "pushes",
    *,
    adds: bool = True,
) -> go.Figure:
    """Layer × kind of module, hover naming each site; a site that does not exist is grey.

    Several sites share a cell where a sum of adapters has them.

    Args:
        sites: of the values.
        values: one a site; NaN is grey.
        says: what is said of each value.
        units: of the values.
        scale: as for `heatmap`.
        adds: whether a cell's sites are added up; else their mean is shown.
    """
    kinds = [k for k in KINDS if any(s.kind == k for s in sites)]
    layers = layers_of(sites)
    held: dict[tuple[int, int], list[float]] = {}
    hover: Labels = [[""] * len(kinds) for _ in layers]
    for site, value, said in zip(sites, values, says, strict=True):
        row, column = layers.index(site.layer), kinds.index(site.kind)
        held.setdefault((row, column), []).extend([value] if math.isfinite(value) else [])
        own = f"<b>{label(site.name)}</b><br>{label(site.module)}<br>{said}"
        hover[row][column] = "<br>".join(filter(None, (hover[row][column], own)))
    z: Cells = [[None] * len(kinds) for _ in layers]
    for (row, column), own in held.items():
        z[row][column] = sum(own) / (1 if adds else len(own)) if own else None
    figure = by_layer(z, hover, kinds, sites, units, scale)
    figure.update_xaxes(title_text="kind of module", type="category")
    return figure


def _layer_ticks(sites: Sequence[Any], layers: Sequence[int]) -> dict[int, str]:
    """Every few layers by number, and what lies outside the layers by its own name."""
    step = math.ceil(len(layers) / _MOST_LAYER_TICKS)
    numbers = {layer: str(layer) for layer in layers if layer % step == 0}
    outside = {s.layer: s.kind for s in sites if s.kind in OUTSIDE}
    return numbers | outside
