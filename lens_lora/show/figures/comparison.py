"""Measured effects against an attribution: a point a site, the identity line, one colour a kind."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from lens_lora.analyses.compare import Comparison
from lens_lora.results import drawing
from lens_lora.results.choosing import prompt_rows
from lens_lora.show.figures.parts import whose
from lens_lora.show.figures.style import KINDS, style, title
from lens_lora.show.figures.theme import INK, PALETTE
from lens_lora.show.text import key_text, label, signed

__all__ = ["comparison_scatter"]

_SYMBOLS = ("circle", "diamond", "square")
_MARGIN = 0.05


@drawing.figure.register(Comparison)
def comparison_scatter(comparison: Comparison, prompt: int | None = None) -> go.Figure:
    """Effect (y) against attribution (x); hover names each site or group.

    Args:
        comparison: to be drawn.
        prompt: an index; without it, the mean over prompts.

    Raises:
        ArgumentError: no such prompt.
    """
    x, y = _values(comparison, prompt)
    units = label(comparison.units)
    across, upwards = (
        label(key_text(key)) for key in (comparison.attribution_name, comparison.effects_name)
    )
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
                name=label(kind),
                marker={
                    "color": PALETTE[number % len(PALETTE)],
                    "symbol": _SYMBOLS[number // len(PALETTE) % len(_SYMBOLS)],
                    "size": 7,
                    "opacity": 0.75,
                },
                hovertext=[
                    f"<b>{label(comparison.labels[i])}</b><br>{signed(x[i])} {units}, "
                    f"{across}<br>{signed(y[i])} {units}, {upwards}"
                    for i in own
                ],
                hoverinfo="text",
            )
        )
    style(figure, height=520)
    figure.update_layout(
        title=title(
            f"{comparison.readout}: {key_text(comparison.attribution_name)} and measured effects",
            f"{_agreement(comparison, prompt)} · {whose(prompt, comparison.str_tokens)}",
        ),
        legend={
            "orientation": "v",
            "x": 1.02,
            "xanchor": "left",
            "y": 1.0,
            "yanchor": "top",
        },
    )
    figure.update_xaxes(title_text=f"{across}, {units}")
    figure.update_yaxes(title_text=f"{upwards}, {units}")
    return figure


def _values(comparison: Comparison, prompt: int | None) -> tuple[list[float], list[float]]:
    rows = prompt_rows(prompt, len(comparison.pearson))
    a, e = comparison.attribution[rows].mean(0), comparison.effects[rows].mean(0)
    return a.tolist(), e.tolist()


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
