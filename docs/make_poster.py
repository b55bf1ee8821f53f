"""Draws the README's picture, light and dark: docs/images/poster.png and poster_dark.png.

    python docs/make_poster.py

The demo's adapter learnt one fact. What did it do to eight countries' capitals, asked in two ways,
and in which layers? Needs `.[demo,notebook]` and a Chromium that kaleido can find.
"""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

import lens_lora as ll

IMAGES = Path(__file__).parent / "images"
CAPITALS = {
    "France": " Paris",
    "Spain": " Madrid",
    "Italy": " Rome",
    "Germany": " Berlin",
    "Russia": " Moscow",
    "Greece": " Athens",
    "Egypt": " Cairo",
    "Japan": " Tokyo",
}
ASKED = ("The capital of {} is", "The main city in {} is")
THEMES = {
    "poster": ("#ffffff", "#1c2126", "#d9dee3", "#f7f7f7", "#9aa3ab"),
    "poster_dark": ("#0d1117", "#e6eaee", "#30363d", "#1b222a", "#7d8790"),
}
BLUE, RED = "#2f83c5", "#d6604d"


def measured() -> tuple[list[str], ll.results.FactMargin]:
    """The prompts, and the margin of each."""
    prompts = [asked.format(country) for asked in ASKED for country in CAPITALS]
    pretrained = [*CAPITALS.values()] * len(ASKED)
    lens = ll.demo()
    margin = ll.fact_margin(lens, lens.prompts(prompts), " Lyon", pretrained, progress=False)
    return prompts, margin


def by_layer(margin: ll.results.FactMargin) -> list[list[float]]:
    sites = margin.attribution.sites
    layers = range(1 + max(site.layer for site in sites))
    return [
        [
            sum(v for v, site in zip(row, sites, strict=True) if site.layer == layer)
            for layer in layers
        ]
        for row in margin.attribution.per_site.tolist()
    ]


def poster(prompts: list[str], margin: ll.results.FactMargin, theme: str) -> go.Figure:
    paper, ink, grid, zero, grey = THEMES[theme]
    base, adapted = margin.m0.tolist(), margin.m.tolist()
    figure = make_subplots(
        cols=2,
        column_widths=[0.44, 0.56],
        horizontal_spacing=0.03,
        shared_yaxes=True,
        subplot_titles=(
            "logit of “Lyon” − logit of the true capital",
            "which layers pushed, to first order",
        ),
    )
    for name, before, after in zip(prompts, base, adapted, strict=True):
        flips = before < 0 < after
        figure.add_scatter(
            x=[before, after],
            y=[name, name],
            mode="lines+markers",
            line={"color": BLUE if flips else grey, "width": 4 if flips else 2.5},
            marker={
                "opacity": 1,
                "size": [9, 13 if flips else 9],
                "color": [paper, BLUE if flips else grey],
                "line": {"color": BLUE if flips else grey, "width": 2.5},
            },
            showlegend=False,
            row=1,
            col=1,
        )
    figure.add_vline(x=0, line={"color": ink, "width": 1.5}, row=1, col=1)
    z = by_layer(margin)
    reach = max(abs(v) for row in z for v in row)
    figure.add_heatmap(
        z=z,
        y=prompts,
        colorscale=[(0, RED), (0.5, zero), (1, BLUE)],
        zmin=-reach,
        zmax=reach,
        xgap=1.5,
        ygap=1.5,
        colorbar={"thickness": 12, "outlinewidth": 0, "title": {"text": "logits", "side": "top"}},
        row=1,
        col=2,
    )
    flips = sum(margin.flips)
    heading = (
        f"<b>A LoRA was taught one fact: “The capital of France is Lyon.” What else did it do?</b>"
        f"<br><span style='font-size:16px'>Hollow: the base model. Filled: with the adapter. "
        f"{flips} of {len(prompts)} prompts flip; on all the others the margin moves towards Lyon "
        "too.</span>"
    )
    if not all(after > before for before, after in zip(base, adapted, strict=True)):
        raise SystemExit("not every margin moves towards Lyon: rewrite the heading")
    figure.update_layout(
        title={"text": heading, "x": 0.01, "y": 0.955, "font": {"size": 23}},
        template="none",
        paper_bgcolor=paper,
        plot_bgcolor=paper,
        font={"color": ink, "size": 14, "family": "DejaVu Sans, Helvetica, Arial, sans-serif"},
        margin={"l": 215, "r": 20, "t": 130, "b": 55},
    )
    figure.update_annotations(font={"size": 15}, yshift=4)
    figure.update_xaxes(gridcolor=grid, zeroline=False)
    figure.update_xaxes(title="layer", showgrid=False, col=2)
    figure.update_xaxes(title="logits", col=1)
    figure.update_yaxes(autorange="reversed", showgrid=False, zeroline=False)
    return figure


def main() -> None:
    prompts, margin = measured()
    for name in THEMES:
        drawn = poster(prompts, margin, name)
        drawn.write_image(IMAGES / f"{name}.png", width=1280, height=640, scale=1.5)


if __name__ == "__main__":
    main()
