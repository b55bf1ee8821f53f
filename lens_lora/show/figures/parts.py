"""What several figures share: heatmaps, bars, token ticks, whose numbers are shown.

Colours can be read on light and on dark backgrounds: transparent paper, text and grid in mid grey.
Heatmaps are centred at zero, blue pushes the readout up and red down; what does not exist is blank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lens_lora.analyses.remainder_curve import RemainderCurve
from lens_lora.show.figures.style import BLANK, DIVERGING, EXACT, LINEAR, Cells, Labels, style
from lens_lora.show.text import label, percent, signed, visible

__all__ = [
    "NEGATIVE",
    "PALETTE",
    "along_path",
    "bars",
    "colorbar",
    "heatmap",
    "token_ticks",
    "value_text",
    "whose",
]

PALETTE = ("#2f83c5", "#e0802b", "#3a9d5d", "#c9445a", "#8a63c9", "#a8763e", "#c95fa5", "#9a9a2e")
NEGATIVE = "#c9445a"
_MOST_TICKS = 40
_MOST_WITH_GAPS = 100


def whose(prompt: int | None, batch: int) -> str:
    """', prompt 1 of 3', ', mean of 3 prompts'; nothing where there is one prompt.

    Args:
        prompt: an index, or None for the mean.
        batch: how many prompts the result has.
    """
    if batch == 1:
        return ""
    return f", mean of {batch} prompts" if prompt is None else f", prompt {prompt} of {batch}"


def value_text(value: float, shift: float, units: str) -> str:
    """A value with its units and its share of the shift, for a hover.

    Args:
        value: in the readout's units.
        shift: what it is a share of.
        units: the readout's.
    """
    share = percent(value / shift) if shift else "—"
    return f"{signed(value)} {label(units)}<br>{share} of the shift"


def colorbar(units: str, note: str = "") -> dict[str, Any]:
    """Of a heatmap centred at zero.

    Args:
        units: of its values.
        note: a third line.
    """
    below = f"<br>{note}" if note else ""
    return {
        "title": {"text": f"{label(units)}<br>blue pushes up{below}", "side": "top"},
        "thickness": 14,
        "outlinewidth": 0,
    }


def heatmap(
    z: Cells,
    hover: Labels,
    x: Sequence[Any],
    y: Sequence[Any],
    units: str,
    *,
    reach: float | None = None,
    height: int = 150,
    row_height: int = 18,
) -> go.Figure:
    """Cells coloured from −reach to reach; None is blank.

    Args:
        z: rows of values.
        hover: a text for each cell.
        x: a label for each column.
        y: a label for each row.
        units: of the values.
        reach: what has the colour of the end; by default the largest magnitude.
        height: of all but the rows, in pixels.
        row_height: of a row, in pixels.
    """
    if reach is None:
        reach = max((abs(v) for row in z for v in row if v is not None), default=0.0)
    reach = reach or 1.0
    trace = go.Heatmap(
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
        xgap=int(len(x) <= _MOST_WITH_GAPS),
        ygap=1,
        colorbar=colorbar(units),
    )
    figure = go.Figure(trace)
    style(figure, height=max(300, height + row_height * len(z)))
    figure.update_layout(plot_bgcolor=BLANK)
    figure.update_xaxes(showgrid=False, constrain="domain")
    figure.update_yaxes(showgrid=False)
    return figure


def bars(
    names: Sequence[str], values: Sequence[float], hover: Sequence[str], units: str
) -> go.Figure:
    """One horizontal bar each, the first on top.

    Args:
        names: of the bars.
        values: their lengths.
        hover: a text for each.
        units: of the values.
    """
    figure = go.Figure(
        go.Bar(
            x=list(values),
            y=[label(name) for name in names],
            orientation="h",
            marker={"color": [EXACT if v >= 0 else NEGATIVE for v in values]},
            hovertext=list(hover),
            hoverinfo="text",
        )
    )
    style(figure, height=max(240, 130 + 20 * len(names)))
    figure.update_xaxes(title_text=label(units), zeroline=True, zerolinecolor="#777777")
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    return figure


def token_ticks(figure: go.Figure, tokens: Sequence[str]) -> None:
    """Label the horizontal axis with positions and tokens, thinned where they are many.

    Args:
        figure: with a column for each token.
        tokens: of the prompt.
    """
    ticks = range(0, len(tokens), math.ceil(len(tokens) / _MOST_TICKS))
    labels = [f"{i} {label(visible(tokens[i]))}" for i in ticks]
    figure.update_xaxes(tickvals=list(ticks), ticktext=labels)


def along_path(curve: RemainderCurve, index: int) -> list[go.Scatter]:
    """g(ε), exact, from the base model on, and the line g(0) + ε Σ a_l.

    Args:
        curve: along the path.
        index: of the prompt.
    """
    base, slope = float(curve.base[index]), float(curve.slope[index])
    scales = [0.0, *curve.scales.cpu().double().tolist()]
    units = label(curve.units)
    exact = go.Scatter(
        x=scales,
        y=[base, *curve.values[index].cpu().double().tolist()],
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
