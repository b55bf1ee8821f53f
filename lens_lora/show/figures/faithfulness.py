"""Share of the shift that remains as the top of each ranking is kept, and as it is dropped."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_lora.analyses.faithfulness import Faithfulness
from lens_lora.results import drawing
from lens_lora.results.choosing import prompt_rows
from lens_lora.results.keys import RANDOM, UPDATE_NORM, WEIGHT_NORM
from lens_lora.show.figures.parts import whose
from lens_lora.show.figures.style import NOISE, style, title
from lens_lora.show.figures.theme import INK, PALETTE
from lens_lora.show.text import key_text, label, percent

__all__ = ["faithfulness_figure"]

_BASELINES = {
    WEIGHT_NORM: ("dash", "square"),
    UPDATE_NORM: ("dot", "diamond"),
    RANDOM: ("dashdot", "x"),
}
_SOLID = ("solid", "circle")
_SIDES = (("keep", "kept, the others off"), ("drop", "dropped, the others on"))


@drawing.figure.register(Faithfulness)
def faithfulness_figure(result: Faithfulness, prompt: int | None = None) -> go.Figure:
    """Keep-top-k on the left (high is good), drop-top-k on the right (low is good).

    Args:
        result: to be drawn.
        prompt: an index; without it, the mean over prompts.

    Raises:
        ArgumentError: no such prompt.
    """
    rows, sites = prompt_rows(prompt, len(result.base)), len(result.sites)
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
                    name=label(key_text(name)),
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
                        f"<b>{label(key_text(name))}</b>, {area}<br>{count} of {sites} "
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
        title=title(
            f"{result.readout}: share of the shift that the top of each ranking carries",
            f"by real interventions · {whose(prompt, result.str_tokens)}",
        ),
        margin={"t": 100},
        legend={"x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top", "orientation": "v"},
    )
    figure.update_annotations(font={"size": 13})
    figure.update_xaxes(title_text="sites, %", range=[-2, 102])
    figure.update_yaxes(title_text="share of the shift, %", row=1, col=1)
    return figure


def _colour(name: str, coloured: list[str]) -> str:
    return NOISE if name in _BASELINES else PALETTE[coloured.index(name) % len(PALETTE)]
