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

_MOST_ROWS = 40
UNITS = {"svd": "u = ΣVᵀx", "trained": "u = Ax as trained"}


@drawing.figure.register(Activations)
def activations_figure(
    found: Activations, site: str | None = None, prompt: int | None = None
) -> go.Figure:
    """Every rank of the sites that are named, or the first rank of each; sinks are grey.

    Of many directions the 40 of largest |u| are shown, and the title says so.

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
    every = found.directions(site)
    values = found.values[index].cpu().double()
    sinks = found.sinks[index].tolist()

    def largest(row: tuple[int, int]) -> float:
        s, r = row
        return max(
            (abs(float(values[s, t, r])) for t in range(len(tokens)) if not sinks[t]), default=0
        )

    kept = set(sorted(every, key=largest, reverse=True)[:_MOST_ROWS])
    rows = [row for row in every if row in kept]
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
    columns = list(range(len(tokens)))
    figure = heatmap(cells, hover, columns, labels, UNITS[found.gauge], scale="signed")
    what = f"each rank of {site}" if site else "the first rank of each site"
    chosen = f", the {len(rows)} of {len(every)} of largest |u|" if len(rows) < len(every) else ""
    below = f"{what}{chosen}; sinks are grey; z read at {found.at}"
    figure.update_layout(title=title(f"Activations over “{short_prompt(tokens)}”", below))
    figure.update_yaxes(autorange="reversed" if site else None, type="category")
    token_ticks(figure, tokens)
    return figure
