"""The path with first order's line and second order's parabola."""

from __future__ import annotations

import plotly.graph_objects as go

from lens_lora.analyses.second_order import SecondOrder
from lens_lora.results import drawing
from lens_lora.results.choosing import only_prompt
from lens_lora.show.figures.parts import whose
from lens_lora.show.figures.style import EXACT, FLIP, LINEAR, style, title
from lens_lora.show.figures.theme import INK
from lens_lora.show.text import label

__all__ = ["second_order_figure"]


@drawing.path.register(SecondOrder)
def second_order_figure(second: SecondOrder, prompt: int | None = None) -> go.Figure:
    """The exact shift along ε, first order's line and second order's parabola.

    Args:
        second: to be drawn.
        prompt: an index; without it, the only prompt.

    Raises:
        ArgumentError: no such prompt, or several and none named.
    """
    index = only_prompt(prompt, len(second.shift), "curves along ε")
    curve = second.curve
    scales = [0.0, *curve.scales.cpu().double().tolist()]
    units = label(curve.units)
    lines = (
        ("exact", curve.shift[index].tolist(), {"color": EXACT, "width": 2.5}),
        ("first order", curve.first_order[index].tolist(), _dashed(LINEAR, "dash")),
        ("second order", second.predicted_at(curve.scales)[index].tolist(), _dashed(FLIP, "dot")),
    )
    figure = go.Figure(
        [
            go.Scatter(
                x=scales,
                y=[0.0, *values],
                name=name,
                mode="lines",
                line=line,
                hovertemplate=f"ε = %{{x:.3g}}<br>%{{y:.4g}} {units}, {name}<extra></extra>",
            )
            for name, values, line in lines
        ]
    )
    style(figure, height=420)
    figure.update_layout(
        title=title(
            f"{curve.readout}: first and second order along ε",
            f"{second.verdict[index]} · {whose(index, curve.str_tokens)}",
        ),
        legend={"orientation": "v", "x": 0.02, "xanchor": "left", "y": 0.98, "yanchor": "top"},
    )
    figure.add_hline(y=0, line={"color": INK, "width": 1})
    figure.update_xaxes(title_text="ε, strength of the adapter")
    figure.update_yaxes(title_text=f"shift, {units}")
    return figure


def _dashed(color: str, dash: str) -> dict[str, object]:
    return {"color": color, "width": 2, "dash": dash}
