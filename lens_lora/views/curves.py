"""A readout and a fact margin along ε, as curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from lens_lora.core import SIGMAS, FactMargin, Point, RemainderCurve, drawing
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
from lens_lora.show.text import label, short_prompt, signed

_HIGHEST_SHARE = 300.0  # % of the shift: a share above this would flatten the others


@drawing.figure.register(RemainderCurve)
def remainder_figure(path: RemainderCurve, prompt: int | None = None) -> go.Figure:
    """Draw the readout and its first-order line along ε; below, |R(ε)| as a share of the shift.

    Strengths at which |R| is under three of its own noise floors are greyed: rounding alone may
    make such a share.
    """
    points = _points_of(path, prompt)
    scales = [point.scale for point in points]
    is_noise = [abs(point.remainder) <= SIGMAS * point.remainder_floor for point in points]
    shares = [_share_in_percent(point) for point in points]
    remainders = _remainder_curve(points, shares, is_noise, label(path.units))

    figure = go.make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    figure.add_traces(_exact_and_line(path, prompt), rows=[1, 1], cols=[1, 1])
    figure.add_trace(remainders, row=2, col=1)
    _mark_noise(figure, scales, is_noise)
    heading = f"{path.readout} along ε, and what first order leaves"
    titles = (heading, whose(prompt, path.str_tokens))
    finish(figure, titles, ("", label(path.units)), 520)

    # The axis reaches to the largest share that stands out of rounding.
    clear: list[float] = []
    for share, is_small in zip(shares, is_noise, strict=True):
        if share is not None and not is_small:
            clear.append(share)
    largest = max(clear, default=1.0)
    cut = ", cut" if largest > _HIGHEST_SHARE else ""
    top = max(min(1.12 * largest, _HIGHEST_SHARE), 1.0)
    figure.update_xaxes(title_text=EPSILON, row=2)
    return figure.update_yaxes(title_text=f"|R| / |shift|, %{cut}", range=[0, top], row=2)


def _points_of(path: RemainderCurve, prompt: int | None) -> list[Point]:
    """Each strength of one prompt, or of the mean over prompts.

    Rounding of different prompts is independent, so the σ of a mean over n prompts is √Σσ²/n.
    """
    count = len(path.base)
    if prompt is not None or count == 1:
        return path.points[path.only_prompt(prompt)]
    means: list[Point] = []
    for of_prompts in zip(*path.points, strict=True):
        remainder_floors = [point.remainder_floor for point in of_prompts]
        noise_floors = [point.noise_floor for point in of_prompts]
        mean = Point(
            scale=of_prompts[0].scale,
            remainder=sum(point.remainder for point in of_prompts) / count,
            shift=sum(point.shift for point in of_prompts) / count,
            remainder_floor=math.hypot(*remainder_floors) / count,
            noise_floor=math.hypot(*noise_floors) / count,
        )
        means.append(mean)
    return means


def _share_in_percent(point: Point) -> float | None:
    """|R| as a percentage of the shift; None where there is no shift."""
    if point.shift == 0:
        return None
    return 100 * abs(point.remainder / point.shift)


def _remainder_curve(
    points: Sequence[Point],
    shares: Sequence[float | None],
    is_noise: Sequence[bool],
    units: str,
) -> go.Scatter:
    """The remainder's share of the shift at each strength; a hover gives the remainder itself."""
    texts: list[str] = []
    colours: list[str] = []
    for point, is_small in zip(points, is_noise, strict=True):
        says = f"R = {signed(point.remainder)} {units}"
        colour = LINEAR
        if is_small:
            says += ", below the noise"
            colour = NOISE
        texts.append(says)
        colours.append(colour)
    hover = "ε = %{x:.3g}<br>%{y:.3g}% of the shift<br>%{hovertext}<extra></extra>"
    scales = [point.scale for point in points]
    marker = {"size": 6, "color": colours}
    line = curve(scales, shares, "|R| / |shift|", LINEAR, hover, marker=marker)
    return line.update(hovertext=texts, showlegend=False)


def _mark_noise(figure: go.Figure, scales: Sequence[float], is_noise: Sequence[bool]) -> None:
    """Grey the strengths at which the remainder may be rounding alone, and say so."""
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


