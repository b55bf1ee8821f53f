"""Plotly figures of results.

Colours are chosen to be read on light and on dark backgrounds: transparent paper, text and grid in
mid grey. Heatmaps are centred at zero, blue pushes the readout up and red down; what does not
exist is blank.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_lora.errors import ArgumentError
from lens_lora.show.figures.style import (
    BLANK,
    DIVERGING,
    EMBEDDINGS,
    EXACT,
    FLIP,
    INK,
    KINDS,
    LINEAR,
    NOISE,
    Cells,
    Labels,
    style,
    title,
)
from lens_lora.show.text import chosen_prompt, method_text, percent, signed, visible
from lens_lora.show.words.account import SIGMAS

if TYPE_CHECKING:
    from lens_lora.analyses.margin import FactMargin
    from lens_lora.analyses.remainder_curve import RemainderCurve
    from lens_lora.results.attribution import Attribution

__all__ = ["margin_figure", "position_heatmap", "remainder_figure", "site_heatmap"]

_MOST_TICKS, _MOST_LAYER_TICKS = 60, 20
_HIGHEST_SHARE, _ROOM_FOR_THE_LABEL = 300.0, 0.25


def site_heatmap(attribution: Attribution, prompt: int | None = None) -> go.Figure:
    """Layer × kind of module, hover naming each site; a site that does not exist is blank.

    Args:
        prompt: an index; without it, the mean over prompts.
    """
    values, shift, whose = _values_of(attribution, prompt)
    kinds = [k for k in KINDS if any(s.kind == k for s in attribution.sites)]
    layers = _layers(attribution)
    z: Cells = [[None] * len(kinds) for _ in layers]
    hover: Labels = [[""] * len(kinds) for _ in layers]
    for site, value in zip(attribution.sites, values, strict=True):
        row, column = layers.index(site.layer), kinds.index(site.kind)
        z[row][column] = value
        hover[row][column] = (
            f"<b>{html.escape(site.name)}</b><br>{html.escape(site.module)}"
            f"<br>{_value_text(value, shift, attribution.units)}"
        )
    figure = _heatmap(z, hover, kinds, attribution)
    figure.update_layout(title=title(_heading(attribution, whose), "by layer and kind of module"))
    figure.update_xaxes(title_text="kind of module", type="category")
    return figure


def position_heatmap(attribution: Attribution, prompt: int = 0) -> go.Figure:
    """Layer × token position of one prompt, summed over the layer's sites.

    Raises:
        ArgumentError: the attribution was not split by position.
    """
    if "position" not in attribution.by:
        raise ArgumentError(
            f"the attribution is split by {attribution.by or 'nothing'}, not by position; compute "
            'it with first_order(..., by="position").'
        )
    index = chosen_prompt(prompt, len(attribution.base))
    tokens = attribution.str_tokens[index]
    shift, values = float(attribution.shift[index]), _by_position(attribution, index)
    layers = _layers(attribution)
    z: Cells = [[None] * len(tokens) for _ in layers]
    for site, row in zip(attribution.sites, values, strict=True):
        at = layers.index(site.layer)
        z[at] = [(old or 0.0) + new for old, new in zip(z[at], row, strict=True)]
    hover = [
        [
            f"<b>layer {layer}, position {i}</b>: {html.escape(visible(token))}"
            f"<br>{_value_text(value, shift, attribution.units)}"
            for i, (token, value) in enumerate(zip(tokens, row, strict=True))
        ]
        for layer, row in zip(layers, z, strict=True)
    ]
    figure = _heatmap(z, hover, list(range(len(tokens))), attribution)
    figure.update_layout(
        title=title(_heading(attribution, _whose(attribution, index)), "by layer and position")
    )
    ticks = range(0, len(tokens), math.ceil(len(tokens) / _MOST_TICKS))
    labels = [f"{i} {html.escape(visible(tokens[i]))}" for i in ticks]
    figure.update_xaxes(tickvals=list(ticks), ticktext=labels)
    return figure


def remainder_figure(curve: RemainderCurve, prompt: int = 0) -> go.Figure:
    """The readout and its first-order line along ε, and |R(ε)| as a share of the shift.

    Where |R| is under three noise floors it is greyed: its share there is a ratio of rounding.
    """
    index = chosen_prompt(prompt, len(curve.base))
    scales = curve.scales.double().tolist()
    rest, shift = curve.remainder[index].tolist(), curve.shift[index].tolist()
    floor = SIGMAS * float(curve.noise_floor[index])
    is_noise = [abs(r) <= floor for r in rest]
    shares = [100 * abs(r / s) if s else None for r, s in zip(rest, shift, strict=True)]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for trace in _along(curve, index):
        figure.add_trace(trace, row=1, col=1)
    figure.add_trace(_share_trace(scales, shares, rest, is_noise, curve.units), row=2, col=1)
    for low, high in _runs(scales, is_noise):
        figure.add_vrect(x0=low, x1=high, fillcolor=NOISE, opacity=0.25, line_width=0)
    style(figure, height=520)
    figure.update_layout(
        title=title(curve.readout, "along ε: exact, first order, and what it leaves")
    )
    figure.update_yaxes(title_text=html.escape(curve.units), row=1, col=1)
    clear = [s for s, noise in zip(shares, is_noise, strict=True) if s is not None and not noise]
    largest = max(clear, default=1.0)
    top, cut = min(1.12 * largest, _HIGHEST_SHARE), ", cut" if largest > _HIGHEST_SHARE else ""
    figure.update_yaxes(title_text=f"|R| / |shift|, %{cut}", range=[0, max(top, 1.0)], row=2, col=1)
    figure.update_xaxes(title_text="ε, strength of the adapter", row=2, col=1)
    if any(is_noise):
        figure.add_annotation(
            text=f"grey: |R| under {SIGMAS:g} noise floors",
            **{"x": 1, "y": 0, "xref": "paper", "yref": "paper", "yanchor": "bottom"},
            **{"xanchor": "right", "showarrow": False, "font": {"size": 11}},
        )
    return figure


def margin_figure(fact_margin: FactMargin, prompt: int = 0) -> go.Figure:
    """The margin along ε, its first-order line, the zero line and the flip."""
    curve = fact_margin.curve
    index = chosen_prompt(prompt, len(curve.base))
    figure = go.Figure(_along(curve, index))
    figure.add_hline(y=0, line={"color": INK, "width": 1.5})
    flip = float(fact_margin.flip_scale[index])
    if math.isfinite(flip):
        # Where the margin is not: before the flip it has its base's sign, after it the other.
        side = "left" if flip > _ROOM_FOR_THE_LABEL else "right"
        height = "top" if (float(curve.base[index]) < 0) == (side == "left") else "bottom"
        figure.add_vline(
            x=flip,
            line={"color": FLIP, "width": 1.5, "dash": "dot"},
            annotation={
                "text": f"flips at ε = {flip:.3g}",
                "font": {"color": FLIP},
                "xshift": 6 if side == "right" else -6,
            },
            annotation_position=f"{height} {side}",
        )
    style(figure, height=380)
    figure.update_layout(title=title(curve.readout, "along ε, from the base model to the adapted"))
    figure.update_xaxes(title_text="ε, strength of the adapter")
    figure.update_yaxes(title_text=f"margin, {html.escape(curve.units)}")
    return figure


def _values_of(attribution: Attribution, prompt: int | None) -> tuple[list[float], float, str]:
    """Per-site values, shift, and whose they are: one prompt's, or the mean."""
    batch = len(attribution.base)
    if prompt is None and batch > 1:
        values, shift = attribution.per_site.double().mean(0), attribution.shift.double().mean()
        return values.tolist(), float(shift), f"mean of {batch} prompts"
    index = chosen_prompt(prompt or 0, batch)
    values, shift = attribution.per_site[index].double(), float(attribution.shift[index])
    return values.tolist(), shift, _whose(attribution, index)


