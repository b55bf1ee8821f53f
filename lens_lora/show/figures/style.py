"""The common look of figures: colours that read on light and dark, titles, layout."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from lens_lora.show.text import label

EMBEDDINGS = ("embed", "pos_embed")
OUTSIDE = (*EMBEDDINGS, "embed_ln", "ln_final", "unembed")
KINDS = (
    *(*EMBEDDINGS, "embed_ln", "ln1", "q", "k", "v", "q_norm", "k_norm", "o", "ln1_post"),
    *("ln2", "gate", "up", "fc_in", "down", "fc_out", "ln2_post", "ln_final", "unembed"),
)
INK, GRID, BLANK, NOISE = "#777777", "rgba(128,128,128,0.25)", "rgba(128,128,128,0.18)", "#999999"
EXACT, LINEAR, FLIP = "#2f83c5", "#e0802b", "#b04fc4"
DIVERGING = (
    (0.0, "#a50f22"),
    (0.25, "#e6806a"),
    (0.5, "#f7f7f7"),
    (0.75, "#6aaed1"),
    (1.0, "#0b559f"),
)
LEGEND_BELOW: dict[str, Any] = {
    "orientation": "h",
    "x": 0,
    "xanchor": "left",
    "y": -0.26,
    "yanchor": "top",
}

Cells = list[list[float | None]]
Labels = list[list[str]]


def title(heading: str, below: str) -> dict[str, object]:
    """A heading and a smaller line below it, escaped."""
    text = f"{label(heading)}<br><span style='font-size:12px'>{label(below)}</span>"
    return {"text": text, "x": 0, "xref": "container", "pad": {"l": 12}, "font": {"size": 15}}


def style(figure: go.Figure, height: int) -> None:
    """Transparent paper, mid-grey text and grid."""
    figure.update_layout(
        height=height,
        template="none",
        font={"color": INK, "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": INK},
        margin={"l": 60, "r": 20, "t": 70, "b": 60},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.0, "yanchor": "bottom"},
    )
    figure.update_xaxes(gridcolor=GRID, zeroline=False, automargin=True)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, automargin=True)
