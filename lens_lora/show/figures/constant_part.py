"""How constant each site's δ is, layer by layer."""

from __future__ import annotations

import plotly.graph_objects as go

from lens_lora.results import drawing
from lens_lora.results.constant_part import ConstantPart
from lens_lora.show.figures.layers import kinds_by_layer
from lens_lora.show.figures.style import title
from lens_lora.show.text import magnitude, percent

__all__ = ["constant_part_figure"]


@drawing.figure.register(ConstantPart)
def constant_part_figure(found: ConstantPart) -> go.Figure:
    """The share of each site, layer × kind of module; blank where there is no site.

    Args:
        found: to be drawn.
    """
    says = [
        f"{percent(share)} constant<br>‖δ‖ {magnitude(size)}"
        for share, size in zip(found.share.tolist(), found.size.tolist(), strict=True)
    ]
    figure = kinds_by_layer(
        found.sites, found.share.tolist(), says, "constant share", "signed", adds=False
    )
    figure.update_traces(zmin=-1, zmax=1, selector=0)
    below = (
        f"held-out texts, first tokens left out; the constants alone keep {percent(found.kept)} of "
        f"{found.readout}"
    )
    figure.update_layout(title=title("How much of each module's δ is one vector", below))
    return figure
