"""What several figures share: heatmaps, bars, token ticks, whose numbers are shown.

Colours can be read on light and on dark backgrounds (`theme.py`). Heatmaps are centred at zero,
which has no colour: blue pushes the readout up and red down. What does not exist is grey.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import plotly.graph_objects as go

from lens_lora.analyses.remainder_curve import RemainderCurve
from lens_lora.show.figures.style import BLANK, EXACT, LINEAR, Cells, Labels, style
from lens_lora.show.figures.theme import DIVERGING, SEQUENTIAL
from lens_lora.show.text import label, percent, short_prompt, signed, visible

__all__ = [
    "NEGATIVE",
    "along_path",
    "bars",
    "colorbar",
    "heatmap",
    "token_ticks",
    "value_text",
    "whose",
]

NEGATIVE = "#c9445a"
_MOST_TICKS, _FEW_TICKS = 40, 20
_MOST_WITH_GAPS = 100
_PROMPT, _PROMPTS = 48, 2

Scale = Literal["pushes", "signed", "amount"]
_SAYS = {"pushes": "blue pushes up", "signed": "blue above zero", "amount": ""}


def whose(prompt: int | None, str_tokens: Sequence[Sequence[str]]) -> str:
    """'“The capital of”', 'prompt 1 of 3, “…”', or 'mean of 3 prompts: “…”, “…”, …'.

    Args:
        prompt: an index, or None for the mean.
        str_tokens: each prompt's tokens.
    """
    batch = len(str_tokens)
    if prompt is None and batch > 1:
        named = [_quoted(tokens) for tokens in str_tokens[:_PROMPTS]]
        rest = ", …" if batch > _PROMPTS else ""
        return f"mean of {batch} prompts: {', '.join(named)}{rest}"
    index = prompt or 0
    which = f"prompt {index} of {batch}, " if batch > 1 else ""
    return which + _quoted(str_tokens[index])


def _quoted(tokens: Sequence[str]) -> str:
    text = short_prompt(tokens)
    return f"“{text}”" if len(text) <= _PROMPT else f"“… {text[-_PROMPT:].partition(' ')[2]}”"


def value_text(value: float, shift: float, units: str) -> str:
    """A value with its units and its share of the shift, for a hover.

    Args:
        value: in the readout's units.
        shift: what it is a share of.
        units: the readout's.
    """
    share = percent(value / shift) if shift else "—"
    return f"{signed(value)} {label(units)}<br>{share} of the shift"


def colorbar(units: str, scale: Scale = "pushes", note: str = "") -> dict[str, Any]:
    """Of a heatmap: its units, and what blue means.

    Args:
        units: of its values.
        scale: as for `heatmap`.
        note: a third line.
    """
    lines = (label(units), _SAYS[scale], note)
    return {
        "title": {
            "text": "<br>".join([*filter(None, lines), "&nbsp;"]),
            "side": "top",
            "font": {"size": 13},
        },
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
    scale: Scale = "pushes",
    reach: float | None = None,
    height: int = 150,
    row_height: int = 18,
) -> go.Figure:
    """Cells coloured from −reach to reach, amounts from zero; None is grey.

    Args:
        z: rows of values.
        hover: a text for each cell.
        x: a label for each column.
        y: a label for each row.
        units: of the values.
        scale: 'pushes' of what a readout is moved by, 'signed' of other numbers of both signs,
            'amount' of what is never below zero.
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
        colorscale=SEQUENTIAL if scale == "amount" else DIVERGING,
        zmin=0 if scale == "amount" else -reach,
        zmid=None if scale == "amount" else 0,
        zmax=reach,
        xgap=int(len(x) <= _MOST_WITH_GAPS),
        ygap=int(len(y) <= _MOST_WITH_GAPS),
        colorbar=colorbar(units, scale),
    )
    figure = go.Figure([trace, *_blank(z, x, y)])
    style(figure, height=max(300, height + row_height * len(z)))
    figure.update_xaxes(showgrid=False, constrain="domain")
    figure.update_yaxes(showgrid=False)
    return figure


def _blank(z: Cells, x: Sequence[Any], y: Sequence[Any]) -> list[go.Heatmap]:
    """A grey cell wherever there is no value; none where all have one."""
    cells = [[1.0 if value is None else None for value in row] for row in z]
    if not any(value for row in cells for value in row):
        return []
    return [
        go.Heatmap(
            z=cells,
            x=list(x),
            y=list(y),
            colorscale=[[0, BLANK], [1, BLANK]],
            showscale=False,
            hoverinfo="skip",
            xgap=int(len(x) <= _MOST_WITH_GAPS),
            ygap=int(len(y) <= _MOST_WITH_GAPS),
        )
    ]


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
    figure.update_xaxes(title_text=label(units), zeroline=True)
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    return figure


def token_ticks(
    figure: go.Figure, tokens: Sequence[str], shown: Sequence[int] | None = None
) -> None:
    """Label the horizontal axis with positions and tokens, thinned where they are many.

    Args:
        figure: with a column for each token.
        tokens: of the prompt.
        shown: which of them the columns are of; all without it.
    """
    columns = range(len(tokens)) if shown is None else shown
    step = 1 if len(columns) <= _MOST_TICKS else math.ceil(len(columns) / _FEW_TICKS)
    ticks = range(0, len(columns), step)
    labels = [f"{columns[i]} {label(visible(tokens[columns[i]]))}" for i in ticks]
    figure.update_xaxes(tickvals=list(ticks), ticktext=labels, tickfont={"size": 11})


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