def _whose(attribution: Attribution, index: int) -> str:
    batch = len(attribution.base)
    return f"prompt {index} of {batch}" if batch > 1 else ""


def _by_position(attribution: Attribution, index: int) -> list[list[float]]:
    """[site, position] of one prompt, its padding left out and other axes summed."""
    values = attribution.values[index].double()
    for axis in range(len(attribution.by), 0, -1):
        if attribution.by[axis - 1] != "position":
            values = values.sum(axis)
    return values[:, : len(attribution.str_tokens[index])].tolist()


def _value_text(value: float | None, shift: float, units: str) -> str:
    if value is None:
        return "no site"
    share = percent(value / shift) if shift else "—"
    return f"{signed(value)} {html.escape(units)}<br>{share} of the shift"


def _layers(attribution: Attribution) -> range:
    """Every layer up to the last adapted one; embeddings, where adapted, are layer −1."""
    found = [site.layer for site in attribution.sites]
    return range(min(0, *found), 1 + max(found))


def _layer_ticks(attribution: Attribution, layers: Sequence[int]) -> dict[int, str]:
    """Every few layers by number, and what lies outside the layers by its own name."""
    step = math.ceil(len(layers) / _MOST_LAYER_TICKS)
    numbers = {layer: str(layer) for layer in layers if layer % step == 0}
    outside = {s.layer: s.kind for s in attribution.sites if s.kind in (*EMBEDDINGS, "unembed")}
    return numbers | outside


