"""Directions of rank space over the tokens of one prompt."""

from __future__ import annotations

import plotly.graph_objects as go

from lens_lora.results import drawing
from lens_lora.results.activations import Activations
from lens_lora.results.choosing import only_prompt
from lens_lora.show.figures.parts import heatmap, token_ticks
from lens_lora.show.figures.style import Cells, Labels, title
from lens_lora.show.text import label, short_prompt, signed, visible

__all__ = ["activations_figure"]

UNITS = {"svd": "u = ΣVᵀx", "trained": "u = Ax as trained"}


@drawing.figure.register(Activations)
def activations_figure(
    found: Activations, site: str | None = None, prompt: int | None = None
) -> go.Figure:
    """Every rank of the sites that are named, or the first rank of each; sinks are blank.

    Args:
        found: to be drawn.
        site: a name or glob, or None.
        prompt: an index; without it, the only prompt.

    Raises:
        SiteError: no such site.
        ArgumentError: no such prompt, or several and none named.
    """
    index = only_prompt(prompt, len(found.str_tokens), "activations")
    tokens, names = found.str_tokens[index], [s.name for s in found.sites]
    rows = found.directions(site)
    values = found.values[index].cpu().double()
    sinks = found.sinks[index].tolist()
    cells: Cells = [
        [None if sinks[t] else float(values[s, t, r]) for t in range(len(tokens))] for s, r in rows
    ]
    hover: Labels = [
        [
            f"{names[s]} rank {r}<br>{t} {label(visible(tokens[t]))}<br>"
            f"{signed(float(values[s, t, r]))}{' (a sink)' if sinks[t] else ''}"
            for t in range(len(tokens))
        ]
        for s, r in rows
    ]
    labels = [f"{names[s]} {r}" for s, r in rows]
    figure = heatmap(cells, hover, list(range(len(tokens))), labels, "u")
    figure.update_traces(colorbar={"title": {"text": label(UNITS[found.gauge])}})
    what = f"each rank of {site}" if site else "the first rank of each site"
    below = f"{what}; sinks are blank; z read at {found.at}"
    figure.update_layout(title=title(f"Activations over “{short_prompt(tokens)}”", below))
    figure.update_yaxes(autorange="reversed" if site else None, type="category")
    token_ticks(figure, tokens)
    return figure
