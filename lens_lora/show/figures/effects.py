"""Figures of real interventions: hook point × position, layer × hook point, bars of groups."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from lens_lora.show.figures.style import BLANK, DIVERGING, EXACT, Cells, Labels, style, title
from lens_lora.show.text import chosen_prompt, method_text, percent, signed, visible

if TYPE_CHECKING:
    from lens_lora.results.activation_effects import ActivationEffects
    from lens_lora.results.effects import Effects

__all__ = ["activation_figure", "group_bars"]

_DIRECTIONS = {
    "base_to_adapted": "base activations into the adapted model",
    "adapted_to_base": "adapted activations into the base model",
}
_NEGATIVE = "#c9445a"
_MOST_TICKS = 60


def activation_figure(effects: ActivationEffects, prompt: int | None = None) -> go.Figure:
    """Hook point × position where each was patched alone; else layer × hook point, or bars.

    Args:
        prompt: an index; without it, the mean over prompts.
    """
    values, shift = effects.of_prompt(prompt)
    rows = values.tolist()
    if effects.by_position:
        figure = _by_position(effects, rows, shift, prompt or 0)
    elif len({layer for layer, _ in effects.places}) > 1:
        figure = _by_layer(effects, rows, shift)
    else:
        hover = [
            _text(n, v, shift, effects.units) for n, v in zip(effects.names, rows, strict=True)
        ]
        figure = _bars(effects.names, rows, hover, effects.units)
    where = "" if effects.positions in ("all", "each") else f", positions {effects.positions}"
    heading = f"{effects.readout}{_whose(len(effects.base), prompt)}"
    figure.update_layout(title=title(heading, _DIRECTIONS[effects.direction] + where))
    return figure


def group_bars(effects: Effects, prompt: int | None = None) -> go.Figure:
    """One bar a group, in the order of the groups.

    Args:
        prompt: an index; without it, the mean over prompts.
    """
    batch = len(effects.base)
    index = slice(None) if prompt is None else [chosen_prompt(prompt, batch)]
    values = effects.values[index].double().mean(0).tolist()
    shift = float(effects.shift[index].double().mean())
    names = list(effects.groups)
    hover = [
        f"{_text(name, value, shift, effects.units)}<br>sites: {len(of)}"
        for (name, of), value in zip(effects.groups.items(), values, strict=True)
    ]
    figure = _bars(names, values, hover, effects.units)
    heading = f"{effects.readout}, {method_text(effects.how, 0.0)}{_whose(batch, prompt)}"
    figure.update_layout(title=title(heading, f"of a shift of {signed(shift)} {effects.units}"))
    return figure


def _by_position(effects: ActivationEffects, rows: Cells, shift: float, prompt: int) -> go.Figure:
    tokens = effects.str_tokens[prompt]
    z = [[_or_none(v) for v in row[: len(tokens)]] for row in rows]
    hover = [
        [
            _text(f"{name}, position {i} {visible(token)}", value, shift, effects.units)
            for i, (token, value) in enumerate(zip(tokens, row, strict=True))
        ]
        for name, row in zip(effects.names, z, strict=True)
    ]
    figure = _heatmap(z, hover, list(range(len(tokens))), list(effects.names), effects.units)
    ticks = range(0, len(tokens), math.ceil(len(tokens) / _MOST_TICKS))
    labels = [f"{i} {html.escape(visible(tokens[i]))}" for i in ticks]
    figure.update_xaxes(tickvals=list(ticks), ticktext=labels)
    figure.update_yaxes(autorange="reversed", type="category")
    return figure


def _by_layer(effects: ActivationEffects, values: Sequence[float], shift: float) -> go.Figure:
    """Layer × hook point; points outside the blocks in a row of their own, below."""
    kinds = list(dict.fromkeys(kind for _, kind in effects.places))
    layers = sorted({-1 if layer is None else layer for layer, _ in effects.places})
    z: Cells = [[None] * len(kinds) for _ in layers]
    hover: Labels = [[""] * len(kinds) for _ in layers]
    for name, (layer, kind), value in zip(effects.names, effects.places, values, strict=True):
        row, column = layers.index(-1 if layer is None else layer), kinds.index(kind)
        z[row][column] = _or_none(value)
        hover[row][column] = _text(name, value, shift, effects.units)
    labels = ["outside" if layer < 0 else str(layer) for layer in layers]
    figure = _heatmap(z, hover, kinds, labels, effects.units)
    figure.update_xaxes(type="category")
    figure.update_yaxes(title_text="layer", type="category")
    return figure


def _heatmap(z: Cells, hover: Labels, x: Sequence[Any], y: Sequence[str], units: str) -> go.Figure:
    reach = max((abs(v) for row in z for v in row if v is not None), default=0.0) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=z,
            x=list(x),
            y=list(y),
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
    )
    style(figure, height=max(300, 170 + 18 * len(y)))
    figure.update_layout(plot_bgcolor=BLANK)
    figure.update_xaxes(showgrid=False, constrain="domain")
    figure.update_yaxes(showgrid=False)
    return figure


def _bars(
    names: Sequence[str], values: Sequence[float], hover: Sequence[str], units: str
) -> go.Figure:
    figure = go.Figure(
        go.Bar(
            x=list(values),
            y=[html.escape(name) for name in names],
            orientation="h",
            marker={"color": [EXACT if v >= 0 else _NEGATIVE for v in values]},
            hovertext=list(hover),
            hoverinfo="text",
        )
    )
    style(figure, height=max(240, 130 + 20 * len(names)))
    figure.update_xaxes(title_text=html.escape(units), zeroline=True, zerolinecolor="#777777")
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    return figure


def _text(name: str, value: float | None, shift: float, units: str) -> str:
    if value is None:
        return "no such position"
    share = percent(value / shift) if shift else "—"
    return (
        f"<b>{html.escape(name)}</b><br>{signed(value)} {html.escape(units)}"
        f"<br>{share} of the shift"
    )


def _or_none(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _whose(batch: int, prompt: int | None) -> str:
    if batch == 1:
        return ""
    return f", mean of {batch} prompts" if prompt is None else f", prompt {prompt} of {batch}"
