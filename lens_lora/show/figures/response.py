"""The pictures of a response's explanation by name."""

from __future__ import annotations

from plotly.graph_objects import Figure

from lens_lora.analyses.explain_response import ResponseExplanation
from lens_lora.results import drawing
from lens_lora.show.figures.grouped import groups_by_token
from lens_lora.show.figures.shaded import still_text
from lens_lora.show.figures.style import Cells, title
from lens_lora.show.figures.token_shifts import token_shifts_figure
from lens_lora.show.text import label, signed

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


def _by_layer(e: ResponseExplanation, rows: Cells, how: str) -> Figure:
    """What each layer does to log p of each token, exactly."""
    figure = groups_by_token(
        list(e.groups),
        e.response,
        rows,
        "nats",
        lambda name, value: f"<b>{label(name)}</b> {how}: {signed(value)} nats",
    )
    total = sum(value or 0.0 for row in rows for value in row)
    heading = f"log p of each token: each layer {how}"
    shift = signed(float(e.shifts.total[0]))
    below = f"exact; {signed(total)} nats over all layers, the shift is {shift}"
    figure.update_layout(title=title(heading, below))
    return figure
