"""Two adapters: the cosine of their weight changes, by layer and kind of module."""

from __future__ import annotations

import plotly.graph_objects as go

from lens_lora.analyses.compare_adapters import AdapterComparison
from lens_lora.errors import ArgumentError
from lens_lora.results import drawing
from lens_lora.show.figures.layers import kinds_by_layer
from lens_lora.show.figures.style import title

__all__ = ["comparison_heatmap"]


@drawing.figure.register(AdapterComparison)
def comparison_heatmap(found: AdapterComparison) -> go.Figure:
    """cos⟨ΔW, ΔW′⟩ of every shared site; the colours end at ±1.

    Args:
        found: to be drawn.

    Raises:
        ArgumentError: the adapters share no site.
    """
    if not found.sites:
        raise ArgumentError("the two adapters share no site, so there is no cosine to draw.")
    cosines = found.cosines.tolist()
    figure = kinds_by_layer(
        found.sites, cosines, [f"cosine {v:+.3f}" for v in cosines], "cosine", "signed", adds=False
    )
    figure.update_traces(zmin=-1, zmax=1, selector=0)
    only = sum(map(len, found.only))
    rest = f", {only} sites in one of them alone" if only else ""
    heading = f"ΔW of {found.names[0]} and {found.names[1]}"
    figure.update_layout(title=title(heading, f"cosine over all sites {found.cosine:+.3f}{rest}"))
    return figure
