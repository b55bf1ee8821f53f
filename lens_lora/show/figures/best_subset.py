"""The best sets of sites: which sites are in one, and what each size keeps of the shift."""

from __future__ import annotations

import plotly.graph_objects as go

from lens_lora.analyses.best_subset import BestSubset
from lens_lora.results import drawing
from lens_lora.show.figures.layers import kinds_by_layer
from lens_lora.show.figures.parts import whose
from lens_lora.show.figures.style import EXACT, NOISE, style, title
from lens_lora.show.text import label, percent, short_prompt

__all__ = ["best_subset_figure"]


@drawing.figure.register(BestSubset)
def best_subset_figure(found: BestSubset, count: int | None = None) -> go.Figure:
    """One set as a map of the sites; several sizes as a curve of what they keep.

    Args:
        found: to be drawn.
        count: the set of so many sites; without it, the only set, or the curve over sizes.

    Raises:
        ArgumentError: no such set.
    """
    if count is None and len(found.counts) > 1:
        return _curve(found)
    return _members(found, found.row(count))


def _members(found: BestSubset, row: int) -> go.Figure:
    chosen = found.members[row].tolist()
    says = ["in the set" if one else "not in the set" for one in chosen]
    values = [float(one) for one in chosen]
    figure = kinds_by_layer(found.sites, values, says, "", "amount", adds=False)
    figure.update_traces(showscale=False, zmin=0, zmax=1, selector={"type": "heatmap"})
    kept = percent(float(found.kept[row]))
    heading = f"{found.counts[row]} of {len(found.sites)} sites keep {kept} of the shift"
    below = f"the best set found, {found.readout} · {whose(None, found.str_tokens)}"
    figure.update_layout(title=title(heading, below))
    return figure


def _curve(found: BestSubset) -> go.Figure:
    """Of all prompts together, and each prompt's own, thin."""
    at = (100 * found.fractions).tolist()
    several = len(found.str_tokens) > 1
    figure = go.Figure()
    each = zip(found.str_tokens, found.kept_by_prompt.T, strict=True) if several else ()
    for tokens, kept in each:
        figure.add_scatter(
            x=at,
            y=[None if y != y else 100 * y for y in kept.tolist()],
            name="each prompt",
            legendgroup="each",
            showlegend=not figure.data,
            mode="lines",
            line={"color": NOISE, "width": 1},
            hovertext=label(short_prompt(tokens)),
        )
    figure.add_scatter(
        x=at,
        y=(100 * found.kept).tolist(),
        name="all prompts together" if several else "kept",
        mode="lines+markers",
        line={"color": EXACT, "width": 2.5},
        hovertext=[
            f"{count} sites, found by {by}"
            for count, by in zip(found.counts, found.found_by, strict=True)
        ],
    )
    style(figure, height=420)
    heading = f"What the best sets of {len(found.sites)} sites keep of the shift"
    below = f"the best found, {found.readout} · {whose(None, found.str_tokens)}"
    figure.update_layout(title=title(heading, below), showlegend=several)
    figure.update_xaxes(title_text="size of the set, % of the sites", rangemode="tozero")
    figure.update_yaxes(title_text="kept, % of the shift")
    figure.add_hline(y=100, line={"color": NOISE, "width": 1})
    return figure
