"""How constant each site's δ is, layer by layer."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from lens_lora.results import drawing
from lens_lora.results.constant_part import ConstantPart
from lens_lora.show.figures.parts import heatmap
from lens_lora.show.figures.style import KINDS, Cells, Labels, title
from lens_lora.show.text import label, magnitude, percent

__all__ = ["constant_part_figure"]


@drawing.figure.register(ConstantPart)
def constant_part_figure(found: ConstantPart) -> go.Figure:
    """The share of each site, layer × kind of module; blank where there is no site.

    Args:
        found: to be drawn.
    """
    kinds = [kind for kind in KINDS if kind in {site.kind for site in found.sites}]
    layers = sorted({site.layer for site in found.sites})
    cells: Cells = [[None] * len(kinds) for _ in layers]
    hover: Labels = [[""] * len(kinds) for _ in layers]
    for site, share, size in zip(
        found.sites, found.share.tolist(), found.size.tolist(), strict=True
    ):
        at = layers.index(site.layer), kinds.index(site.kind)
        cells[at[0]][at[1]] = share if math.isfinite(share) else None
        hover[at[0]][at[1]] = (
            f"{label(site.name)}<br>{percent(share)} constant<br>‖δ‖ {magnitude(size)}"
        )
    figure = heatmap(cells, hover, kinds, layers, "share", reach=1.0)
    figure.update_traces(colorbar={"title": {"text": "constant<br>share"}})
    below = (
        f"held-out texts, first tokens left out; the constants alone keep {percent(found.kept)} of "
        f"{found.readout}"
    )
    figure.update_layout(title=title("How much of each module's δ is one vector", below))
    figure.update_yaxes(title_text="layer", type="category")
    return figure
