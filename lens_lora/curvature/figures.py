"""The figures of second order and of coupling."""

from __future__ import annotations

from lens_lora.core import drawing
from lens_lora.curvature.coupling import Coupling
from lens_lora.curvature.second_order import SecondOrder
from lens_lora.show import figures, go
from lens_lora.show.figures import (
    EPSILON,
    EXACT,
    INK,
    LINEAR,
    along_hover,
    curve,
    cut_colours,
    finish,
    group_ticks,
    heatmap,
    names_axis,
    whose,
)
from lens_lora.show.text import label


@drawing.path.register(SecondOrder)
def second_order_figure(second: SecondOrder, prompt: int | None = None) -> go.Figure:
    """The exact shift along ε, first order's line and second order's parabola."""
    index = second.only_prompt(prompt, "curves along ε")
    path = second.curve
    scales = [0.0, *path.scales.cpu().double().tolist()]
    units = label(path.units)
    figure = go.Figure()
    for name, values, colour, width, dash in (
        ("exact", path.shift, EXACT, 2.5, "solid"),
        ("first order", path.first_order, LINEAR, 2, "dash"),
        ("second order", second.predicted_at(path.scales), figures.FLIP, 2, "dot"),
    ):
        shifts = [0.0, *values[index].tolist()]
        hover = along_hover(name, units)
        figure.add_trace(curve(scales, shifts, name, colour, hover, width=width, dash=dash))
    figure.add_hline(y=0, line={"color": INK, "width": 1})
    below = f"{second.verdict[index]} · {whose(index, path.str_tokens)}"
    titles = f"{path.readout}: first and second order along ε", below
    return finish(figure, titles, (EPSILON, f"shift, {units}"))


@drawing.figure.register(Coupling)
def coupling_heatmap(coupling: Coupling, prompt: int | None = None) -> go.Figure:
    """½H: self-curvature on the diagonal, half of each pair's coupling off it.

    In a large matrix colours are cut at the 99.5th percentile of the sizes, so that a few strong
    pairs do not leave the rest blank; the hover gives every value.
    """
    rows = coupling.prompt_rows(prompt)
    half = coupling.matrix[rows].cpu().double().mean(0) / 2
    axis = names_axis(coupling.groups, **group_ticks(coupling))
    heading = f"{coupling.readout}, ½H at ε = {coupling.at:g}"
    below = "diagonal: self-curvature; off it: half of each pair's coupling"
    titles = heading, f"{below} · {whose(prompt, coupling.str_tokens)}"
    units = coupling.units
    says = f"<b>%{{y}} × %{{x}}</b><br>½H = %{{z:.3g}} {label(units)}<extra></extra>"
    colours = cut_colours(half)
    figure = heatmap(
        titles,
        half.tolist(),
        says,
        axis,
        axis,
        units,
        "signed",
        reach=colours.reach,
        note=colours.note,
    )
    figure.update_layout(height=680, yaxis={"scaleanchor": "x", "constrain": "domain"})
    return figure.update_traces(xgap=0, ygap=0)
