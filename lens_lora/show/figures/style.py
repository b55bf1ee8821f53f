"""What figures share beside the theme: the order of kinds, colours of meanings, titles, layout."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from lens_lora.show.figures.theme import theme
from lens_lora.show.text import label

EMBEDDINGS = ("embed", "pos_embed")
OUTSIDE = (*EMBEDDINGS, "embed_ln", "ln_final", "unembed")
KINDS = (
    *(*EMBEDDINGS, "embed_ln", "ln1", "q", "k", "v", "q_norm", "k_norm", "o", "ln1_post"),
    *("ln2", "gate", "up", "fc_in", "down", "fc_out", "ln2_post", "ln_final", "unembed"),
)
BLANK, NOISE = "rgba(128,128,128,0.32)", "#999999"
EXACT, LINEAR, FLIP = "#2f83c5", "#e0802b", "#b04fc4"
LEGEND_BELOW: dict[str, Any] = {
    "orientation": "h",
    "x": 0,
    "xanchor": "left",
    "y": -0.26,
    "yanchor": "top",
}

_LINE = 96

Cells = list[list[float | None]]
Labels = list[list[str]]


def title(heading: str, below: str) -> dict[str, object]:
    """A heading and a smaller line below it, escaped; a long one is broken at its ' · '."""
    lines = [below] if len(below) <= _LINE else below.split(" · ")
    smaller = "<br>".join(label(line) for line in lines)
    text = f"{label(heading)}<br><span style='font-size:12px'>{smaller}</span>"
    return {
        "text": text,
        "x": 0,
        "xref": "container",
        "y": 1,
        "yref": "container",
        "yanchor": "top",
        "pad": {"l": 12, "t": 22},
        "font": {"size": 15},
    }


def style(figure: go.Figure, height: int) -> None:
    """The look that reads on light and dark pages, and the places of things."""
    figure.update_layout(
        height=height,
        template=theme(),
        margin={"l": 60, "r": 20, "t": 70, "b": 60},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.0, "yanchor": "bottom"},
    )
