"""A repaired adapter: what is left of what was to be dropped, against what is kept."""

from __future__ import annotations

import plotly.graph_objects as go

from lens_lora.analyses.repair import Repair
from lens_lora.results import drawing
from lens_lora.show.figures.style import EXACT, LEGEND_BELOW, LINEAR, NOISE, style, title
from lens_lora.show.figures.theme import PALETTE

__all__ = ["repair_figure"]


@drawing.figure.register(Repair)
def repair_figure(found: Repair) -> go.Figure:
    """The curve of scaling the whole adapter, the repair beside it, and random sets.

    Args:
        found: to be drawn.
    """
    keep, drop = found.judging(keep=True), found.judging(keep=False)

    def percent(shares: object, which: list[int]) -> list[float]:
        rows = shares[..., which].mean(-1).reshape(-1)  # type: ignore[index]
        return (100 * rows).tolist()

    figure = go.Figure()
    figure.add_scatter(
        x=percent(found.along, keep),
        y=percent(found.along, drop),
        name="whole adapter, scaled",
        mode="lines+markers",
        line={"color": LINEAR, "width": 2},
        marker={"size": 5},
        hovertext=[f"whole adapter at ε = {s:.2f}" for s in found.scales.tolist()],
    )
    points = (
        ("random sets", found.random, NOISE, "x"),
        ("repaired", found.shares[1], EXACT, "star"),
    )
    for name, shares, colour, symbol in points:
        figure.add_scatter(
            x=percent(shares, keep),
            y=percent(shares, drop),
            name=name,
            mode="markers",
            marker={"color": colour, "size": 14 if name == "repaired" else 8, "symbol": symbol},
        )
    style(figure, height=440)
    where = "on held-out prompts" if found.is_held_out else "on the prompts given (none held out)"
    heading = f"{int(found.kept.sum())} of {found.gate_count} {found.of}s kept, {where}"
    beside = "scaling" if not found.exceeds else "the whole adapter"
    at = "at the same share kept" if not found.exceeds else "and keeps less"
    figure.update_layout(
        title=title(heading, f"{beside} leaves {found.gain:.3g} times as much {at}"),
        colorway=list(PALETTE),
        legend=LEGEND_BELOW,
    )
    figure.update_xaxes(title_text="kept of what was to be kept, %")
    figure.update_yaxes(title_text="left of what was to be dropped, %", rangemode="tozero")
    return figure
