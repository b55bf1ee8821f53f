"""Figures of features: how far each is pushed, and which site writes it."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from lens_lora.show.figures.style import (
    BLANK,
    DIVERGING,
    EXACT,
    LINEAR,
    Cells,
    Labels,
    style,
    title,
)
from lens_lora.show.text import signed, visible

if TYPE_CHECKING:
    from lens_lora.analyses.feature_shift import FeatureShift
    from lens_lora.analyses.feature_writes import FeatureWrites

__all__ = ["feature_figure", "writes_figure"]

_MOST_TICKS = 60


def feature_figure(shift: FeatureShift, k: int = 20, prompt: int | None = None) -> go.Figure:
    """Bars of the exact shift with its first order; by position, feature × position.

    Position 0 sees no other token, and its activations are often hundreds of times those after it:
    where there are others, features and colours are chosen by them, and the title says so.

    Args:
        k: how many features, by their largest |shift|.
        prompt: an index; without it, the mean over prompts.
    """
    figure = _by_position(shift, k, prompt) if shift.by_position else _bars(shift, k, prompt)
    heading = f"features at {shift.name}{_whose(len(shift.base), prompt)}"
    where = "by position" if shift.positions == "each" else _at(shift.positions)
    if shift.by_position and len(shift.str_tokens[prompt or 0]) > 1:
        where += "; features and colours chosen without position 0"
    figure.update_layout(title=title(heading, f"pushed by the adapter, {where}"))
    return figure


def writes_figure(writes: FeatureWrites, k: int = 20, prompt: int | None = None) -> go.Figure:
    """Site × feature, of the k features that some site writes most."""
    values = writes.of_prompt(prompt)
    chosen = values.abs().amax(0).topk(min(k, values.shape[1])).indices.tolist()
    z: Cells = values[:, chosen].tolist()
    hover = [
        [
            f"<b>{html.escape(site.name)}</b>, feature {feature}<br>{signed(value or 0.0)} "
            f"{html.escape(writes.units)}"
            for feature, value in zip(chosen, row, strict=True)
        ]
        for site, row in zip(writes.sites, z, strict=True)
    ]
    names = [html.escape(site.name) for site in writes.sites]
    reach = max((abs(v) for row in z for v in row if v is not None), default=0.0)
    figure = _heatmap(z, hover, [str(f) for f in chosen], names, writes.units, reach)
    heading = f"δz of each site onto features{_whose(len(writes.values), prompt)}"
    below = f"what it writes by itself, {_at(writes.positions)}"
    figure.update_layout(title=title(heading, below))
    figure.update_xaxes(title_text="feature", type="category")
    return figure


def _bars(shift: FeatureShift, k: int, prompt: int | None) -> go.Figure:
    top = shift.top(k, prompt)[::-1]
    names = [f"feature {feature}" for feature in top["feature"]]
    units = html.escape(shift.units)
    exact = go.Bar(
        x=top["shift"].tolist(),
        y=names,
        orientation="h",
        name="exact",
        marker={"color": EXACT},
        hovertemplate=f"<b>%{{y}}</b><br>%{{x:.4g}} {units}, exact<extra></extra>",
    )
    line = go.Scatter(
        x=top["first_order"].tolist(),
        y=names,
        mode="markers",
        name=f"first order at ε = {shift.at:g}",
        marker={"color": LINEAR, "symbol": "diamond", "size": 8},
        hovertemplate=f"<b>%{{y}}</b><br>%{{x:.4g}} {units}, first order<extra></extra>",
    )
    figure = go.Figure([exact, line])
    style(figure, height=max(300, 150 + 22 * len(names)))
    figure.update_xaxes(title_text=f"shift, {units}", zeroline=True, zerolinecolor="#777777")
    figure.update_yaxes(showgrid=False, type="category")
    return figure


def _by_position(shift: FeatureShift, k: int, prompt: int | None) -> go.Figure:
    values, tokens = shift.of_prompt(prompt)["shift"], shift.str_tokens[prompt or 0]
    first = 1 if len(tokens) > 1 else 0
    largest = values[:, first : len(tokens)].abs().nan_to_num(0.0).amax(1)
    top = largest.topk(min(k, len(largest)))
    chosen = top.indices.tolist()[::-1]
    z: Cells = values[chosen, : len(tokens)].tolist()
    hover = [
        [
            f"<b>feature {feature}</b>, position {i} {html.escape(visible(token))}"
            f"<br>{signed(value or 0.0)} {html.escape(shift.units)}"
            for i, (token, value) in enumerate(zip(tokens, row, strict=True))
        ]
        for feature, row in zip(chosen, z, strict=True)
    ]
    names = [f"feature {feature}" for feature in chosen]
    reach = float(top.values[0])
    figure = _heatmap(z, hover, list(range(len(tokens))), names, shift.units, reach)
    ticks = range(0, len(tokens), math.ceil(len(tokens) / _MOST_TICKS))
    labels = [f"{i} {html.escape(visible(tokens[i]))}" for i in ticks]
    figure.update_xaxes(tickvals=list(ticks), ticktext=labels)
    return figure


def _heatmap(
    z: Cells, hover: Labels, x: list[int] | list[str], y: list[str], units: str, reach: float
) -> go.Figure:
    """Coloured up to ±reach; what lies beyond has the colour of the end."""
    reach = reach or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=z,
            x=x,
            y=y,
            hovertext=hover,
            hoverinfo="text",
            colorscale=DIVERGING,
            zmin=-reach,
            zmid=0,
            zmax=reach,
            xgap=1,
            ygap=1,
            colorbar={
                "title": {"text": f"{html.escape(units)}<br>blue pushes up", "side": "top"},
                "thickness": 14,
                "outlinewidth": 0,
            },
        )
    )
    style(figure, height=max(300, 150 + 20 * len(y)))
    figure.update_layout(plot_bgcolor=BLANK)
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False, type="category")
    return figure


def _at(position: int) -> str:
    return f"position {position}".replace("-", "−")


def _whose(batch: int, prompt: int | None) -> str:
    if batch == 1:
        return ""
    return f", mean of {batch} prompts" if prompt is None else f", prompt {prompt} of {batch}"
