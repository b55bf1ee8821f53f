"""Which tokens an adapter promotes over unrelated texts, and which modules do it."""

from __future__ import annotations

import plotly.graph_objects as go

from lens_lora.results import drawing
from lens_lora.results.what_changed import By, WhatChanged
from lens_lora.show.figures.parts import bars, heatmap
from lens_lora.show.figures.style import KINDS, LINEAR, Cells, Labels, title
from lens_lora.show.text import label, percent, signed, visible

__all__ = ["promoted_figure", "shares_figure"]

_UNITS = {
    "logit": "mean shift of the logit",
    "probability": "mean shift of the probability",
    "reading": "mean Δh on first tokens, read as logits",
}


@drawing.figure.register(WhatChanged)
def promoted_figure(found: WhatChanged, k: int = 20, by: By = "logit") -> go.Figure:
    """The tokens promoted most; lines where the largest shift under a control is.

    Args:
        found: the audit.
        k: how many tokens.
        by: by what they are ranked.
    """
    frame = found.promoted(k, by)
    values = frame[by].tolist()
    names = [
        f"{rank} {visible(token)}"
        for rank, token in zip(frame["rank"], frame["token"], strict=True)
    ]
    hover = [f"{label(name)}<br>{signed(v)}" for name, v in zip(names, values, strict=True)]
    figure = bars(names, values, hover, _UNITS[by])
    for name in ("null", "unrelated"):
        if name in frame:
            figure.add_vline(
                x=float(frame[name].tolist()[0]),
                line={"color": LINEAR, "dash": "dash" if name == "null" else "dot"},
                annotation={"text": f"most, {name}", "font": {"size": 11}},
            )
    figure.update_layout(title=title(f"Promoted by {found.found.name}, nothing asked", found.texts))
    return figure


def shares_figure(found: WhatChanged) -> go.Figure:
    """Each site's share of the quadratic KL, layer × kind of module.

    Args:
        found: the audit.
    """
    kinds = [kind for kind in KINDS if kind in {site.kind for site in found.sites}]
    layers = sorted({site.layer for site in found.sites})
    cells: Cells = [[None] * len(kinds) for _ in layers]
    hover: Labels = [[""] * len(kinds) for _ in layers]
    whole = float(found.shares.sum()) or 1.0
    for site, value in zip(found.sites, found.shares.tolist(), strict=True):
        row, column = layers.index(site.layer), kinds.index(site.kind)
        cells[row][column] = (cells[row][column] or 0.0) + value
        hover[row][column] = f"{label(site.name)}<br>{percent(value / whole)} of all"
    figure = heatmap(cells, hover, kinds, layers, "nats a token")
    heading = "Which modules hold the divergence"
    figure.update_layout(title=title(heading, "shares of the quadratic KL: ½ vᵀFv, complete"))
    figure.update_yaxes(title_text="layer", type="category")
    return figure
