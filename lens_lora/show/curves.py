"""A readout and a fact margin along ε, as curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from lens_lora import results
from lens_lora.core import SIGMAS, only_prompt
from lens_lora.core.results import drawing
from lens_lora.show import figures, go
from lens_lora.show.figures import (
    EPSILON,
    EXACT,
    INK,
    LINEAR,
    NOISE,
    along_hover,
    curve,
    finish,
    whose,
)
from lens_lora.show.text import label, signed

_HIGHEST_SHARE = 300.0  # % of the shift: a share above this would flatten the others


@drawing.figure.register(results.RemainderCurve)
def remainder_figure(path: results.RemainderCurve, prompt: int | None = None) -> go.Figure:
    """The readout and its first-order line along ε, and |R(ε)| as a share of the shift.

    Where |R| is under three noise floors of its own it is greyed: its share is one of rounding.
    """
    index = only_prompt(prompt, len(path.base), "curves along ε")
    steps, units = path.points[index], label(path.units)
    scales = [step.scale for step in steps]
    is_noise = [abs(step.remainder) <= SIGMAS * step.remainder_floor for step in steps]
    shares = [100 * abs(s.remainder / s.shift) if s.shift else None for s in steps]
    clear = [s for s, noise in zip(shares, is_noise, strict=True) if s is not None and not noise]
    largest = max(clear, default=1.0)
    said = "ε = %{x:.3g}<br>%{y:.3g}% of the shift<br>%{hovertext}<extra></extra>"
    texts = [
        f"R = {signed(step.remainder)} {units}{', below the noise' if noise else ''}"
        for step, noise in zip(steps, is_noise, strict=True)
    ]
    marker = {"size": 6, "color": [NOISE if noise else LINEAR for noise in is_noise]}
    remainders = curve(scales, shares, "|R| / |shift|", LINEAR, said, marker=marker)
    remainders.update(hovertext=texts, showlegend=False)
    figure = go.make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    figure.add_traces([*_exact_and_line(path, index), remainders], rows=[1, 1, 2], cols=[1, 1, 1])
    for low, high in _runs(scales, is_noise):
        figure.add_vrect(x0=low, x1=high, fillcolor=NOISE, opacity=0.25, line_width=0)
    if any(is_noise):
        figure.add_annotation(
            text=f"grey: |R| under {SIGMAS:g} noise floors",
            **{"x": 1, "y": 0, "xref": "paper", "yref": "paper", "yanchor": "bottom"},
            **{"xanchor": "right", "showarrow": False, "font": {"size": 11}},
        )
    cut = ", cut" if largest > _HIGHEST_SHARE else ""
    top = max(min(1.12 * largest, _HIGHEST_SHARE), 1.0)
    heading = f"{path.readout} along ε, and what first order leaves"
    finish(figure, (heading, whose(index, path.str_tokens)), ("", units), 520)
    figure.update_xaxes(title_text=EPSILON, row=2)
    return figure.update_yaxes(title_text=f"|R| / |shift|, %{cut}", range=[0, top], row=2)


def _exact_and_line(path: results.RemainderCurve, index: int) -> list[go.Scatter]:
    """g(ε), exact, from the base model on, and the line g(0) + ε Σ a_l."""
    base, slope = float(path.base[index]), float(path.slope[index])
    scales, units = [0.0, *path.scales.cpu().double().tolist()], label(path.units)
    exact = [base, *path.values[index].cpu().double().tolist()]
    line = [base + scale * slope for scale in scales]
    hover, name = along_hover("exact", units), "first order at ε = 0"
    return [
        curve(scales, exact, "exact", EXACT, hover, width=2.5, marker={"size": 5}),
        curve(scales, line, name, LINEAR, along_hover("first order", units), dash="dash"),
    ]


def _runs(scales: Sequence[float], marked: Sequence[bool]) -> list[tuple[float, float]]:
    """Marked stretches of the axis, each reaching half way to its unmarked neighbours."""
    edges = [0.0, *((a + b) / 2 for a, b in zip(scales, scales[1:], strict=False)), scales[-1]]
    groups = itertools.groupby(range(len(marked)), marked.__getitem__)
    runs = [[*group] for is_marked, group in groups if is_marked]
    return [(edges[run[0]], edges[run[-1] + 1]) for run in runs]


_ROOM_FOR_THE_LABEL = 0.25  # of the axis, which is as wide as the words beside the flip


@drawing.figure.register(results.FactMargin)
def margin_figure(fact_margin: results.FactMargin, prompt: int | None = None) -> go.Figure:
    """The margin along ε, its first-order line, the zero line and the flip."""
    path = fact_margin.curve
    index = only_prompt(prompt, len(path.base), "curves along ε")
    figure = go.Figure(_exact_and_line(path, index))
    figure.add_hline(y=0, line={"color": INK, "width": 1.5})
    flip = float(fact_margin.flip_scale[index])
    if math.isfinite(flip):
        # Where the margin is not: before the flip it has its base's sign, after it the other.
        side = "left" if flip > _ROOM_FOR_THE_LABEL else "right"
        height = "top" if (float(path.base[index]) < 0) == (side == "left") else "bottom"
        said = {"text": f"flips at ε = {flip:.3g}", "font": {"color": figures.FLIP}}
        said |= {"xshift": 6 if side == "right" else -6}
        line, place = {"color": figures.FLIP, "width": 1.5, "dash": "dot"}, f"{height} {side}"
        figure.add_vline(x=flip, line=line, annotation=said, annotation_position=place)
    below = f"from the base model to the adapted · {whose(index, path.str_tokens)}"
    axes = EPSILON, f"margin, {label(path.units)}"
    return finish(figure, (f"{path.readout} along ε", below), axes, 380)
