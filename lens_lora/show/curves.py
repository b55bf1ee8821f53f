"""A readout and a fact margin along ε, as curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from lens_lora.core import SIGMAS, FactMargin, RemainderCurve, drawing, only_prompt
from lens_lora.show import go
from lens_lora.show.figures import (
    EPSILON,
    EXACT,
    FLIP,
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


@drawing.figure.register(RemainderCurve)
def remainder_figure(path: RemainderCurve, prompt: int | None = None) -> go.Figure:
    """The readout and its first-order line along ε, and |R(ε)| as a share of the shift.

    Where |R| is under three noise floors of its own it is greyed: its share is one of rounding.
    """
    index = only_prompt(prompt, len(path.base), "curves along ε")
    units = label(path.units)
    scales: list[float] = []
    shares: list[float | None] = []
    is_noise: list[bool] = []
    texts: list[str] = []
    for step in path.points[index]:
        is_small = abs(step.remainder) <= SIGMAS * step.remainder_floor
        below = ", below the noise" if is_small else ""
        scales.append(step.scale)
        shares.append(100 * abs(step.remainder / step.shift) if step.shift else None)
        is_noise.append(is_small)
        texts.append(f"R = {signed(step.remainder)} {units}{below}")
    hover = "ε = %{x:.3g}<br>%{y:.3g}% of the shift<br>%{hovertext}<extra></extra>"
    marker = {"size": 6, "color": [NOISE if small else LINEAR for small in is_noise]}
    remainders = curve(scales, shares, "|R| / |shift|", LINEAR, hover, marker=marker)
    remainders.update(hovertext=texts, showlegend=False)
    figure = go.make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    figure.add_traces([*_exact_and_line(path, index), remainders], rows=[1, 1, 2], cols=[1, 1, 1])
    _mark_noise(figure, scales, is_noise)
    heading = f"{path.readout} along ε, and what first order leaves"
    finish(figure, (heading, whose(index, path.str_tokens)), ("", units), 520)
    clear = [s for s, small in zip(shares, is_noise, strict=True) if s is not None and not small]
    largest = max(clear, default=1.0)
    cut = ", cut" if largest > _HIGHEST_SHARE else ""
    top = max(min(1.12 * largest, _HIGHEST_SHARE), 1.0)
    figure.update_xaxes(title_text=EPSILON, row=2)
    return figure.update_yaxes(title_text=f"|R| / |shift|, %{cut}", range=[0, top], row=2)


def _mark_noise(figure: go.Figure, scales: Sequence[float], is_noise: Sequence[bool]) -> None:
    """Grey where the remainder may be rounding alone, and say what the grey means."""
    for low, high in _stretches(scales, is_noise):
        figure.add_vrect(x0=low, x1=high, fillcolor=NOISE, opacity=0.25, line_width=0)
    if any(is_noise):
        figure.add_annotation(
            text=f"grey: |R| under {SIGMAS:g} noise floors",
            x=1,
            y=0,
            xref="paper",
            yref="paper",
            xanchor="right",
            yanchor="bottom",
            showarrow=False,
            font={"size": 11},
        )


def _exact_and_line(path: RemainderCurve, index: int) -> list[go.Scatter]:
    """g(ε), exact, from the base model on, and the line g(0) + ε Σ a_l."""
    base = float(path.base[index])
    slope = float(path.slope[index])
    units = label(path.units)
    scales = [0.0, *path.scales.cpu().double().tolist()]
    exact = [base, *path.values[index].cpu().double().tolist()]
    line = [base + scale * slope for scale in scales]
    exact_hover = along_hover("exact", units)
    line_hover = along_hover("first order", units)
    return [
        curve(scales, exact, "exact", EXACT, exact_hover, width=2.5, marker={"size": 5}),
        curve(scales, line, "first order at ε = 0", LINEAR, line_hover, dash="dash"),
    ]


def _stretches(scales: Sequence[float], marked: Sequence[bool]) -> list[tuple[float, float]]:
    """Marked stretches of the axis, each reaching half way to its unmarked neighbours."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(scales)]
    edges = [0.0, *middles, scales[-1]]
    found: list[tuple[float, float]] = []
    for is_marked, group in itertools.groupby(range(len(marked)), marked.__getitem__):
        places = list(group)
        if is_marked:
            found.append((edges[places[0]], edges[places[-1] + 1]))
    return found


_ROOM_FOR_THE_LABEL = 0.25  # of the axis, which is as wide as the words beside the flip


@drawing.figure.register(FactMargin)
def margin_figure(fact_margin: FactMargin, prompt: int | None = None) -> go.Figure:
    """The margin along ε, its first-order line, the zero line and the flip."""
    path = fact_margin.curve
    index = only_prompt(prompt, len(path.base), "curves along ε")
    figure = go.Figure(_exact_and_line(path, index))
    figure.add_hline(y=0, line={"color": INK, "width": 1.5})
    flip = float(fact_margin.flip_scale[index])
    if math.isfinite(flip):
        _mark_flip(figure, flip, is_base_negative=float(path.base[index]) < 0)
    heading = f"{path.readout} along ε"
    below = f"from the base model to the adapted · {whose(index, path.str_tokens)}"
    axes = (EPSILON, f"margin, {label(path.units)}")
    return finish(figure, (heading, below), axes, 380)


def _mark_flip(figure: go.Figure, flip: float, *, is_base_negative: bool) -> None:
    """A line at the flip, with its words where the margin is not.

    Before the flip the margin has its base's sign, after it the other one.
    """
    is_left = flip > _ROOM_FOR_THE_LABEL
    side = "left" if is_left else "right"
    height = "top" if is_base_negative == is_left else "bottom"
    words = {
        "text": f"flips at ε = {flip:.3g}",
        "font": {"color": FLIP},
        "xshift": -6 if is_left else 6,
    }
    figure.add_vline(
        x=flip,
        line={"color": FLIP, "width": 1.5, "dash": "dot"},
        annotation=words,
        annotation_position=f"{height} {side}",
    )
