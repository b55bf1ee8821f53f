"""The readout along ε with its first-order line, and the share of the shift that it leaves."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_lora.analyses.remainder_curve import RemainderCurve
from lens_lora.results import drawing
from lens_lora.results.choosing import only_prompt
from lens_lora.results.measured import SIGMAS
from lens_lora.show.figures.parts import along_path, whose
from lens_lora.show.figures.style import LINEAR, NOISE, style, title
from lens_lora.show.text import label, signed

__all__ = ["remainder_figure"]

_HIGHEST_SHARE = 300.0


@drawing.figure.register(RemainderCurve)
def remainder_figure(curve: RemainderCurve, prompt: int | None = None) -> go.Figure:
    """The readout and its first-order line along ε, and |R(ε)| as a share of the shift.

    Where |R| is under three noise floors of its own it is greyed: its share is one of rounding.

    Args:
        curve: along the path.
        prompt: an index; without it, the only prompt.

    Raises:
        ArgumentError: no such prompt, or several and none named.
    """
    index = only_prompt(prompt, len(curve.base), "curves along ε")
    scales = curve.scales.cpu().double().tolist()
    rest, shift = curve.remainder[index].tolist(), curve.shift[index].tolist()
    floors = (SIGMAS * curve.remainder_floor[index]).tolist()
    is_noise = [abs(r) <= floor for r, floor in zip(rest, floors, strict=True)]
    shares = [100 * abs(r / s) if s else None for r, s in zip(rest, shift, strict=True)]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for trace in along_path(curve, index):
        figure.add_trace(trace, row=1, col=1)
    figure.add_trace(_share_trace(scales, shares, rest, is_noise, curve.units), row=2, col=1)
    for low, high in _runs(scales, is_noise):
        figure.add_vrect(x0=low, x1=high, fillcolor=NOISE, opacity=0.25, line_width=0)
    style(figure, height=520)
    figure.update_layout(
        title=title(
            f"{curve.readout} along ε: exact, first order, and what it leaves",
            whose(index, curve.str_tokens),
        )
    )
    figure.update_yaxes(title_text=label(curve.units), row=1, col=1)
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


def _share_trace(
    scales: Sequence[float],
    shares: Sequence[float | None],
    rest: Sequence[float],
    is_noise: Sequence[bool],
    units: str,
) -> go.Scatter:
    notes = [
        f"R = {signed(r)} {label(units)}" + (", below the noise" if noise else "")
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
