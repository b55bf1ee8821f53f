"""The figure of a file of activations."""

from __future__ import annotations

from lens_lora.core import drawing
from lens_lora.show import go
from lens_lora.show.spread import spread_figure
from lens_lora.sweeps.activations_file import ActivationsFile


@drawing.figure.register(ActivationsFile)
def activations_file_figure(file: ActivationsFile, site: str | None = None) -> go.Figure:
    """A box for each direction: how its activation is spread over the tokens of all texts."""
    return spread_figure(file.spread(site), f"{file.texts} texts", site, file.gauge)
