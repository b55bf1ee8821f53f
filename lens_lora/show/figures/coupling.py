"""The matrix of second derivatives between groups of sites."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go

from lens_lora.analyses.coupling import Coupling
from lens_lora.results import drawing
from lens_lora.results.choosing import prompt_rows
from lens_lora.show.figures.parts import colorbar, whose
from lens_lora.show.figures.style import style, title
from lens_lora.show.figures.theme import DIVERGING
from lens_lora.show.text import label

__all__ = ["coupling_heatmap"]

_MOST_NAMES, _MOST_TICKS = 40, 16
_CUT = 0.995


@drawing.figure.register(Coupling)
def coupling_heatmap(coupling: Coupling, prompt: int | None = None) -> go.Figure:
    """½H: self-curvature on the diagonal, half of each pair's coupling off it.

    In a large matrix colours are cut at the 99.5th percentile of the sizes, so that a few strong
    pairs do not leave the rest blank; the hover gives every value.

    Args:
        coupling: to be drawn.
        prompt: an index; without it, the mean over prompts.

    Raises:
        ArgumentError: no such prompt.
    """
    rows = prompt_rows(prompt, len(coupling.matrix))
    half = coupling.matrix[rows].cpu().double().mean(0) / 2
    names = [label(name) for name in coupling.groups]
    sizes = half.abs().flatten()
    is_cut = len(names) > _MOST_NAMES and bool(sizes.quantile(_CUT) > 0)
    reach = float(sizes.quantile(_CUT) if is_cut else sizes.max()) or 1.0
    units = label(coupling.units)
    figure = go.Figure(
        go.Heatmap(
            z=half.numpy(),
            x=names,
            y=names,
            hovertemplate=f"<b>%{{y}} × %{{x}}</b><br>½H = %{{z:.3g}} {units}<extra></extra>",
            colorscale=DIVERGING,
            zmin=-reach,
            zmax=reach,
            colorbar=colorbar(coupling.units, "signed", f"cut at {reach:.2g}" if is_cut else ""),
        )
    )
    style(figure, height=680)
    figure.update_layout(
        title=title(
            f"{coupling.readout}, ½H at ε = {coupling.at:g}",
            "diagonal: self-curvature; off it: half of each pair's coupling · "
            f"{whose(prompt, coupling.str_tokens)}",
        ),
    )
    ticks = _ticks(coupling)
    axis: dict[str, Any] = {
        "type": "category",
        "showgrid": False,
        "constrain": "domain",
        "tickvals": list(ticks),
        "ticktext": list(ticks.values()),
    }
    figure.update_xaxes(axis)
    figure.update_yaxes({**axis, "scaleanchor": "x"})
    return figure


def _ticks(coupling: Coupling) -> dict[str, str]:
    """Every group by name; where they are many, the first of every few layers."""
    names = {name: label(name) for name in coupling.groups}
    if len(names) <= _MOST_NAMES:
        return dict(zip(names.values(), names.values(), strict=True))
    first: dict[int, str] = {}
    for name, members in coupling.groups.items():
        first.setdefault(coupling.sites[members[0]].layer, names[name])
    step = math.ceil(len(first) / _MOST_TICKS)
    return {
        name: f"layer {layer}" if layer >= 0 else "embed"
        for i, (layer, name) in enumerate(sorted(first.items()))
        if i % step == 0
    }
