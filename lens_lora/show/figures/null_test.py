"""Plotly figure of an attribution over the band of its null adapters."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from lens_lora.analyses.null_test import NullTest
from lens_lora.results import drawing
from lens_lora.results.choosing import only_prompt
from lens_lora.show.figures.parts import whose
from lens_lora.show.figures.style import EXACT, LEGEND_BELOW, LINEAR, style, title
from lens_lora.show.text import label, magnitude, percent, signed

__all__ = ["null_figure"]

_BAND = "rgba(128,128,128,0.35)"
_MOST_TICKS = 20


@drawing.figure.register(NullTest)
def null_figure(test: NullTest, prompt: int | None = None) -> go.Figure:
    """|a_l| of every site against the largest |a′_l| of the draws, on a logarithmic scale.

    Args:
        test: to be drawn.
        prompt: an index; without it, the only prompt.

    Raises:
        ArgumentError: no such prompt, or several and none named.
    """
    index = only_prompt(prompt, len(test.noise_floor), "null tests")
    sites, units = test.observed.sites, label(test.units)
    values = test.observed.per_site[index].cpu().double().tolist()
    largest = test.null[:, index].abs().amax(0).cpu().double().tolist()
    outside = [abs(v) > top for v, top in zip(values, largest, strict=True)]
    figure = go.Figure(
        go.Bar(
            x=list(range(len(sites))),
            y=largest,
            width=1,
            name=f"largest of {test.draws} random adapters",
            marker={"color": _BAND, "line": {"width": 0}},
            hoverinfo="skip",
        )
    )
    for is_outside, name, colour in ((True, "stands out", EXACT), (False, "within", LINEAR)):
        some = [i for i, out in enumerate(outside) if out == is_outside]
        figure.add_trace(
            go.Scatter(
                x=some,
                y=[abs(values[i]) for i in some],
                name=f"{name}: {len(some)} of {len(sites)} sites",
                mode="markers",
                marker={"size": 6, "color": colour},
                hovertext=[
                    f"<b>{label(sites[i].name)}</b><br>{signed(values[i])} {units}"
                    f"<br>largest of the draws {magnitude(largest[i])}"
                    f"<br>z = {signed(float(test.z[index, i]))}"
                    for i in some
                ],
                hoverinfo="text",
            )
        )
    style(figure, height=420)
    chance = percent(1 / (1 + test.draws))
    heading = f"{test.readout}: first order of each site against random directions"
    below = f"{chance} stand out by chance · {whose(index, test.observed.str_tokens)}"
    figure.update_layout(title=title(heading, below), bargap=0, legend=LEGEND_BELOW)
    figure.update_yaxes(type="log", title_text=f"|a|, {units}", exponentformat="power", dtick=1)
    ticks = _ticks([site.layer for site in sites])
    figure.update_xaxes(
        title_text="layer, and within it the order of the forward pass",
        tickvals=list(ticks),
        ticktext=list(ticks.values()),
    )
    return figure


def _ticks(layers: list[int]) -> dict[int, str]:
    """Where every few layers begin."""
    starts = {layers.index(layer): str(layer) for layer in dict.fromkeys(layers) if layer >= 0}
    return dict(list(starts.items())[:: math.ceil(len(starts) / _MOST_TICKS) or 1])
