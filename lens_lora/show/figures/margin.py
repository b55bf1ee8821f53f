"""A fact margin along ε: exact, to first order, and where it flips."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from lens_lora.analyses.margin import FactMargin
from lens_lora.results import drawing
from lens_lora.results.choosing import only_prompt
from lens_lora.show.figures.parts import along_path, whose
from lens_lora.show.figures.style import FLIP, style, title
from lens_lora.show.figures.theme import INK
from lens_lora.show.text import label

__all__ = ["margin_figure"]

_ROOM_FOR_THE_LABEL = 0.25


@drawing.figure.register(FactMargin)
def margin_figure(fact_margin: FactMargin, prompt: int | None = None) -> go.Figure:
    """The margin along ε, its first-order line, the zero line and the flip.

    Args:
        fact_margin: to be drawn.
        prompt: an index; without it, the only prompt.

    Raises:
        ArgumentError: no such prompt, or several and none named.
    """
    curve = fact_margin.curve
    index = only_prompt(prompt, len(curve.base), "curves along ε")
    figure = go.Figure(along_path(curve, index))
    figure.add_hline(y=0, line={"color": INK, "width": 1.5})
    flip = float(fact_margin.flip_scale[index])
    if math.isfinite(flip):
        # Where the margin is not: before the flip it has its base's sign, after it the other.
        side = "left" if flip > _ROOM_FOR_THE_LABEL else "right"
        height = "top" if (float(curve.base[index]) < 0) == (side == "left") else "bottom"
        figure.add_vline(
            x=flip,
            line={"color": FLIP, "width": 1.5, "dash": "dot"},
            annotation={
                "text": f"flips at ε = {flip:.3g}",
                "font": {"color": FLIP},
                "xshift": 6 if side == "right" else -6,
            },
            annotation_position=f"{height} {side}",
        )
    style(figure, height=380)
    below = f"from the base model to the adapted · {whose(index, curve.str_tokens)}"
    figure.update_layout(title=title(f"{curve.readout} along ε", below))
    figure.update_xaxes(title_text="ε, strength of the adapter")
    figure.update_yaxes(title_text=f"margin, {label(curve.units)}")
    return figure
