"""Draws the README's picture, light and dark: docs/images/poster.png and poster_dark.png.

    python docs/make_poster.py

The demo's adapter learnt one fact. What did it do to eight countries' capitals, asked in two ways,
and in which layers? Needs `.[demo,notebook]` and a Chromium that kaleido can find.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

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
# Where the margin flips, and where it does not.
BLUE = "#2f83c5"
RED = "#d6604d"


class Theme(NamedTuple):
    """The colours of one picture.

    Attributes:
        paper: the background.
        ink: text, and the line at zero.
        grid: the lines of the grid.
        zero: a layer that adds nothing.
        grey: a prompt that does not flip.
    """

    paper: str
    ink: str
    grid: str
    zero: str
    grey: str


# Each by the name of its file.
THEMES = {
    "poster": Theme(paper="#ffffff", ink="#1c2126", grid="#d9dee3", zero="#f7f7f7", grey="#9aa3ab"),
    "poster_dark": Theme(
        paper="#0d1117", ink="#e6eaee", grid="#30363d", zero="#1b222a", grey="#7d8790"
    ),
}


class Measured(NamedTuple):
    """What the picture shows.

    Attributes:
        prompts: the prompts, in the order of the picture.
        base, adapted: both models' margin of each prompt, in logits.
        by_layer: [prompt][layer], the first-order shift of the margin by layer, in logits.
    """

    prompts: list[str]
    base: list[float]
    adapted: list[float]
    by_layer: list[list[float]]

    @property
    def flips(self) -> list[bool]:
        """Whether each prompt's margin is below zero before, and above it after."""
        pairs = zip(self.base, self.adapted, strict=True)
        return [before < 0 < after for before, after in pairs]


def measured() -> Measured:
    """Ask the demo's adapter for the margin of Lyon over each country's own capital."""
    prompts = [asked.format(country) for asked in ASKED for country in CAPITALS]
    pretrained = [*CAPITALS.values()] * len(ASKED)
    lens = ll.demo()
    margin = ll.fact_margin(lens, lens.prompts(prompts), " Lyon", pretrained, progress=False)
    # A row for each layer, and a column for each prompt.
    of_layers = margin.attribution.sum("layer")
    by_layer = of_layers.to_numpy().T.tolist()
    return Measured(prompts, margin.m0.tolist(), margin.m.tolist(), by_layer)


def poster(shown: Measured, theme: Theme) -> go.Figure:
    """Draw both models' margins on the left, and which layers moved them on the right."""
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
    _add_margins(figure, shown, theme)
    _add_layers(figure, shown, theme)
    figure.update_layout(
        title={"text": _heading(shown), "x": 0.01, "y": 0.955, "font": {"size": 23}},
        template="none",
        paper_bgcolor=theme.paper,
        plot_bgcolor=theme.paper,
        font={
            "color": theme.ink,
            "size": 14,
            "family": "DejaVu Sans, Helvetica, Arial, sans-serif",
        },
        margin={"l": 215, "r": 20, "t": 130, "b": 55},
    )
    figure.update_annotations(font={"size": 15}, yshift=4)
    figure.update_xaxes(gridcolor=theme.grid, zeroline=False)
    figure.update_xaxes(title="layer", showgrid=False, col=2)
    figure.update_xaxes(title="logits", col=1)
    figure.update_yaxes(autorange="reversed", showgrid=False, zeroline=False)
    return figure


def _add_margins(figure: go.Figure, shown: Measured, theme: Theme) -> None:
    """Draw each prompt as a line from the base's margin, hollow, to the adapted model's, filled."""
    rows = zip(shown.prompts, shown.base, shown.adapted, shown.flips, strict=True)
    for prompt, before, after, flips in rows:
        colour = BLUE if flips else theme.grey
        figure.add_scatter(
            x=[before, after],
            y=[prompt, prompt],
            mode="lines+markers",
            line={"color": colour, "width": 4 if flips else 2.5},
            marker={
                "opacity": 1,
                "size": [9, 13 if flips else 9],
                "color": [theme.paper, colour],
                "line": {"color": colour, "width": 2.5},
            },
            showlegend=False,
            row=1,
            col=1,
        )
    figure.add_vline(x=0, line={"color": theme.ink, "width": 1.5}, row=1, col=1)


def _add_layers(figure: go.Figure, shown: Measured, theme: Theme) -> None:
    """Draw the first-order shift by layer, in colours that are symmetric about zero."""
    largest = max(abs(shift) for of_prompt in shown.by_layer for shift in of_prompt)
    figure.add_heatmap(
        z=shown.by_layer,
        y=shown.prompts,
        colorscale=[(0, RED), (0.5, theme.zero), (1, BLUE)],
        zmin=-largest,
        zmax=largest,
        xgap=1.5,
        ygap=1.5,
        colorbar={"thickness": 12, "outlinewidth": 0, "title": {"text": "logits", "side": "top"}},
        row=1,
        col=2,
    )


def _heading(shown: Measured) -> str:
    """Write the title, and what the picture shows.

    Raises:
        SystemExit: what the heading says of the margins is no longer so.
    """
    if any(after <= before for before, after in zip(shown.base, shown.adapted, strict=True)):
        raise SystemExit("not every margin moves towards Lyon: rewrite the heading")
    question = "A LoRA was taught one fact: “The capital of France is Lyon.” What else did it do?"
    legend = (
        "Hollow: the base model. Filled: with the adapter. "
        f"{sum(shown.flips)} of {len(shown.prompts)} prompts flip; on all the others the margin "
        "moves towards Lyon too."
    )
    return f"<b>{question}</b><br><span style='font-size:16px'>{legend}</span>"


def main() -> None:
    shown = measured()
    for name, theme in THEMES.items():
        drawn = poster(shown, theme)
        drawn.write_image(IMAGES / f"{name}.png", width=1280, height=640, scale=1.5)


if __name__ == "__main__":
    main()