def _heatmap(
    z: Cells, hover: Labels, x: Sequence[str | int], attribution: Attribution
) -> go.Figure:
    layers, units = _layers(attribution), attribution.units
    reach = max((abs(v) for row in z for v in row if v is not None), default=0.0) or 1.0
    trace = go.Heatmap(
        z=z,
        x=list(x),
        y=list(layers),
        hovertext=hover,
        hoverinfo="text",
        hoverongaps=False,
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
    figure = go.Figure(trace)
    style(figure, height=max(300, 150 + 18 * len(z)))
    figure.update_layout(plot_bgcolor=BLANK)
    figure.update_xaxes(showgrid=False, constrain="domain")
    ticks = _layer_ticks(attribution, layers)
    figure.update_yaxes(
        title_text="layer",
        showgrid=False,
        tickvals=list(ticks),
        ticktext=list(ticks.values()),
    )
    return figure


def _along(curve: RemainderCurve, index: int) -> list[go.Scatter]:
    """g(ε), exact, from the base model on, and the line g(0) + ε Σ a_l."""
    base, slope = float(curve.base[index]), float(curve.slope[index])
    scales = [0.0, *curve.scales.double().tolist()]
    units = html.escape(curve.units)
    exact = go.Scatter(
        x=scales,
        y=[base, *curve.values[index].double().tolist()],
        name="exact",
        mode="lines+markers",
        line={"color": EXACT, "width": 2.5},
        marker={"size": 5},
        hovertemplate=f"ε = %{{x:.3g}}<br>%{{y:.4g}} {units}, exact<extra></extra>",
    )
    line = go.Scatter(
        x=scales,
        y=[base + scale * slope for scale in scales],
        name="first order at ε = 0",
        mode="lines",
        line={"color": LINEAR, "width": 2, "dash": "dash"},
        hovertemplate=f"ε = %{{x:.3g}}<br>%{{y:.4g}} {units}, first order<extra></extra>",
    )
    return [exact, line]


def _share_trace(
    scales: Sequence[float],
    shares: Sequence[float | None],
    rest: Sequence[float],
    is_noise: Sequence[bool],
    units: str,
) -> go.Scatter:
    notes = [
        f"R = {signed(r)} {html.escape(units)}" + (", below the noise" if noise else "")
        for r, noise in zip(rest, is_noise, strict=True)
    ]
    return go.Scatter(
        x=list(scales),
        y=list(shares),
        name="|R| / |shift|",
        showlegend=False,
        mode="lines+markers",
        line={"color": LINEAR, "width": 2},
        marker={"size": 6, "color": [NOISE if noise else LINEAR for noise in is_noise]},
        hovertext=notes,
        hovertemplate="ε = %{x:.3g}<br>%{y:.3g}% of the shift<br>%{hovertext}<extra></extra>",
    )


def _runs(scales: Sequence[float], marked: Sequence[bool]) -> list[tuple[float, float]]:
    """Marked stretches of the axis, each reaching half way to its unmarked neighbours."""
    edges = [0.0, *((a + b) / 2 for a, b in zip(scales, scales[1:], strict=False)), scales[-1]]
    runs: list[tuple[float, float]] = []
    for i in (i for i, is_marked in enumerate(marked) if is_marked):
        starts_anew = not runs or runs[-1][1] != edges[i]
        low = edges[i] if starts_anew else runs.pop()[0]
        runs.append((low, edges[i + 1]))
    return runs


def _heading(attribution: Attribution, whose: str) -> str:
    parts = (attribution.readout, method_text(attribution.method, attribution.at), whose)
    return ", ".join(part for part in parts if part)
