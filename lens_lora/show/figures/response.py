"""The pictures of a response's explanation by name."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.graph_objects import Figure

from lens_lora.analyses.explain_response import ResponseExplanation
from lens_lora.results import drawing
from lens_lora.show.figures.parts import heatmap, token_ticks
from lens_lora.show.figures.shaded import still_text
from lens_lora.show.figures.style import Cells, title
from lens_lora.show.figures.token_shifts import token_shifts_figure
from lens_lora.show.text import label, signed, visible

__all__ = ["response_figures"]


@drawing.figures.register(ResponseExplanation)
def response_figures(e: ResponseExplanation) -> dict[str, Figure]:
    """What there is to see.

    Args:
        e: to be drawn.
    """
    found = {"text": still_text(e.shifts), "tokens": token_shifts_figure(e.shifts)}
    for key, values, how in (
        ("add_one", e.add_one, "added alone to the base model"),
        ("leave_one_out", e.leave_one_out, "left out of the adapted model"),
    ):
        if values is not None:
            found[key] = _by_layer(e, values.tolist(), how)
    return found


def _by_layer(e: ResponseExplanation, rows: Cells, how: str) -> go.Figure:
    """What each layer does to log p of each token, exactly."""
    tokens = [label(visible(token)) for token in e.response]
    hover = [
        [
            f"<b>{label(name)}</b> {how}<br>{t} {token}: {signed(value or 0.0)} nats"
            for t, (token, value) in enumerate(zip(tokens, row, strict=True))
        ]
        for name, row in zip(e.groups, rows, strict=True)
    ]
    labels = [name.removeprefix("layer ") for name in e.groups]
    figure = heatmap(rows, hover, list(range(len(e.response))), labels, "nats", row_height=12)
    total = sum(value or 0.0 for row in rows for value in row)
    heading = f"log p of each token: each layer {how}"
    shift = signed(float(e.shifts.total[0]))
    below = f"exact; {signed(total)} nats over all layers, the shift is {shift}"
    figure.update_layout(title=title(heading, below))
    step = max(1, len(labels) // 15)
    figure.update_yaxes(
        title_text="layer",
        type="category",
        tickvals=list(range(0, len(labels), step)),
        ticktext=labels[::step],
    )
    figure.update_xaxes(title_text="token of the response")
    token_ticks(figure, e.response)
    return figure
