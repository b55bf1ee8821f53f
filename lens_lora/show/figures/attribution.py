"""An attribution as heatmaps: layer × kind of module, and layer × position."""

from __future__ import annotations

import plotly.graph_objects as go

from lens_lora.errors import ArgumentError
from lens_lora.results import drawing
from lens_lora.results.attribution import Attribution
from lens_lora.results.choosing import only_prompt
from lens_lora.show.figures.layers import by_layer, kinds_by_layer, layers_of
from lens_lora.show.figures.parts import token_ticks, value_text, whose
from lens_lora.show.figures.style import Cells, title
from lens_lora.show.text import key_text, label, visible

__all__ = ["position_heatmap", "require_positions", "site_heatmap"]


@drawing.figure.register(Attribution)
def site_heatmap(attribution: Attribution, prompt: int | None = None) -> go.Figure:
    """Layer × kind of module, hover naming each site; a site that does not exist is blank.

    Args:
        attribution: by site, or split further and then summed.
        prompt: an index; without it, the mean over prompts.

    Raises:
        ArgumentError: no such prompt.
    """
    values, shift = attribution.entries(prompt)[1:3]

    def text(value: float) -> str:
        return value_text(value, float(shift), attribution.units)

    figure = kinds_by_layer(attribution.sites, values.tolist(), text, attribution.units)
    figure.update_layout(title=title(_heading(attribution, prompt), "by layer and kind of module"))
    return figure


@drawing.positions.register(Attribution)
def position_heatmap(attribution: Attribution, prompt: int | None = None) -> go.Figure:
    """Layer × token position of one prompt, summed over the layer's sites.

    Args:
        attribution: split by position.
        prompt: an index; without it, the only prompt.

    Raises:
        ArgumentError: the attribution was not split by position; no such prompt, or several and
            none named.
    """
    require_positions(attribution)
    index = only_prompt(prompt, len(attribution.base), "positions")
    tokens = attribution.str_tokens[index]
    shift, values = float(attribution.shift[index]), _by_position(attribution, index)
    layers = layers_of(attribution.sites)
    z: Cells = [[None] * len(tokens) for _ in layers]
    for site, row in zip(attribution.sites, values, strict=True):
        at = layers.index(site.layer)
        z[at] = [(old or 0.0) + new for old, new in zip(z[at], row, strict=True)]
    hover = [
        [
            f"<b>layer {layer}, position {i}</b>: {label(visible(token))}"
            f"<br>{_or_no_site(value, shift, attribution.units)}"
            for i, (token, value) in enumerate(zip(tokens, row, strict=True))
        ]
        for layer, row in zip(layers, z, strict=True)
    ]
    figure = by_layer(z, hover, list(range(len(tokens))), attribution.sites, attribution.units)
    figure.update_layout(title=title(_heading(attribution, index), "by layer and position"))
    token_ticks(figure, tokens)
    return figure


def require_positions(attribution: Attribution) -> None:
    """Refuse an attribution without positions.

    Args:
        attribution: to be shown by position.

    Raises:
        ArgumentError: it was not split by position.
    """
    if "position" not in attribution.by:
        raise ArgumentError(
            f"the attribution is split by {attribution.by or 'nothing'}, not by position; compute "
            'it with first_order(..., by="position").'
        )


def _by_position(attribution: Attribution, index: int) -> list[list[float]]:
    """[site, position] of one prompt, its padding left out and other axes summed."""
    values = attribution.values[index].cpu().double()
    for axis in range(len(attribution.by), 0, -1):
        if attribution.by[axis - 1] != "position":
            values = values.nansum(axis)
    return values[:, : len(attribution.str_tokens[index])].tolist()


def _or_no_site(value: float | None, shift: float, units: str) -> str:
    return "no site" if value is None else value_text(value, shift, units)


def _heading(attribution: Attribution, prompt: int | None) -> str:
    of = whose(prompt, len(attribution.base))
    return f"{attribution.readout}, {key_text(attribution.key)}{of}"
