"""Pictures of second order: the matrix between groups of sites, and the path with its parabola."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from lens_lora.show.figures.style import BLANK, DIVERGING, EXACT, FLIP, INK, LINEAR, style, title
from lens_lora.show.text import chosen_prompt

if TYPE_CHECKING:
    from lens_lora.analyses.coupling import Coupling
    from lens_lora.analyses.second_order import SecondOrder

__all__ = ["coupling_heatmap", "second_order_figure"]

_MOST_NAMES, _MOST_TICKS = 40, 16
_CUT = 0.995


def coupling_heatmap(coupling: Coupling, prompt: int = 0) -> go.Figure:
    """½H of one prompt: self-curvature on the diagonal, half of each pair's coupling off it.

    In a large matrix colours are cut at the 99.5th percentile of the sizes, so that a few strong
    pairs do not leave the rest blank; the hover gives every value.
    """
    index = chosen_prompt(prompt, len(coupling.matrix))
    half = coupling.matrix[index].double().cpu() / 2
    names = [html.escape(name) for name in coupling.groups]
    sizes = half.abs().flatten()
    is_cut = len(names) > _MOST_NAMES and bool(sizes.quantile(_CUT) > 0)
    reach = float(sizes.quantile(_CUT) if is_cut else sizes.max()) or 1.0
    units = html.escape(coupling.units)
    cut = f"<br>cut at {reach:.2g}" if is_cut else ""
    figure = go.Figure(
        go.Heatmap(
            z=half.numpy(),
            x=names,
            y=names,
            hovertemplate=f"<b>%{{y}} × %{{x}}</b><br>½H = %{{z:.3g}} {units}<extra></extra>",
            colorscale=DIVERGING,
            zmin=-reach,
            zmid=0,
            zmax=reach,
            colorbar={
                "title": {"text": f"{units}<br>blue pushes up{cut}", "side": "top"},
                "thickness": 14,
                "outlinewidth": 0,
            },
        )
    )
    batch = len(coupling.matrix)
    whose = f", prompt {index} of {batch}" if batch > 1 else ""
    style(figure, height=680)
    figure.update_layout(
        plot_bgcolor=BLANK,
        title=title(
            f"{coupling.readout}, ½H at ε = {coupling.at:g}{whose}",
            "diagonal: self-curvature; off it: half of each pair's coupling",
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
    figure.update_yaxes({**axis, "autorange": "reversed", "scaleanchor": "x"})
    return figure


def second_order_figure(second: SecondOrder, prompt: int = 0) -> go.Figure:
    """The exact shift along ε, first order's line and second order's parabola."""
    index = chosen_prompt(prompt, len(second.shift))
    curve = second.curve
    scales = [0.0, *curve.scales.double().tolist()]
    units = html.escape(curve.units)
    lines = (
        ("exact", curve.shift[index].tolist(), {"color": EXACT, "width": 2.5}),
        ("first order", curve.first_order[index].tolist(), _dashed(LINEAR, "dash")),
        ("second order", second.predicted_at(curve.scales)[index].tolist(), _dashed(FLIP, "dot")),
    )
    figure = go.Figure(
        [
            go.Scatter(
                x=scales,
                y=[0.0, *values],
                name=name,
                mode="lines",
                line=line,
                hovertemplate=f"ε = %{{x:.3g}}<br>%{{y:.4g}} {units}, {name}<extra></extra>",
            )
            for name, values, line in lines
        ]
    )
    style(figure, height=420)
    figure.update_layout(
        title=title(f"{curve.readout}, shift along ε", second.verdict[index]),
        legend={"orientation": "v", "x": 0.02, "xanchor": "left", "y": 0.98, "yanchor": "top"},
    )
    figure.add_hline(y=0, line={"color": INK, "width": 1})
    figure.update_xaxes(title_text="ε, strength of the adapter")
    figure.update_yaxes(title_text=f"shift, {units}")
    return figure


def _dashed(color: str, dash: str) -> dict[str, object]:
    return {"color": color, "width": 2, "dash": dash}


def _ticks(coupling: Coupling) -> dict[str, str]:
    """Every group by name; where they are many, the first of every few layers."""
    names = {name: html.escape(name) for name in coupling.groups}
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
