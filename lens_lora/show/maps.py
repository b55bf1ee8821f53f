"""Results as heatmaps and bars: over sites, groups, tokens, hook points, features and layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pandas as pd

from lens_lora import results
from lens_lora.arguments import whole, word
from lens_lora.core import only_prompt
from lens_lora.core.model.sites import layer_order
from lens_lora.core.results import drawing
from lens_lora.core.results.attribution import MOST_POSITIONS, Axis, Shown
from lens_lora.errors import ArgumentError
from lens_lora.show import figures, go, text
from lens_lora.show.figures import heatmap, names_axis, value_text, whose
from lens_lora.show.text import label, magnitude, signed, visible

# --- An attribution: layer × kind of module, layer × token, site × head or rank

_MOST_ROWS = 40


@drawing.figure.register(results.Attribution)
def attribution_figure(
    attribution: results.Attribution, prompt: int | None = None, by: Shown | None = None
) -> go.Figure:
    """The picture of one axis: by default the first along which some site has a part.

    Of an attribution that was not split, or with by='site', layer × kind of module.
    """
    shown: Shown
    if by is None:
        axes: list[Axis] = [axis for axis in attribution.by if _has_parts(attribution, axis)]
        shown = axes[0] if axes else "site"
    else:
        word("by", by, get_args(Shown))
        shown = by
    if shown == "site":
        return site_heatmap(attribution, prompt)
    if shown == "position":
        return position_heatmap(attribution, prompt)
    if shown == "token":
        return _layers_by_token(attribution, prompt, "token")
    return _parts_heatmap(attribution, prompt, shown)


def site_heatmap(attribution: results.Attribution, prompt: int | None = None) -> go.Figure:
    """Layer × kind of module, each site summed over whatever it was split by."""
    _, site_values, shift, _ = attribution.entries(prompt)
    values, units = site_values.tolist(), attribution.units
    says = [value_text(value, float(shift), units) for value in values]
    if prompt is None and len(attribution.base) > 1:
        spread = attribution.per_site.cpu().double().std(0).tolist()
        pairs = zip(says, spread, strict=True)
        says = [f"{said}<br>± {magnitude(deviation)} over prompts" for said, deviation in pairs]
    below = f"by layer and kind of module{_summed(attribution)}"
    titles = _titles(attribution, below, prompt)
    return figures.kinds_by_layer(titles, attribution.sites, values, says, units)


def _summed(attribution: results.Attribution, *shown: Axis) -> str:
    """', summed over heads and ranks', to follow what a picture shows; '' where nothing is."""
    others = [f"{axis}s" for axis in attribution.by if axis not in shown]
    return f", summed over {' and '.join(others)}" if others else ""


@drawing.positions.register(results.Attribution)
def position_heatmap(
    attribution: results.Attribution, prompt: int | None = None, most: int | None = MOST_POSITIONS
) -> go.Figure:
    """Layer × token position of one prompt, summed over the layer's sites."""
    require_positions(attribution)
    return _layers_by_token(attribution, prompt, "position", most)


def _layers_by_token(
    attribution: results.Attribution, prompt: int | None, axis: Axis, most: int | None = None
) -> go.Figure:
    """By position, or by token of the response."""
    what = "positions" if axis == "position" else "tokens of responses"
    index = only_prompt(prompt, len(attribution.base), what)
    y, units, first = figures.layers_axis(attribution.sites), attribution.units, 0
    tokens, below = attribution.str_tokens[index], "by layer and position"
    if axis == "token":
        tokens, below, first = attribution.response[index], "by layer and token of the response", 1
    below += _summed(attribution, axis)
    shift = float(attribution.shift[index])
    values, layers = attribution.along(axis, index)[0], [site.layer for site in attribution.sites]
    by_site: Any = pd.DataFrame(values[:, : len(tokens)].numpy(), index=layers)
    sums = by_site.groupby(level=0).sum().reindex(y.values)
    count = len(tokens) if most is None else whole("most", most, 1)
    shown: list[int] = sorted(sums.abs().max().nlargest(count).index.tolist())
    if len(shown) < len(tokens):
        below += f", the {len(shown)} of {len(tokens)} of largest |value| in a layer"

    def says(i: int, j: int, value: float | None) -> str:
        where = f"<b>layer {y.values[i]}, {axis} {shown[j] + first}</b>"
        return f"{where}: {label(visible(tokens[shown[j]]))}<br>{value_text(value, shift, units)}"

    titles, x = _titles(attribution, below, index), figures.tokens_axis(tokens, shown, first=first)
    return heatmap(titles, sums[shown].to_numpy().tolist(), says, x, y, units)


