"""The core's results as heatmaps and bars: over sites, groups, tokens and hook points."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pandas as pd

from lens_lora.arguments import whole, word
from lens_lora.core import (
    ActivationEffects,
    Attribution,
    Axis,
    Components,
    Effects,
    GroupAttribution,
    Shown,
    drawing,
    layer_order,
)
from lens_lora.errors import ArgumentError
from lens_lora.show import figures, go
from lens_lora.show.figures import heatmap, names_axis, value_text, whose
from lens_lora.show.text import key_text, label, magnitude, signed, visible

# --- An attribution: layer × kind of module, layer × token, site × head or rank

_MOST_SITES = 40
_MOST_POSITIONS = 40


@drawing.figure.register(Attribution)
def attribution_figure(
    attribution: Attribution, prompt: int | None = None, by: Shown | None = None
) -> go.Figure:
    """Draw one axis: by default the first along which some site has a part.

    An attribution that was not split is drawn as with by='site': layer × kind of module.
    """
    if by is not None:
        word("by", by, get_args(Shown))
    shown = _first_axis(attribution) if by is None else by
    if shown == "site":
        return site_heatmap(attribution, prompt)
    if shown == "position":
        return position_heatmap(attribution, prompt)
    if shown == "token":
        return token_heatmap(attribution, prompt)
    return _parts_heatmap(attribution, prompt, shown)


def _first_axis(attribution: Attribution) -> Shown:
    """The first axis along which some site has a part; 'site' where there is none."""
    for axis in attribution.by:
        if _has_parts(attribution, axis):
            return axis
    return "site"


def site_heatmap(attribution: Attribution, prompt: int | None = None) -> go.Figure:
    """Draw layer × kind of module, each site summed over whatever it was split by."""
    _, site_values, shift, _ = attribution.entries(prompt)
    values = site_values.tolist()
    units = attribution.units
    hover = [value_text(value, float(shift), units) for value in values]
    if prompt is None and len(attribution.base) > 1:
        deviations = attribution.per_site.cpu().double().std(0).tolist()
        for i, deviation in enumerate(deviations):
            hover[i] += f"<br>± {magnitude(deviation)} over prompts"
    below = f"by layer and kind of module{_summed_text(attribution)}"
    titles = _titles(attribution, below, prompt)
    return figures.kinds_by_layer(titles, attribution.sites, values, hover, units)


def _summed_text(attribution: Attribution, *shown: Axis) -> str:
    """', summed over heads and ranks', to follow what a picture shows; '' where nothing is."""
    others = [f"{axis}s" for axis in attribution.by if axis not in shown]
    return f", summed over {' and '.join(others)}" if others else ""


@drawing.positions.register(Attribution)
def position_heatmap(
    attribution: Attribution, prompt: int | None = None, most: int | None = _MOST_POSITIONS
) -> go.Figure:
    """Draw layer × token position of one prompt, summed over the layer's sites."""
    require_positions(attribution)
    index = attribution.only_prompt(prompt, "positions")
    tokens = attribution.str_tokens[index]
    count = len(tokens)
    if most is not None:
        count = whole("most", most, 1)
    return _layers_by_token(attribution, index, "position", tokens, count)


def token_heatmap(attribution: Attribution, prompt: int | None = None) -> go.Figure:
    """Draw layer × token of one prompt's response, summed over the layer's sites."""
    index = attribution.only_prompt(prompt, "tokens of responses")
    tokens = attribution.response[index]
    return _layers_by_token(attribution, index, "token", tokens, len(tokens))


