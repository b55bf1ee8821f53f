"""The page's pictures: accuracy against cost, agreement against strength. Data in, figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import plotly.graph_objects as go
from intervals import Interval, Standing
from plotly.subplots import make_subplots
from tables import named

COLOURS = ("#3b6fb6", "#d1495b", "#2e933c", "#8f5db7", "#e39b2d", "#5b5b5b", "#1b998b")
SYMBOLS = ("circle", "square", "diamond", "triangle-up")


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats at lower or equal cost, by cost."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    kept, best = [], float("-inf")
    for i in order:
        if points[i][1] > best:
            kept.append(i)
            best = points[i][1]
    return kept


def pareto(panels: Mapping[str, tuple[list[Standing], Mapping[str, float]]]) -> go.Figure:
    """One panel per question: score with its interval against cost, the Pareto front drawn in.

    A method that ties with the best is filled.

    Args:
        panels: by title, the standings of all methods and their costs in forward passes.
    """
    figure = make_subplots(
        rows=1, cols=len(panels), subplot_titles=list(panels), horizontal_spacing=0.05
    )
    methods = sorted({s.method for standings, _ in panels.values() for s in standings})
    shown: set[str] = set()
    for column, (standings, cost) in enumerate(panels.values(), start=1):
        priced = [s for s in standings if s.method in cost]
        points = [(cost[s.method], s.score.mean) for s in priced]
        figure.add_trace(_line([points[i] for i in front(points)]), 1, column)
        for standing in priced:
            at = methods.index(standing.method)
            trace = _point(standing, cost[standing.method], at, standing.method not in shown)
            figure.add_trace(trace, 1, column)
            shown.add(standing.method)
        figure.update_xaxes(type="log", dtick=1, title="passes", row=1, col=column)
    figure.update_layout(
        template="plotly_white",
        font={"size": 13},
        legend={"font": {"size": 10}, "tracegroupgap": 0},
        margin={"l": 50, "r": 20, "t": 50, "b": 60},
    )
    return figure


def _line(points: Sequence[tuple[float, float]]) -> go.Scatter:
    return go.Scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        mode="lines",
        showlegend=False,
        line={"color": "#bbbbbb", "shape": "hv"},
    )


def _point(standing: Standing, cost: float, at: int, legend: bool) -> go.Scatter:
    score, colour = standing.score, COLOURS[at % len(COLOURS)]
    return go.Scatter(
        x=[cost],
        y=[score.mean],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [score.high - score.mean],
            "arrayminus": [score.mean - score.low],
            "thickness": 1,
            "width": 2,
            "color": colour,
        },
        mode="markers",
        name=named(standing.method),
        legendgroup=standing.method,
        showlegend=legend,
        marker={
            "size": 10,
            "symbol": SYMBOLS[at // len(COLOURS) % len(SYMBOLS)],
            "color": colour if standing.tie else "white",
            "line": {"color": colour, "width": 2},
        },
    )


def strength(panels: Mapping[str, Mapping[str, list[tuple[float, Interval]]]]) -> go.Figure:
    """One panel per question: the mean agreement of each estimate in bins of strength."""
    figure = make_subplots(
        rows=1, cols=len(panels), subplot_titles=list(panels), horizontal_spacing=0.07
    )
    for column, curves in enumerate(panels.values(), start=1):
        for colour, (method, points) in zip(COLOURS, curves.items(), strict=False):
            figure.add_trace(
                go.Scatter(
                    x=[at for at, _ in points],
                    y=[found.mean for _, found in points],
                    mode="lines+markers",
                    name=named(method),
                    legendgroup=method,
                    showlegend=column == 1,
                    line={"color": colour},
                ),
                1,
                column,
            )
        figure.update_xaxes(type="log", dtick="D2", title="‖ΔW‖ / ‖W‖", row=1, col=column)
        figure.update_yaxes(title="rank correlation" if column == 1 else None, row=1, col=column)
    figure.update_layout(
        template="plotly_white", font={"size": 13}, margin={"l": 60, "r": 20, "t": 50, "b": 60}
    )
    return figure


def save(figure: go.Figure, file: Path, width: int, height: int) -> None:
    """A PNG (needs kaleido and a Chromium that it can find)."""
    figure.write_image(file, width=width, height=height, scale=1.5)
