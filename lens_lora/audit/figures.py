"""The figures of an audit: the tokens that the adapter promotes, and the modules of the KL."""

from __future__ import annotations

from lens_lora.audit.what_changed import By, WhatChanged
from lens_lora.core import drawing
from lens_lora.show import go, text
from lens_lora.show.figures import (
    LINEAR,
    bars,
    curve,
    kinds_by_layer,
)
from lens_lora.show.text import (
    percent,
    signed,
    visible,
)


def shares_figure(changed: WhatChanged) -> go.Figure:
    """Draw each site's share of the KL by layer and kind of module."""
    values = changed.shares.tolist()
    total = sum(values) or 1.0
    hover = [f"{percent(value / total)} of all" for value in values]
    titles = (
        "Which modules hold the divergence",
        "shares of the KL along the path from base to adapted model",
    )
    return kinds_by_layer(titles, changed.sites, values, hover, "nats a token", "signed")


_PROMOTED_UNITS = {
    "logit": "mean shift of the logit",
    "probability": "mean shift of the probability",
    "count": "share of tokens at which it is among the 20 promoted most",
    "reading": "mean Δh on first tokens, read as logits",
}


# Each kind of control: its column, its name in a sentence, and the dash of its line.
CONTROLS = (("null", "its updates elsewhere", "dash"), ("unrelated", "an unrelated adapter", "dot"))


@drawing.figure.register(WhatChanged)
def promoted_figure(changed: WhatChanged, k: int = 20, by: By = "logit") -> go.Figure:
    """Draw the tokens promoted most; a line marks the largest shift under each kind of control."""
    frame = changed.promoted(k, by)
    values = frame[by].tolist()
    names = [f"{rank} {visible(token)}" for rank, token in frame[["rank", "token"]].to_numpy()]
    hover = [f"{text.label(name)}<br>{signed(v)}" for name, v in zip(names, values, strict=True)]
    heading = f"Promoted by {changed.found.name}, nothing asked"
    figure = bars((heading, changed.texts), names, values, hover, _PROMOTED_UNITS[by])
    figure.update_traces(showlegend=False)
    ends = [text.label(names[0]), text.label(names[-1])]
    for control, described, dash in CONTROLS:
        if control not in frame:
            continue
        most = float(frame[control].tolist()[0])
        said = f"{signed(most)}, the most of any token under {described}"
        name = f"most under {described}"
        figure.add_trace(curve([most] * 2, ends, name, LINEAR, [said] * 2, dash=dash))
    return figure