def _exact_and_line(path: RemainderCurve, prompt: int | None) -> list[go.Scatter]:
    """The exact g(ε), beginning at the base model, and the line g(0) + ε Σ a_l.

    They are those of one prompt, or the means over prompts.
    """
    rows = path.prompt_rows(prompt)
    base = float(path.base[rows].cpu().double().mean())
    slope = float(path.slope[rows].cpu().double().mean())
    units = label(path.units)
    scales = [0.0, *path.scales.cpu().double().tolist()]
    exact = [base, *path.values[rows].cpu().double().mean(0).tolist()]
    line = [base + scale * slope for scale in scales]
    exact_hover = along_hover("exact", units)
    line_hover = along_hover("first order", units)
    return [
        curve(scales, exact, "exact", EXACT, exact_hover, width=2.5, marker={"size": 5}),
        curve(scales, line, "first order at ε = 0", LINEAR, line_hover, dash="dash"),
    ]


def _stretches(scales: Sequence[float], marked: Sequence[bool]) -> list[tuple[float, float]]:
    """Intervals of the axis that hold marked scales, each up to half way to the next unmarked one.

    Args:
        scales: points of the axis, rising.
        marked: whether each point is marked.
    """
    middles = [(low + high) / 2 for low, high in itertools.pairwise(scales)]
    # The interval of each point lies between two of these.
    edges = [0.0, *middles, scales[-1]]
    stretches: list[tuple[float, float]] = []
    begin: float | None = None
    for place, is_marked in enumerate(marked):
        if is_marked and begin is None:
            begin = edges[place]
        elif not is_marked and begin is not None:
            stretches.append((begin, edges[place]))
            begin = None
    if begin is not None:
        stretches.append((begin, edges[-1]))
    return stretches


# The words beside the flip are about as wide as this part of the axis.
_ROOM_FOR_THE_LABEL = 0.25


@drawing.figure.register(FactMargin)
def margin_figure(fact_margin: FactMargin, prompt: int | None = None) -> go.Figure:
    """Draw the margin along ε, its first-order line, the zero line and the flip.

    Of several prompts it is the mean margin, with each prompt's own as a thin line.
    """
    path = fact_margin.curve
    is_mean = prompt is None and len(path.base) > 1
    figure = go.Figure()
    if is_mean:
        figure.add_traces(_line_of_each(path))
    figure.add_traces(_exact_and_line(path, prompt))
    figure.add_hline(y=0, line={"color": INK, "width": 1.5})
    if not is_mean:
        index = path.only_prompt(prompt)
        flip = float(fact_margin.flip_scale[index])
        if math.isfinite(flip):
            _mark_flip(figure, flip, is_base_negative=float(path.base[index]) < 0)
    heading = f"{path.readout} along ε"
    below = f"from the base model to the adapted · {whose(prompt, path.str_tokens)}"
    axes = (EPSILON, f"margin, {label(path.units)}")
    return finish(figure, (heading, below), axes, 380)


def _line_of_each(path: RemainderCurve) -> list[go.Scatter]:
    """A thin line for each prompt, with one entry in the legend for all of them."""
    scales = [0.0, *path.scales.cpu().double().tolist()]
    lines: list[go.Scatter] = []
    for index, tokens in enumerate(path.str_tokens):
        values = [float(path.base[index]), *path.values[index].cpu().double().tolist()]
        hover = (
            f"prompt {index}, {label(short_prompt(tokens))}<br>{along_hover('exact', path.units)}"
        )
        line = curve(scales, values, "each prompt", NOISE, hover, width=1, opacity=0.5)
        lines.append(line.update(showlegend=index == 0))
    return lines


def _mark_flip(figure: go.Figure, flip: float, *, is_base_negative: bool) -> None:
    """Draw a line at the flip, and write beside it where the curve does not pass.

    Before the flip the margin has its base's sign, after it the other one.
    """
    is_left = flip > _ROOM_FOR_THE_LABEL
    if is_left:
        side = "left"
        shift = -6
    else:
        side = "right"
        shift = 6
    height = "top" if is_base_negative == is_left else "bottom"
    words = {"text": f"flips at ε = {flip:.3g}", "font": {"color": FLIP}, "xshift": shift}
    figure.add_vline(
        x=flip,
        line={"color": FLIP, "width": 1.5, "dash": "dot"},
        annotation=words,
        annotation_position=f"{height} {side}",
    )