def _layers_by_token(
    attribution: Attribution, prompt: int, axis: Axis, tokens: Sequence[str], most: int
) -> go.Figure:
    """Draw at most this number of tokens: those with the largest |value| in some layer."""
    # Positions are counted from 0, the tokens of a response from 1.
    first = 0
    counted = "position"
    if axis == "token":
        first = 1
        counted = "token of the response"
    units = attribution.units
    shift = float(attribution.shift[prompt])
    values, _ = attribution.along(axis, prompt)

    y = figures.layers_axis(attribution.sites)
    layers = [site.layer for site in attribution.sites]
    by_site: Any = pd.DataFrame(values[:, : len(tokens)].numpy(), index=layers)
    by_layer = by_site.groupby(level=0).sum().reindex(y.values)
    largest = by_layer.abs().max().nlargest(most)
    shown: list[int] = sorted(largest.index.tolist())

    below = f"by layer and {counted}{_summed_text(attribution, axis)}"
    if len(shown) < len(tokens):
        below += (
            f", the {len(shown)} positions of {len(tokens)} with the largest |value| in a layer"
        )

    def hover(i: int, j: int, value: float | None) -> str:
        place = shown[j]
        where = f"<b>layer {y.values[i]}, {axis} {place + first}</b>"
        return f"{where}: {label(visible(tokens[place]))}<br>{value_text(value, shift, units)}"

    x = figures.tokens_axis(tokens, shown, first=first)
    cells = by_layer[shown].to_numpy().tolist()
    return heatmap(_titles(attribution, below, prompt), cells, hover, x, y, units)


def _parts_heatmap(attribution: Attribution, prompt: int | None, axis: Axis) -> go.Figure:
    """Draw site × head, expert or rank, for the sites with the largest part."""
    parts, exists = _parts(attribution, prompt, axis)
    _, shift = attribution.mean_over(prompt, attribution.base)
    units = attribution.units
    sites_with_parts = int(exists.any(1).sum())
    if not sites_with_parts:
        raise ArgumentError(
            f"by={axis!r}: no site of this attribution has {axis}s",
            remedy="plot(by='site') draws the sites.",
        )
    largest = parts.abs().masked_fill(~exists, -1.0).amax(1)
    count = min(_MOST_SITES, sites_with_parts)
    chosen = sorted(largest.argsort(descending=True)[:count].tolist())
    below = f"by site and {axis}"
    if axis == "rank" and attribution.gauge == "svd":
        below += " of the SVD of ΔW"
    elif axis == "rank":
        below += " as trained"
    below += _summed_text(attribution, axis)
    if count < sites_with_parts:
        below += f", the {count} of {sites_with_parts} sites with the largest part"
    x = names_axis(range(parts.shape[1]), axis)
    y = names_axis(attribution.sites[i].name for i in chosen)

    def hover(i: int, part: int, value: float | None) -> str:
        return f"<b>{y.values[i]}</b>, {axis} {part}<br>{value_text(value, float(shift), units)}"

    cells = parts.masked_fill(~exists, math.nan)[chosen].tolist()
    return heatmap(_titles(attribution, below, prompt), cells, hover, x, y, units)


def _parts(attribution: Attribution, prompt: int | None, axis: Axis) -> tuple[Any, Any]:
    """The values along an axis, and which of them exist: two tensors [site, part].

    By head and by expert the last slot, which is for sites without any, is left out.
    """
    parts, exists = attribution.along(axis, prompt)
    if axis in ("head", "expert"):
        return parts[:, :-1], exists[:, :-1]
    return parts, exists


def _has_parts(attribution: Attribution, axis: Axis) -> bool:
    """Whether some site has a part along the axis: an adapter of MLPs alone has no heads."""
    _, exists = _parts(attribution, None, axis)
    return bool(exists.any())


def require_positions(attribution: Attribution) -> None:
    """Refuse an attribution without positions.

    Raises:
        ArgumentError: it is not split by position.
    """
    if "position" not in attribution.by:
        raise ArgumentError(
            f"the attribution is split by {attribution.by or 'nothing'}, not by position",
            remedy='compute it with first_order(..., by="position").',
        )


def _titles(result: Any, below: str, prompt: int | None) -> figures.Pair:
    """A heading that names the readout and the method, and below it what is shown."""
    heading = f"{result.readout}, {key_text(result.key)}"
    return heading, f"{below} · {whose(prompt, result.str_tokens)}"


# --- The components of first order

# How each component is called, and how it is coloured.
_COMPONENTS: dict[str, tuple[str, figures.Scale]] = {
    "z_norm": ("‖z‖", "amount"),
    "delta_norm": ("‖δz‖", "amount"),
    "sensitivity": ("‖Jᵀu‖", "amount"),
    "cosine": ("cos(δz, Jᵀu)", "signed"),
    "gain": ("‖J δz‖ / ‖δz‖", "amount"),
    "first_order": ("a = ‖δz‖ · ‖Jᵀu‖ · cos", "pushes"),
}


