"""An attribution as heatmaps: layer × kind of module, layer × token, site × head or rank."""

from __future__ import annotations

import functools
from collections.abc import Callable

import plotly.graph_objects as go

from lens_lora.arguments import whole, word
from lens_lora.errors import ArgumentError
from lens_lora.results import drawing
from lens_lora.results.attribution import MOST_POSITIONS, Attribution, Axis
from lens_lora.results.choosing import only_prompt
from lens_lora.show.figures.layers import by_layer, kinds_by_layer, layers_of
from lens_lora.show.figures.parts import heatmap, token_ticks, value_text, whose
from lens_lora.show.figures.style import Cells, title
from lens_lora.show.text import key_text, label, magnitude, visible

__all__ = ["position_heatmap", "require_positions", "site_heatmap"]

_MOST_SITES = 40


@drawing.figure.register(Attribution)
def site_heatmap(
    attribution: Attribution, prompt: int | None = None, by: Axis | None = None
) -> go.Figure:
    """Layer × kind of module, hover naming each site; a site that does not exist is grey.

    Args:
        attribution: by site, or split further and then summed.
        prompt: an index; without it, the mean over prompts, or by position and token the only one.
        by: an axis of the attribution, whose parts are shown: 'position', 'head', 'rank', 'token'.

    Raises:
        ArgumentError: no such prompt, or by position and token several and none named; an axis that
            the attribution was not split by.
    """
    if by is not None:
        word("by", by, _BY)
        return _BY[by](attribution, prompt)
    values, shift = (found.cpu().double() for found in attribution.entries(prompt)[1:3])
    spread = None
    if prompt is None and len(attribution.base) > 1:
        spread = attribution.per_site.cpu().double().std(0).tolist()
    says = [
        value_text(value, float(shift), attribution.units)
        + (f"<br>± {magnitude(spread[i])} over prompts" if spread else "")
        for i, value in enumerate(values.tolist())
    ]
    figure = kinds_by_layer(attribution.sites, values.tolist(), says, attribution.units)
    rest = [axis for axis in attribution.by if axis != "position"]
    summed = f", summed over {' and '.join(map('{}s'.format, rest))}" if rest else ""
    below = f"by layer and kind of module{summed}"
    figure.update_layout(title=_title(attribution, below, prompt))
    return figure


@drawing.positions.register(Attribution)
def position_heatmap(
    attribution: Attribution, prompt: int | None = None, most: int | None = MOST_POSITIONS
) -> go.Figure:
    """Layer × token position of one prompt, summed over the layer's sites.

    Args:
        attribution: split by position.
        prompt: an index; without it, the only prompt.
        most: how many positions are shown, those of largest |value| in a layer; None for all.

    Raises:
        ArgumentError: the attribution was not split by position; no such prompt, or several and
            none named; a `most` below 1.
    """
    require_positions(attribution)
    index = only_prompt(prompt, len(attribution.base), "positions")
    return _layers_by_token(attribution, index, "position", most)


def _tokens_heatmap(attribution: Attribution, prompt: int | None) -> go.Figure:
    index = only_prompt(prompt, len(attribution.base), "tokens of responses")
    return _layers_by_token(attribution, index, "token", None)


def _layers_by_token(
    attribution: Attribution, index: int, axis: Axis, most: int | None
) -> go.Figure:
    """Layer × token, of the prompt or of the response."""
    tokens = (attribution.str_tokens if axis == "position" else attribution.response)[index]
    shift = float(attribution.shift[index])
    values = attribution.along(axis, index)[0][:, : len(tokens)].tolist()
    layers = layers_of(attribution.sites)
    z: Cells = [[None] * len(tokens) for _ in layers]
    for site, row in zip(attribution.sites, values, strict=True):
        at = layers.index(site.layer)
        z[at] = [(old or 0.0) + new for old, new in zip(z[at], row, strict=True)]
    shown = _largest_columns(z, most)
    hover = [
        [
            f"<b>layer {layer}, {axis} {i}</b>: {label(visible(tokens[i]))}"
            f"<br>{_or_no_site(row[i], shift, attribution.units)}"
            for i in shown
        ]
        for layer, row in zip(layers, z, strict=True)
    ]
    cells: Cells = [[row[i] for i in shown] for row in z]
    figure = by_layer(cells, hover, range(len(shown)), attribution.sites, attribution.units)
    below = f"by layer and {'position' if axis == 'position' else 'token of the response'}"
    if len(shown) < len(tokens):
        below += f", the {len(shown)} of {len(tokens)} of largest |value| in a layer"
    figure.update_layout(title=_title(attribution, below, index))
    token_ticks(figure, tokens, shown)
    return figure


def _largest_columns(z: Cells, most: int | None) -> list[int]:
    """The columns to show, in their order."""
    count = len(z[0])
    if most is None or count <= whole("most", most, 1):
        return list(range(count))
    sizes = [max((abs(row[i] or 0.0) for row in z), default=0.0) for i in range(count)]
    return sorted(sorted(range(count), key=lambda i: -sizes[i])[:most])


def _parts_heatmap(attribution: Attribution, prompt: int | None, axis: Axis) -> go.Figure:
    """Site × head or rank, of the sites with the largest part."""
    own, exists = attribution.along(axis, prompt)
    _, shift = attribution.mean_over(prompt, attribution.per_site)
    if axis == "head":  # the last slot is for sites outside attention
        own, exists = own[:, :-1], exists[:, :-1]
    sizes = own.abs().masked_fill(~exists, -1.0).amax(1)
    having = int(exists.any(1).sum())
    chosen = sorted(sizes.argsort(descending=True)[: min(_MOST_SITES, having)].tolist())
    sites = [attribution.sites[i] for i in chosen]
    z: Cells = [
        [v if real else None for v, real in zip(own[i].tolist(), exists[i].tolist(), strict=True)]
        for i in chosen
    ]
    hover = [
        [
            f"<b>{label(site.name)}</b>, {axis} {part}"
            f"<br>{_or_no_site(value, float(shift), attribution.units)}"
            for part, value in enumerate(row)
        ]
        for site, row in zip(sites, z, strict=True)
    ]
    names = [label(site.name) for site in sites]
    figure = heatmap(z, hover, [str(i) for i in range(own.shape[1])], names, attribution.units)
    below = f"by site and {axis}"
    if axis == "rank":
        below += " of the SVD of ΔW" if attribution.gauge == "svd" else " as trained"
    if len(chosen) < having:
        below += f", the {len(chosen)} of {having} sites with the largest part"
    figure.update_layout(title=_title(attribution, below, prompt))
    figure.update_xaxes(title_text=axis, type="category")
    figure.update_yaxes(type="category")
    return figure


_BY: dict[Axis, Callable[[Attribution, int | None], go.Figure]] = {
    "position": position_heatmap,
    "head": functools.partial(_parts_heatmap, axis="head"),
    "rank": functools.partial(_parts_heatmap, axis="rank"),
    "token": _tokens_heatmap,
}


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


def _or_no_site(value: float | None, shift: float, units: str) -> str:
    return "not there" if value is None else value_text(value, shift, units)


def _title(attribution: Attribution, below: str, prompt: int | None) -> dict[str, object]:
    heading = f"{attribution.readout}, {key_text(attribution.key)}"
    return title(heading, f"{below} · {whose(prompt, attribution.str_tokens)}")
