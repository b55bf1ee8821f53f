"""Measured effects against an attribution: a point a site, the identity line, one colour a kind."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from lens_lora.show.figures.style import INK, KINDS, style, title
from lens_lora.show.text import chosen_prompt, signed

if TYPE_CHECKING:
    from lens_lora.analyses.compare import Comparison

__all__ = ["comparison_scatter"]

_PALETTE = ("#2f83c5", "#e0802b", "#3a9d5d", "#c9445a", "#8a63c9", "#a8763e", "#c95fa5", "#9a9a2e")
_SYMBOLS = ("circle", "diamond", "square")
_MARGIN = 0.05


def comparison_scatter(comparison: Comparison, prompt: int | None = None) -> go.Figure:
    """Effect (y) against attribution (x); hover names each site or group.

    Args:
        prompt: an index; without it, the mean over prompts.
    """
    x, y, whose = _values(comparison, prompt)
    units = html.escape(comparison.units)
    low, high = min([*x, *y]), max([*x, *y])
    spare = _MARGIN * (high - low or 1.0)
    ends = [low - spare, high + spare]
    figure = go.Figure(
        go.Scatter(
            x=ends,
            y=ends,
            mode="lines",
            name="identity",
            line={"color": INK, "width": 1.5, "dash": "dash"},
            hoverinfo="skip",
        )
    )
    kinds = sorted(set(comparison.kinds), key=lambda k: KINDS.index(k) if k in KINDS else -1)
    for number, kind in enumerate(kinds):
        own = [i for i, k in enumerate(comparison.kinds) if k == kind]
        figure.add_trace(
            go.Scatter(
                x=[x[i] for i in own],
                y=[y[i] for i in own],
                mode="markers",
                name=html.escape(kind),
                marker={
                    "color": _PALETTE[number % len(_PALETTE)],
                    "symbol": _SYMBOLS[number // len(_PALETTE) % len(_SYMBOLS)],
                    "size": 7,
                    "opacity": 0.75,
                },
                hovertext=[
                    f"<b>{html.escape(comparison.labels[i])}</b><br>{signed(x[i])} {units}, "
                    f"{html.escape(comparison.attribution_name)}<br>{signed(y[i])} {units}, "
                    f"{html.escape(comparison.effects_name)}"
                    for i in own
                ],
                hoverinfo="text",
            )
        )
    style(figure, height=520)
    figure.update_layout(
        title=title(comparison.readout + whose, _agreement(comparison, prompt)),
        legend={
            "orientation": "v",
            "x": 1.02,
            "xanchor": "left",
            "y": 1.0,
            "yanchor": "top",
        },
    )
    figure.update_xaxes(title_text=f"{html.escape(comparison.attribution_name)}, {units}")
    figure.update_yaxes(title_text=f"{html.escape(comparison.effects_name)}, {units}")
    return figure


def _values(comparison: Comparison, prompt: int | None) -> tuple[list[float], list[float], str]:
    batch = len(comparison.pearson)
    if prompt is None and batch > 1:
        a, e = comparison.attribution.mean(0), comparison.effects.mean(0)
        return a.tolist(), e.tolist(), f", mean of {batch} prompts"
    index = chosen_prompt(prompt or 0, batch)
    a, e = comparison.attribution[index], comparison.effects[index]
    whose = f", prompt {index} of {batch}" if batch > 1 else ""
    return a.tolist(), e.tolist(), whose


def _agreement(comparison: Comparison, prompt: int | None) -> str:
    """The statistics of the prompt, or their mean over prompts; '—' where there is none."""
    shown: list[str] = []
    for name in ("pearson", "spearman", "slope"):
        value = (
            comparison.mean(name) if prompt is None else float(comparison.per_prompt[name][prompt])
        )
        shown.append(f"{name.title()} {f'{value:.3f}' if math.isfinite(value) else '—'}")
    is_mean = prompt is None and len(comparison.pearson) > 1
    return ", ".join(shown) + (", each the mean over prompts" if is_mean else "")
