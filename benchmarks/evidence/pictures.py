"""The figures of the evidence's page: accuracy against cost, and agreement against strength.

They are drawn from standings and intervals alone; nothing is measured here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from benchmarks.evidence.intervals import Standing, Summary
from benchmarks.evidence.tables import named

COLOURS = ("#3b6fb6", "#d1495b", "#2e933c", "#8f5db7", "#e39b2d", "#5b5b5b", "#1b998b")
# A method belongs to the family of the first pattern that its key begins with.
FAMILIES = {
    r"mean\(": "means of two",
    r"first_order/": "with frozen rules, RelP's among them",
    r"first_order": "first order",
    r"path": "path integral",
    r"second_order|hessian_steps": "second order, Hessian products",
    r"add_one|leave_one_out": "the other effect, measured",
    r".*": "foils and nulls",
}
# Points that would hide each other are drawn apart, each by this factor on a logarithmic axis.
ASIDE = 1.045
# A dearer method is on the front only if its score is better by this.
LEAST = 0.005
# Where the names on the front are written, from the cheapest method on.
PLACES = ("bottom right", "top left", "top center", "top right")
# The line that shows an interval.
WHISKER = {"thickness": 0.8, "width": 0}
STRENGTHS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, score) that are better than all cheaper ones, by cost."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    on_front = []
    best = float("-inf")
    for i in order:
        _, score = points[i]
        if score > best + LEAST:
            on_front.append(i)
            best = score
    return on_front


def family(method: str) -> str:
    """The family that a method belongs to, which gives it its colour."""
    return next(name for begin, name in FAMILIES.items() if re.match(begin, method))


def pareto(panels: Mapping[str, tuple[list[Standing], Mapping[str, float]]]) -> go.Figure:
    """One panel per question: score with its interval against cost, the Pareto front drawn in.

    A colour for each kind of method; what ties with the best is filled, and what is on the front is
    named. Points of one cost stand side by side, the best on the left.

    Args:
        panels: by title, the standings of all methods and their costs in forward passes.
    """
    figure = make_subplots(
        rows=1, cols=len(panels), subplot_titles=list(panels), horizontal_spacing=0.05
    )
    shown: set[str] = set()
    for column, (standings, cost) in enumerate(panels.values(), start=1):
        priced = [standing for standing in standings if cost.get(standing.method, 0.0) > 0]
        points = [(cost[standing.method], standing.score.median) for standing in priced]
        on_front = front(points)
        place_of: dict[int, str] = {}
        for rank, index in enumerate(on_front):
            place_of[index] = PLACES[min(rank, len(PLACES) - 1)]
        figure.add_trace(_line([points[i] for i in on_front]), 1, column)
        drawn_at = Counter[float]()
        for index, standing in enumerate(priced):
            at = round(cost[standing.method], 3)
            x = at * ASIDE ** drawn_at[at]
            drawn_at[at] += 1
            kind = family(standing.method)
            place = place_of.get(index)
            is_new = kind not in shown
            figure.add_trace(_point(standing, x, kind, place, in_legend=is_new), 1, column)
            shown.add(kind)
        figure.update_xaxes(
            type="log", tickvals=[1, 3, 10, 30, 100], title="passes", row=1, col=column
        )
    figure.update_layout(
        template="plotly_white",
        font={"size": 13},
        legend={"orientation": "h", "x": 0, "y": -0.16, "yanchor": "top", "itemsizing": "constant"},
        margin={"l": 50, "r": 20, "t": 50, "b": 110},
    )
    return figure


def _line(points: Sequence[tuple[float, float]]) -> go.Scatter:
    """The Pareto front through these points (cost, score)."""
    return go.Scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        mode="lines",
        showlegend=False,
        line={"color": "#bbbbbb", "shape": "hv"},
    )


def _point(
    standing: Standing, cost: float, kind: str, place: str | None, *, in_legend: bool
) -> go.Scatter:
    """A method's score and interval; its name is written at a place, if one is given."""
    score = standing.score
    colour = COLOURS[list(FAMILIES.values()).index(kind)]
    return go.Scatter(
        x=[cost],
        y=[score.median],
        error_y={**_intervals([score]), "color": colour},
        mode="markers+text",
        text=[named(standing.method) if place else ""],
        textposition=place,
        textfont={"size": 11, "color": colour},
        name=kind,
        legendgroup=kind,
        showlegend=in_legend,
        marker={
            "size": 9,
            "color": colour if standing.tie else "white",
            "line": {"color": colour, "width": 1.8},
        },
    )


def strength(panels: Mapping[str, Mapping[str, list[tuple[float, Summary]]]]) -> go.Figure:
    """One panel per question: median agreement in bins of strength, with intervals over tasks."""
    figure = make_subplots(
        rows=1, cols=len(panels), subplot_titles=list(panels), horizontal_spacing=0.07
    )
    for column, curves in enumerate(panels.values(), start=1):
        for place, (method, points) in enumerate(curves.items()):
            strengths = [at * ASIDE**place for at, _ in points]
            correlations = [found for _, found in points]
            trace = go.Scatter(
                x=strengths,
                y=[found.median for found in correlations],
                error_y=_intervals(correlations),
                mode="lines+markers",
                name=named(method),
                legendgroup=method,
                showlegend=column == 1,
                line={"color": COLOURS[place]},
            )
            figure.add_trace(trace, 1, column)
        figure.update_xaxes(type="log", tickvals=STRENGTHS, title="‖ΔW‖ / ‖W‖", row=1, col=column)
        figure.update_yaxes(title="rank correlation" if column == 1 else None, row=1, col=column)
    figure.update_layout(
        template="plotly_white", font={"size": 13}, margin={"l": 60, "r": 20, "t": 50, "b": 60}
    )
    return figure


def _intervals(summaries: Sequence[Summary]) -> dict[str, Any]:
    """The intervals of medians, as plotly takes them: distances up and down from each median."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [found.high - found.median for found in summaries],
        "arrayminus": [found.median - found.low for found in summaries],
        **WHISKER,
    }


def save(figure: go.Figure, file: Path, width: int, height: int) -> None:
    """Write a figure as a PNG (needs kaleido and a Chromium that it can find)."""
    figure.write_image(file, width=width, height=height, scale=1.5)
