"""Share of the shift that remains as the top of each ranking is kept, and as it is dropped."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_lora.show.figures.style import GRID, INK, NOISE, style, title
from lens_lora.show.text import chosen_prompt, percent

if TYPE_CHECKING:
    from lens_lora.analyses.faithfulness import Faithfulness

__all__ = ["faithfulness_figure"]

_PALETTE = ("#2f83c5", "#e0802b", "#3a9d5d", "#c9445a", "#8a63c9", "#a8763e", "#c95fa5", "#9a9a2e")
_BASELINES = {"‖ΔW‖": ("dash", "square"), "‖δz‖": ("dot", "diamond"), "random": ("dashdot", "x")}
_SOLID = ("solid", "circle")
_SIDES = (("keep", "kept, the others off"), ("drop", "dropped, the others on"))


def faithfulness_figure(result: Faithfulness, prompt: int | None = None) -> go.Figure:
    """Keep-top-k on the left (high is good), drop-top-k on the right (low is good).

    Args:
        prompt: an index; without it, the mean over prompts.
    """
    whose, rows = _chosen(result, prompt)
    figure = make_subplots(
        rows=1,
        cols=2,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=[f"top of the ranking {text}" for _, text in _SIDES],
    )
    coloured = [name for name in result.names if name not in _BASELINES]
    fractions = [100 * f for f in result.fractions.tolist()]
    for column, (side, _) in enumerate(_SIDES, start=1):
        curves = getattr(result, side)[:, rows].nanmean(1)
        areas = getattr(result, f"area_{side}")[:, rows].nanmean(1)
        for index, name in enumerate(result.names):
            shares = [100 * y if y == y else None for y in curves[index].tolist()]
            area = f"area {float(areas[index]):.2f}"
            figure.add_trace(
                go.Scatter(
                    x=fractions,
                    y=shares,
                    name=html.escape(name),
                    legendgroup=name,
                    showlegend=column == 1,
                    mode="lines+markers",
                    line={
                        "color": _colour(name, coloured),
                        "width": 1.6 if name in _BASELINES else 2.4,
                        "dash": _BASELINES.get(name, _SOLID)[0],
                    },
                    marker={"size": 6, "symbol": _BASELINES.get(name, _SOLID)[1]},
                    hovertext=[
                        f"<b>{html.escape(name)}</b>, {area}<br>{count} of {len(result.sites)} "
                        f"sites: {percent(y / 100) if y is not None else '—'} of the shift"
                        for count, y in zip(result.counts, shares, strict=True)
                    ],
                    hoverinfo="text",
                ),
                row=1,
                col=column,
            )
    for level in (0, 100):
        figure.add_hline(y=level, line={"color": INK, "width": 1})
    style(figure, height=460)
    figure.update_layout(
        title=title(result.readout + whose, "share of the shift, by real interventions"),
        margin={"t": 100},
        legend={"x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top", "orientation": "v"},
    )
    figure.update_annotations(font={"size": 13, "color": INK})
    figure.update_xaxes(title_text="sites, %", gridcolor=GRID, range=[-2, 102])
    figure.update_yaxes(title_text="share of the shift, %", row=1, col=1)
    return figure


def _chosen(result: Faithfulness, prompt: int | None) -> tuple[str, slice]:
    batch = len(result.base)
    if prompt is None and batch > 1:
        return f", mean of {batch} prompts", slice(None)
    index = chosen_prompt(prompt or 0, batch)
    whose = f", prompt {index} of {batch}" if batch > 1 else ""
    return whose, slice(index, index + 1)


def _colour(name: str, coloured: list[str]) -> str:
    return NOISE if name in _BASELINES else _PALETTE[coloured.index(name) % len(_PALETTE)]
