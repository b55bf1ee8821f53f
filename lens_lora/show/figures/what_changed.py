"""Which tokens an adapter promotes over unrelated texts, and which modules do it."""

from __future__ import annotations

import plotly.graph_objects as go

from lens_lora.results import drawing
from lens_lora.results.what_changed import By, WhatChanged
from lens_lora.show.figures.layers import kinds_by_layer
from lens_lora.show.figures.parts import bars
from lens_lora.show.figures.style import LINEAR, title
from lens_lora.show.text import label, percent, signed, visible

__all__ = ["promoted_figure", "shares_figure"]

_UNITS = {
    "logit": "mean shift of the logit",
    "probability": "mean shift of the probability",
    "reading": "mean Δh on first tokens, read as logits",
}
_CONTROLS = {"null": "a null adapter", "unrelated": "an unrelated adapter"}


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
    for name, dash in (("null", "dash"), ("unrelated", "dot")):
        if name in frame:
            most = float(frame[name].tolist()[0])
            figure.add_scatter(
                x=[most, most],
                y=[label(names[0]), label(names[-1])],
                mode="lines",
                name=f"most under {_CONTROLS[name]}",
                line={"color": LINEAR, "width": 2, "dash": dash},
                hovertext=f"{signed(most)}, the most of any token under {_CONTROLS[name]}",
                hoverinfo="text",
            )
    figure.update_traces(showlegend=False, selector=0)
    figure.update_layout(title=title(f"Promoted by {found.found.name}, nothing asked", found.texts))
    return figure


def shares_figure(found: WhatChanged) -> go.Figure:
    """Each site's share of the quadratic KL, layer × kind of module.

    Args:
        found: the audit.
    """
    values = found.shares.tolist()
    whole = sum(values) or 1.0
    says = [f"{percent(value / whole)} of all" for value in values]
    figure = kinds_by_layer(found.sites, values, says, "nats a token", "signed")
    heading = "Which modules hold the divergence"
    figure.update_layout(title=title(heading, "shares of the quadratic KL: ½ vᵀFv, complete"))
    return figure