@drawing.figure.register(Components)
def components_figure(
    components: Components, of: str = "first_order", prompt: int | None = None
) -> go.Figure:
    """Draw one component, layer × kind of module; a hover has all of them."""
    count = len(components.z_norm)
    rows = slice(None)
    whose_numbers = f"mean of {count} prompts"
    if prompt is not None or count == 1:
        index = components.only_prompt(prompt)
        rows = slice(index, index + 1)
        whose_numbers = f"prompt {index} of {count}"
    by_component: dict[str, list[float]] = {}
    for name in _COMPONENTS:
        values = getattr(components, name)[rows].cpu().double()
        by_component[name] = values.nanmean(0).tolist()
    hover: list[str] = []
    for site in range(len(components.sites)):
        lines: list[str] = []
        for name, (symbol, _) in _COMPONENTS.items():
            lines.append(f"{symbol} {signed(by_component[name][site])}")
        hover.append("<br>".join(lines))
    called, scale = _COMPONENTS[of]
    reach = 1.0 if of == "cosine" else None
    titles = (f"{called} at the base model", f"by layer and kind of module · {whose_numbers}")
    return figures.kinds_by_layer(
        titles, components.sites, by_component[of], hover, called, scale, reach=reach
    )


# --- Effects, and groups of sites


@drawing.figure.register(Effects)
def effects_figure(effects: Effects, prompt: int | None = None) -> go.Figure:
    """Draw layer × kind of module for single sites, else a bar for each group."""
    is_single = all(len(members) == 1 for members in effects.groups.values())
    if effects.of == "site" and is_single:
        return site_heatmap(effects.attribution(), prompt)
    return _bars_of_groups(effects, prompt)


@drawing.figure.register(GroupAttribution)
def grouped_figure(grouped: GroupAttribution, prompt: int | None = None) -> go.Figure:
    """Draw a bar for each group; or by token, group × token of one response."""
    if not grouped.by:
        return _bars_of_groups(grouped, prompt)
    index = grouped.only_prompt(prompt, "tokens")
    tokens = grouped.response[index]
    shift = float(grouped.shift[index])
    units = grouped.units
    total = float(grouped.per_group[index].sum())
    heading = f"{grouped.readout} by token, first order at ε = {grouped.at:g}"
    below = f"{signed(total)} over all groups, the shift is {signed(shift)} {units}"
    titles = (heading, f"{below} · {whose(index, grouped.str_tokens)}")
    rows = grouped.values[index, :, : len(tokens)].double().tolist()

    def hover(name: str, value: float) -> str:
        return f"<b>{label(name)}</b>: {value_text(value, shift, units)}"

    return groups_by_token(titles, list(grouped.groups), tokens, rows, units, hover)


def _bars_of_groups(result: Effects | GroupAttribution, prompt: int | None) -> go.Figure:
    """Draw a bar for each group of sites."""
    _, group_values, shift, _ = result.entries(prompt)
    values = group_values.tolist()
    units = result.units
    hover: list[str] = []
    for (name, members), value in zip(result.groups.items(), values, strict=True):
        said = value_text(value, float(shift), units)
        hover.append(f"<b>{label(name)}</b><br>{said}<br>sites: {len(members)}")
    titles = _titles(result, f"of a shift of {signed(float(shift))} {units}", prompt)
    upwards = _are_layers(result)
    return figures.bars(titles, result.groups, values, hover, units, upwards=upwards)


def _are_layers(result: Effects | GroupAttribution) -> bool:
    """Whether each group is one whole layer, so that bars go upwards as layers do."""
    for members in result.groups.values():
        layers_of_group = {result.sites[i].layer for i in members}
        if len(layers_of_group) != 1:
            return False
    layers = {site.layer for site in result.sites}
    return len(result.groups) == len(layers)