def _parts_heatmap(attribution: results.Attribution, prompt: int | None, axis: Axis) -> go.Figure:
    """Site × head, expert or rank, of the sites with the largest part."""
    parts, exists = _parts(attribution, prompt, axis)
    _, shift = attribution.mean_over(prompt, attribution.base)
    having = int(exists.any(1).sum())
    if not having:
        raise ArgumentError(
            f"by={axis!r}: no site of this attribution has {axis}s. "
            "plot(by='site') draws the sites."
        )
    sizes = parts.abs().masked_fill(~exists, -1.0).amax(1)
    chosen = sorted(sizes.argsort(descending=True)[: min(_MOST_ROWS, having)].tolist())
    below = f"by site and {axis}"
    if axis == "rank":
        below += " of the SVD of ΔW" if attribution.gauge == "svd" else " as trained"
    below += _summed(attribution, axis)
    if len(chosen) < having:
        below += f", the {len(chosen)} of {having} sites with the largest part"
    z = parts.masked_fill(~exists, math.nan)[chosen].tolist()
    x, units = names_axis(range(parts.shape[1]), axis), attribution.units
    y = names_axis(attribution.sites[i].name for i in chosen)

    def says(i: int, part: int, value: float | None) -> str:
        return f"<b>{y.values[i]}</b>, {axis} {part}<br>{value_text(value, float(shift), units)}"

    return heatmap(_titles(attribution, below, prompt), z, says, x, y, units)


def _parts(attribution: results.Attribution, prompt: int | None, axis: Axis) -> tuple[Any, Any]:
    """The values along an axis, and which exist: two [site, part].

    The last slot by head and by expert, which is of sites that have none, is left out.
    """
    parts, exists = attribution.along(axis, prompt)
    if axis in ("head", "expert"):
        return parts[:, :-1], exists[:, :-1]
    return parts, exists


def _has_parts(attribution: results.Attribution, axis: Axis) -> bool:
    """Whether some site has a part along the axis: an adapter of MLPs alone has no heads."""
    _, exists = _parts(attribution, None, axis)
    return bool(exists.any())


def require_positions(attribution: results.Attribution) -> None:
    """Refuse an attribution without positions."""
    if "position" not in attribution.by:
        split = f"the attribution is split by {attribution.by or 'nothing'}, not by position"
        raise ArgumentError(f'{split}; compute it with first_order(..., by="position").')


def _titles(result: Any, below: str, prompt: int | None) -> figures.Pair:
    heading = f"{result.readout}, {text.key_text(result.key)}"
    return heading, f"{below} · {whose(prompt, result.str_tokens)}"


# --- Sites one by one: effects, sets of sites, constant parts


@drawing.figure.register(results.Effects)
def effects_figure(effects: results.Effects, prompt: int | None = None) -> go.Figure:
    """Layer × kind of module for single sites, a bar for each group of several."""
    if effects.of == "site" and all(len(members) == 1 for members in effects.groups.values()):
        return site_heatmap(effects.attribution(), prompt)
    _, group_values, shift, _ = effects.entries(prompt)
    return _bars_of_groups(effects, group_values.tolist(), float(shift), prompt)


def _bars_of_groups(
    result: results.Effects | results.GroupAttribution,
    values: Sequence[float],
    shift: float,
    prompt: int | None,
) -> go.Figure:
    """A bar for each group of sites."""
    units = result.units
    hover = [
        f"<b>{label(name)}</b><br>{value_text(value, shift, units)}<br>sites: {len(members)}"
        for (name, members), value in zip(result.groups.items(), values, strict=True)
    ]
    titles = _titles(result, f"of a shift of {signed(shift)} {units}", prompt)
    return figures.bars(titles, result.groups, values, hover, units)


# --- Groups × tokens of a response, prompts × layers, groups × groups


