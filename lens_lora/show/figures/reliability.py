"""Plotly figure of reliability: each site's number against its number with the correction."""

from __future__ import annotations

import plotly.graph_objects as go

from lens_lora.analyses.reliability import Reliability
from lens_lora.results import drawing
from lens_lora.results.choosing import only_prompt
from lens_lora.show.figures.parts import whose
from lens_lora.show.figures.style import EXACT, LEGEND_BELOW, LINEAR, style, title
from lens_lora.show.figures.theme import INK
from lens_lora.show.text import label, signed

__all__ = ["reliability_figure"]

_QUESTIONS = {"add_one": "adding one site", "leave_one_out": "leaving one site out"}
_BAND = "rgba(128,128,128,0.15)"


@drawing.figure.register(Reliability)
def reliability_figure(found: Reliability, prompt: int | None = None) -> go.Figure:
    """a_l (x) against a_l + correction (y); flagged are material ones off the band.

    Args:
        found: to be drawn.
        prompt: an index; without it, the only prompt.

    Raises:
        ArgumentError: no such prompt, or several and none named.
    """
    index = only_prompt(prompt, len(found.flagged), "flags")
    x = found.attribution.per_site[index].cpu().double().tolist()
    y = found.corrected[index].cpu().double().tolist()
    figure = go.Figure(_wedge(x, found.threshold))
    for is_flagged, name, colour in (
        (False, "kept, or not material", EXACT),
        (True, "flagged", LINEAR),
    ):
        some = [i for i, f in enumerate(found.flagged[index].tolist()) if f == is_flagged]
        figure.add_trace(
            go.Scatter(
                x=[x[i] for i in some],
                y=[y[i] for i in some],
                name=f"{name}: {len(some)} sites",
                mode="markers",
                marker={
                    "size": 7,
                    "color": colour,
                    "symbol": "diamond" if is_flagged else "circle",
                    "opacity": 0.85,
                },
                hovertext=[_hover(found, index, i, x[i], y[i]) for i in some],
                hoverinfo="text",
            )
        )
    style(figure, height=460)
    figure.update_layout(
        title=title(
            f"{found.readout}: first order against {_QUESTIONS[found.how]}",
            f"which to trust · {whose(index, found.attribution.str_tokens)}",
        ),
        legend=LEGEND_BELOW,
    )
    units = label(found.units)
    figure.update_xaxes(title_text=f"a at ε = 0, {units}", zeroline=True)
    figure.update_yaxes(title_text=f"a + correction, {units}", zeroline=True, range=_range(x + y))
    return figure


def _wedge(x: list[float], threshold: float) -> list[go.Scatter]:
    """Where a + correction is from threshold · a to a / threshold, about the identity line."""
    reach = max((abs(v) for v in x), default=0.0) or 1.0
    ends = [-reach, 0.0, reach]
    upper = [-reach * threshold, 0.0, reach / threshold]
    lower = [-reach / threshold, 0.0, reach * threshold]
    band = go.Scatter(
        x=ends + ends[::-1],
        y=upper + lower[::-1],
        mode="lines",
        fill="toself",
        fillcolor=_BAND,
        line={"width": 0},
        name=f"score ≥ {threshold:g}",
        hoverinfo="skip",
    )
    identity = go.Scatter(
        x=[-reach, reach],
        y=[-reach, reach],
        mode="lines",
        line={"color": INK, "width": 1, "dash": "dot"},
        name="no correction",
        hoverinfo="skip",
    )
    return [band, identity]


def _hover(found: Reliability, prompt: int, site: int, a: float, corrected: float) -> str:
    units = label(found.units)
    lines = [
        f"<b>{label(found.attribution.sites[site].name)}</b>",
        f"first order {signed(a)} {units}",
        f"corrected {signed(corrected)} {units}",
        f"score {float(found.score[prompt, site]):.2f}",
    ]
    if found.fixed is not None and bool(found.flagged[prompt, site]):
        lines.append(f"measured {signed(float(found.fixed[prompt, site]))} {units}")
    return "<br>".join(lines)


def _range(values: list[float]) -> list[float]:
    """All points, with a little room."""
    low, high = min(values, default=-1.0), max(values, default=1.0)
    room = 0.08 * (high - low or 1.0)
    return [low - room, high + room]
