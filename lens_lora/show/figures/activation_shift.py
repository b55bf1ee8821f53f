"""How far an adapter moves activations, hook point by hook point over the tokens of one text."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from lens_lora.results import drawing
from lens_lora.results.activation_shift import ActivationShift
from lens_lora.results.choosing import layer_order
from lens_lora.show.figures.parts import heatmap, token_ticks
from lens_lora.show.figures.style import Cells, Labels, title
from lens_lora.show.text import label, percent, short_prompt, visible

__all__ = ["activation_shift_figure"]


@drawing.figure.register(ActivationShift)
def activation_shift_figure(found: ActivationShift, prompt: int) -> go.Figure:
    """‖Δh‖/‖h(0)‖; sinks and tokens that were not asked for are blank.

    Args:
        found: to be drawn.
        prompt: an index.
    """
    tokens, sinks = found.str_tokens[prompt], found.sinks[prompt].tolist()
    cells: Cells = []
    hover: Labels = []
    names = [found.names[i] for i in layer_order(found.names)]
    for name in names:
        values = found.values[name]
        sizes = (values[prompt].norm(dim=-1) / found.base_norms[name][prompt]).tolist()
        own = [(t, size, sinks[t] or math.isnan(size)) for t, size in enumerate(sizes)]
        own = own[: len(tokens)]
        cells.append([None if blank else size for _, size, blank in own])
        hover.append(
            [
                f"{label(name)}<br>{t} {label(visible(tokens[t]))}<br>{percent(size)} of ‖h(0)‖"
                for t, size, _ in own
            ]
        )
    columns = list(range(len(tokens)))
    figure = heatmap(cells, hover, columns, names, "‖Δh‖/‖h‖", scale="amount")
    below = f"‖Δh‖/‖h(0)‖ at {found.at}; sinks are grey"
    figure.update_layout(title=title(f"Shift of activations over “{short_prompt(tokens)}”", below))
    figure.update_yaxes(type="category")
    token_ticks(figure, tokens)
    return figure