@drawing.figure.register(results.GroupAttribution)
def grouped_figure(grouped: results.GroupAttribution, prompt: int | None = None) -> go.Figure:
    """A bar for each group; by token what each group contributes to each token of one response."""
    if not grouped.by:
        _, group_values, shift, _ = grouped.entries(prompt)
        return _bars_of_groups(grouped, group_values.tolist(), float(shift), prompt)
    index = only_prompt(prompt, len(grouped.base), "tokens")
    tokens, shift, units = grouped.response[index], float(grouped.shift[index]), grouped.units
    total = signed(float(grouped.per_group[index].sum()))
    heading = f"{grouped.readout} by token, first order at ε = {grouped.at:g}"
    below = f"{total} over all groups, the shift is {signed(shift)} {units}"
    titles = heading, f"{below} · {whose(index, grouped.str_tokens)}"
    rows = grouped.values[index, :, : len(tokens)].double().tolist()

    def says(name: str, value: float) -> str:
        return f"<b>{label(name)}</b>: {value_text(value, shift, units)}"

    return groups_by_token(titles, list(grouped.groups), tokens, rows, units, says)


_Says = Callable[[str, float], str]
_Rows = figures.Cells


def groups_by_token(
    titles: figures.Pair, names: Sequence[str], response: Any, rows: _Rows, units: str, says: _Says
) -> go.Figure:
    """A row for each group, a column for each token."""
    is_layers = all(name.startswith("layer ") for name in names)
    y = names_axis((n.removeprefix("layer ") for n in names), "layer" if is_layers else "")
    shown = figures.every_few(range(len(names)), 15) if is_layers else range(len(names))
    y = y._replace(layout={**y.layout, **figures.ticks(shown, (y.values[i] for i in shown))})
    x = figures.tokens_axis(response, title="token of the response", first=1)

    def cell_text(i: int, t: int, value: float | None) -> str:
        return f"{says(names[i], value or 0.0)}<br>{t + 1} {label(visible(response[t]))}"

    return heatmap(titles, rows, cell_text, x, y, units, row_height=12)


# --- Hook points and features

_DIRECTIONS = {
    "base_to_adapted": "base activations into the adapted model",
    "adapted_to_base": "adapted activations into the base model",
}


@drawing.figure.register(results.ActivationEffects)
def activation_figure(effects: results.ActivationEffects, prompt: int | None = None) -> go.Figure:
    """Hook point × position where each was patched alone; else layer × hook point, or bars."""
    values, total = effects.of_prompt(prompt)
    rows, shift, units = values.tolist(), float(total), effects.units
    place = "" if effects.positions in ("all", "each") else f", positions {effects.positions}"
    below = f"activation patching{place} · {whose(prompt, effects.str_tokens)}"
    titles = f"{effects.readout}: {_DIRECTIONS[effects.direction]}", below

    def says(name: str, value: float | None) -> str:
        is_there = value is not None and not math.isnan(value)
        said = value_text(value, shift, units) if is_there else "no such position"
        return f"<b>{label(name)}</b><br>{said}"

    if effects.by_position:
        tokens = effects.str_tokens[only_prompt(prompt, len(effects.base))]
        order = layer_order(effects.names)
        x, y = figures.tokens_axis(tokens), names_axis(effects.names[i] for i in order)
        z = [rows[i][: len(tokens)] for i in order]

        def said(i: int, t: int, value: float | None) -> str:
            return says(f"{y.values[i]}, position {t} {visible(tokens[t])}", value)

        return heatmap(titles, z, said, x, y, units)
    if len({layer for layer, _ in effects.places}) == 1:
        hover = [says(name, value) for name, value in zip(effects.names, rows, strict=True)]
        return figures.bars(titles, effects.names, rows, hover, units)
    # Points outside the blocks have a row of their own, below.
    places = [(-1 if layer is None else layer, kind) for layer, kind in effects.places]
    layers = sorted({layer for layer, _ in places})
    kinds = list(dict.fromkeys(kind for _, kind in places))
    held = dict(zip(places, zip(effects.names, rows, strict=True), strict=True))
    cells = [[held.get((layer, kind), ("", None)) for kind in kinds] for layer in layers]
    z = [[value for _, value in row] for row in cells]
    x = names_axis(kinds)
    y = names_axis(("outside" if layer < 0 else layer for layer in layers), "layer")
    return heatmap(titles, z, lambda i, j, value: says(cells[i][j][0], value), x, y, units)


# --- Directions
