"""How directions are spread over the tokens of many texts: a box for each."""

from __future__ import annotations

import pandas as pd

from lens_lora.show import figures, go
from lens_lora.show.figures import names_axis

_MOST_ROWS = 40

# What a direction's activation is, by gauge.
GAUGES = {"svd": "u = ΣVᵀx", "trained": "u = Ax as trained"}


def directions_text(site: str | None, drawn: int, count: int) -> str:
    """Say which directions a picture shows, and out of how many."""
    shown = f"each rank of {site}" if site else "the first rank of each site"
    if drawn == count:
        return shown
    return f"{shown}, the {drawn} of {count} of largest |u|"


def spread_figure(frame: pd.DataFrame, tokens: str, site: str | None, gauge: str) -> go.Figure:
    """Draw a box plot of each direction's values over tokens; its whiskers reach to the ends.

    Args:
        frame: a row for each direction: site, rank, least, lower, median, upper, largest, mean.
        tokens: in words, which texts the tokens are from.
        site: the site whose ranks these are; None for the first rank of each site.
        gauge: one of `GAUGES`.
    """
    largest = frame[["least", "largest"]].abs().max(axis=1).nlargest(_MOST_ROWS).index
    rows = frame.loc[sorted(largest)]
    y = names_axis(f"{name} {rank}" for name, rank in zip(rows["site"], rows["rank"], strict=True))
    box = go.Box(
        y=y.values,
        orientation="h",
        line={"color": figures.EXACT, "width": 1},
        lowerfence=rows["least"],
        q1=rows["lower"],
        median=rows["median"],
        q3=rows["upper"],
        upperfence=rows["largest"],
        mean=rows["mean"],
    )
    below = f"{directions_text(site, len(rows), len(frame))}; sinks are left out"
    titles = (f"Activations over the tokens of {tokens}", below)
    height = 120 + 18 * max(len(rows), 8)
    figure = figures.finish(go.Figure(box), titles, (GAUGES[gauge], ""), height)
    return figure.update_yaxes(autorange="reversed", **y.layout)