def groups_by_token(
    titles: figures.Pair,
    names: Sequence[str],
    response: Sequence[str],
    rows: figures.Cells,
    units: str,
    hover: Callable[[str, float], str],
) -> go.Figure:
    """Draw a row for each group of sites and a column for each token of a response.

    Args:
        titles: the heading, and the line below it.
        names: the groups; 'layer 3' is written as 3.
        response: the tokens.
        rows: [group, token].
        units: the units of the values.
        hover: the hover text of a group's value at a token; the token is written below it.
    """
    shown_names = [name.removeprefix("layer ") for name in names]
    ticked: Sequence[int] = range(len(names))
    title = ""
    if all(name.startswith("layer ") for name in names):
        ticked = figures.every_few(ticked, 15)
        title = "layer"
    y = names_axis(shown_names, title)
    ticks = figures.ticks(ticked, [y.values[i] for i in ticked])
    y = y._replace(layout={**y.layout, **ticks})
    x = figures.tokens_axis(response, title="token of the response", first=1)

    def cell_hover(i: int, t: int, value: float | None) -> str:
        return f"{hover(names[i], value or 0.0)}<br>{t + 1} {label(visible(response[t]))}"

    return heatmap(titles, rows, cell_hover, x, y, units, row_height=12)


# --- Hook points

_DIRECTIONS = {
    "base_to_adapted": "base activations into the adapted model",
    "adapted_to_base": "adapted activations into the base model",
}


@drawing.figure.register(ActivationEffects)
def activation_figure(effects: ActivationEffects, prompt: int | None = None) -> go.Figure:
    """Draw hook point × position if each was patched alone; else layer × hook point, or bars."""
    values, total = effects.of_prompt(prompt)
    shift = float(total)
    place = ""
    if effects.positions not in ("all", "each"):
        place = f", positions {effects.positions}"
    titles = (
        f"{effects.readout}: {_DIRECTIONS[effects.direction]}",
        f"activation patching{place} · {whose(prompt, effects.str_tokens)}",
    )

    def hover(name: str, value: float | None) -> str:
        said = "no such position"
        if value is not None and not math.isnan(value):
            said = value_text(value, shift, effects.units)
        return f"<b>{label(name)}</b><br>{said}"

    if effects.by_position:
        index = effects.only_prompt(prompt)
        return _points_by_position(effects, titles, values.tolist(), index, hover)
    layers = {layer for layer, _ in effects.places}
    if len(layers) == 1:
        texts = [hover(n, v) for n, v in zip(effects.names, values.tolist(), strict=True)]
        return figures.bars(titles, effects.names, values.tolist(), texts, effects.units)
    return _points_by_layer(effects, titles, values.tolist(), hover)


_PointHover = Callable[[str, float | None], str]


def _points_by_position(
    effects: ActivationEffects,
    titles: figures.Pair,
    values: Sequence[Sequence[float]],
    prompt: int,
    hover: _PointHover,
) -> go.Figure:
    """Draw hook point × position of one prompt."""
    tokens = effects.str_tokens[prompt]
    order = layer_order(effects.names)
    x = figures.tokens_axis(tokens)
    y = names_axis(effects.names[i] for i in order)
    cells = [values[i][: len(tokens)] for i in order]

    def cell_hover(i: int, t: int, value: float | None) -> str:
        return hover(f"{y.values[i]}, position {t} {visible(tokens[t])}", value)

    return heatmap(titles, cells, cell_hover, x, y, effects.units)


def _points_by_layer(
    effects: ActivationEffects,
    titles: figures.Pair,
    values: Sequence[float],
    hover: _PointHover,
) -> go.Figure:
    """Draw layer × hook point; points outside the blocks have a row of their own, below."""
    outside = -1
    places: list[tuple[int, str]] = []
    for layer, kind in effects.places:
        row = outside if layer is None else layer
        places.append((row, kind))
    layers = sorted({layer for layer, _ in places})
    kinds = list(dict.fromkeys(kind for _, kind in places))
    value_at = dict(zip(places, values, strict=True))
    name_at = dict(zip(places, effects.names, strict=True))
    cells: list[list[float | None]] = []
    rows: list[str | int] = []
    for layer in layers:
        cells.append([value_at.get((layer, kind)) for kind in kinds])
        rows.append("outside" if layer == outside else layer)
    x = names_axis(kinds)
    y = names_axis(rows, "layer")

    def cell_hover(i: int, j: int, value: float | None) -> str:
        return hover(name_at.get((layers[i], kinds[j]), ""), value)

    return heatmap(titles, cells, cell_hover, x, y, effects.units)
