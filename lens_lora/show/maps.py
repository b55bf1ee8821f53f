"""Results as heatmaps and bars: over sites, groups, tokens, hook points, features and layers."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pandas as pd

from lens_lora import results
from lens_lora.arguments import whole, word
from lens_lora.core import asked_of, only_prompt, prompt_rows
from lens_lora.core.model.sites import layer_order
from lens_lora.core.results import drawing
from lens_lora.core.results.attribution import MOST_POSITIONS, Axis, Shown
from lens_lora.errors import ArgumentError, many
from lens_lora.show import figures, go, text, words
from lens_lora.show.figures import heatmap, names_axis, value_text, whose
from lens_lora.show.spread import GAUGES, directions_text, spread_figure
from lens_lora.show.text import label, magnitude, percent, short_prompt, signed, visible

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


def members_figure(subset: results.BestSubset, row: int) -> go.Figure:
    """Which sites, or heads, are in one of the best sets."""
    members, kept = subset.members[row].tolist(), percent(float(subset.kept[row]))
    heading = f"{subset.counts[row]} of {len(subset.names)} {subset.over} keep {kept} of the shift"
    if subset.held_out:
        heading += f", held out {percent(float(subset.kept_held_out[row]))}"
    below = f"the best set found, {subset.readout} · {whose(None, subset.str_tokens)}"
    says = ["in the set" if is_member else "not in the set" for is_member in members]
    values = list(map(float, members))
    places = subset.sites if subset.over == "sites" else list(map(_of_head, subset.names))
    figure = figures.kinds_by_layer((heading, below), places, values, says, "", "amount", reach=1.0)
    return figure.update_traces(showscale=False)


def _of_head(name: str) -> types.SimpleNamespace:
    """'blocks.3.attn.hook_z[5]' as if it were a site."""
    _, layer, rest = name.split(".", 2)
    return types.SimpleNamespace(name=name, module="z of one head", layer=int(layer), kind=rest)


@drawing.figure.register(results.ConstantPart)
def constant_part_figure(constant: results.ConstantPart) -> go.Figure:
    """How constant each site's δ is, layer × kind of module."""
    kept = f"the constants alone keep {words.kept_by_constants(constant)}"
    below = f"held-out texts, first tokens left out; {kept}"
    titles, units = ("How much of each module's δ is one vector", below), "constant share"
    shares, sizes = constant.share.tolist(), map(magnitude, constant.size.tolist())
    pairs = zip(map(percent, shares), sizes, strict=True)
    says = [f"{share} constant<br>‖δ‖ {size}" for share, size in pairs]
    return figures.kinds_by_layer(titles, constant.sites, shares, says, units, "signed", reach=1.0)


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


_MOST_NAMES, _MOST_LAYERS = 40, 16
_CUT = 0.995
_GREY = "grey: not downstream"


@drawing.figure.register(results.Coupling)
def coupling_heatmap(coupling: results.Coupling, prompt: int | None = None) -> go.Figure:
    """½H: self-curvature on the diagonal, half of each pair's coupling off it.

    In a large matrix colours are cut at the 99.5th percentile of the sizes, so that a few strong
    pairs do not leave the rest blank; the hover gives every value.
    """
    half = coupling.matrix[prompt_rows(prompt, len(coupling.matrix))].cpu().double().mean(0) / 2
    axis = names_axis(coupling.groups, **_group_ticks(coupling))
    heading = f"{coupling.readout}, ½H at ε = {coupling.at:g}"
    below = "diagonal: self-curvature; off it: half of each pair's coupling"
    titles, units = (heading, f"{below} · {whose(prompt, coupling.str_tokens)}"), coupling.units
    says = f"<b>%{{y}} × %{{x}}</b><br>½H = %{{z:.3g}} {label(units)}<extra></extra>"
    figure = heatmap(titles, half.tolist(), says, axis, axis, units, "signed", **_cut(half))
    figure.update_layout(height=680, yaxis={"scaleanchor": "x", "constrain": "domain"})
    return figure.update_traces(xgap=0, ygap=0)


def _cut(values: Any) -> dict[str, Any]:
    """Where a heatmap's colours end, and the note that says so."""
    sizes = values.abs().flatten()
    is_cut = max(values.shape) > _MOST_NAMES and bool(sizes.quantile(_CUT) > 0)
    reach = float(sizes.quantile(_CUT) if is_cut else sizes.max())
    return {"reach": reach, "note": f"cut at {reach:.2g}" if is_cut else ""}


@drawing.figure.register(results.Edges)
def edges_heatmap(edges: results.Edges, prompt: int | None = None) -> go.Figure:
    """Writer × reader in the order of a forward pass, so that what exists is a triangle."""
    values, _ = edges.mean_over(prompt, edges.per_edge)
    firsts = dict[str, str]()  # the first reader of each block
    for name in edges.readers:
        firsts.setdefault(name if name.count(".") < 2 else name.split(".")[1], name)
    layers = figures.every_few(list(firsts.items()), _MOST_LAYERS)
    x = names_axis(edges.readers, "layer of the reader")
    x = x._replace(layout={**x.layout, **figures.ticks((name for _, name in layers), dict(layers))})
    y = names_axis(edges.groups, "writer", **_group_ticks(edges))
    titles = _titles(edges, f"what each reader makes of each write · {_GREY}", prompt)
    says = f"<b>%{{y}} → %{{x}}</b><br>%{{z:+.3g}} {label(edges.units)}<extra></extra>"
    cells, height = values.masked_fill(~edges.exists, math.nan).tolist(), 600 // len(values)
    return heatmap(titles, cells, says, x, y, edges.units, row_height=height, **_cut(values))


def _group_ticks(coupling: results.Coupling | results.Edges) -> dict[str, Any]:
    """Every group by name; where they are many, the first of every few layers."""
    if len(coupling.groups) <= _MOST_NAMES:
        names = list(map(label, coupling.groups))
        return figures.ticks(names, names)
    first: dict[int, str] = {}
    for name, members in coupling.groups.items():
        first.setdefault(coupling.sites[members[0]].layer, label(name))
    shown = figures.every_few(sorted(first.items()), _MOST_LAYERS)
    texts = (f"layer {layer}" if layer >= 0 else "embed" for layer, _ in shown)
    return figures.ticks((name for _, name in shown), texts)


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


@drawing.figure.register(results.ActivationShift)
def activation_shift_figure(shift: results.ActivationShift, prompt: int) -> go.Figure:
    """‖Δh‖/‖h(0)‖ of each hook point over the tokens of one text; sinks are blank.

    So are tokens that were not asked for.
    """
    tokens = shift.str_tokens[prompt]
    names = [shift.names[i] for i in layer_order(shift.names)]
    sizes = [shift.values[n][prompt].norm(dim=-1) / shift.base_norms[n][prompt] for n in names]
    clear = [s.masked_fill(shift.sinks[prompt].to(s.device), math.nan) for s in sizes]
    z = [size[: len(tokens)].tolist() for size in clear]
    x, y = figures.tokens_axis(tokens), names_axis(names)

    def says(i: int, t: int, _: object) -> str:
        token = label(visible(tokens[t]))
        return f"{y.values[i]}<br>{t} {token}<br>{percent(float(sizes[i][t]))} of ‖h(0)‖"

    heading = f"Shift of activations over “{short_prompt(tokens)}”"
    below = f"‖Δh‖/‖h(0)‖ at {shift.at}; sinks are grey"
    return heatmap((heading, below), z, says, x, y, "‖Δh‖/‖h‖", "amount")


@drawing.figure.register(results.FeatureWrites)
def writes_figure(
    writes: results.FeatureWrites, k: int = 20, prompt: int | None = None
) -> go.Figure:
    """Site × feature, of the k features that some site writes most."""
    values = writes.of_prompt(prompt)
    chosen = values.abs().amax(0).topk(min(k, values.shape[1])).indices.tolist()
    x, y = (names_axis(chosen, "feature"), names_axis(site.name for site in writes.sites))

    def says(i: int, j: int, value: float) -> str:
        return f"<b>{y.values[i]}</b>, feature {chosen[j]}<br>{signed(value)} {label(writes.units)}"

    below = f"what it writes by itself, {text.position_text(writes.positions)}"
    below += f", to {writes.name}" if writes.name else ""
    titles = ("δz of each site onto features", f"{below} · {whose(prompt, writes.str_tokens)}")
    return heatmap(titles, values[:, chosen].tolist(), says, x, y, writes.units, "signed")


@drawing.figure.register(results.FeatureShift)
def feature_figure(
    shift: results.FeatureShift, k: int = 20, prompt: int | None = None
) -> go.Figure:
    """Bars of the exact shift with its first order; by position, feature × position.

    Position 0 sees no other token, and its activations are often hundreds of times those after it:
    where there are others, features and colours are chosen by them, and the title says so.
    """
    prompt_rows(prompt, len(shift.base))
    place = "by position" if shift.positions == "each" else text.position_text(shift.positions)
    if shift.by_position and shift.base.shape[2] > 1:
        place += "; features and colours chosen without position 0"
    below = f"pushed by the adapter, {place} · {whose(prompt, shift.str_tokens)}"
    titles = f"features at {shift.name}", below
    if shift.by_position:
        return _features_by_position(titles, shift, k, prompt)
    top, units = shift.top(k, prompt), label(shift.units)
    names = [f"feature {feature}" for feature in top["feature"]]
    hover = f"<b>%{{y}}</b><br>%{{x:.4g}} {units}"
    figure = figures.bars(titles, names, top["shift"].tolist(), [], f"shift, {shift.units}")
    figure.update_traces(name="exact", hovertemplate=f"{hover}, exact<extra></extra>")
    line = f"{hover}, first order<extra></extra>"
    look = {"color": figures.LINEAR, "symbol": "diamond", "size": 8}
    name = f"first order at ε = {shift.at:g}"
    return figure.add_trace(figures.points(top["first_order"].tolist(), names, line, name, **look))


def _features_by_position(
    titles: figures.Pair, shift: Any, k: int, prompt: int | None
) -> go.Figure:
    values, units = shift.of_prompt(prompt)["shift"], shift.units
    tokens = shift.str_tokens[only_prompt(prompt, len(shift.base))]
    chosen_by = values[:, min(1, len(tokens) - 1) : len(tokens)].abs().nan_to_num(0.0).amax(1)
    top = chosen_by.topk(min(k, len(chosen_by)))
    chosen = top.indices.tolist()[::-1]
    x, y = (figures.tokens_axis(tokens), names_axis(f"feature {feature}" for feature in chosen))
    z, reach = values[chosen, : len(tokens)].tolist(), float(top.values[0])

    def says(i: int, t: int, value: float) -> str:
        where = f"<b>{y.values[i]}</b>, position {t} {label(visible(tokens[t]))}"
        return f"{where}<br>{signed(value)} {label(units)}"

    return heatmap(titles, z, says, x, y, units, "signed", reach=reach)


@drawing.figure.register(results.Activations)
def activations_figure(
    activations: results.Activations, site: str | None = None, prompt: int | None = None
) -> go.Figure:
    """Every rank of the sites that are named, or the first rank of each; sinks are grey.

    Of many directions the 40 of largest |u| are shown, and the title says so.
    """
    count = len(activations.str_tokens)
    if prompt is None and count > 1:
        return spread_figure(activations.spread(site), f"{count} prompts", site, activations.gauge)
    index = only_prompt(prompt, count, "activations")
    tokens = activations.str_tokens[index]
    is_sink = activations.sinks[index, : len(tokens)].cpu()
    values = activations.values[index, :, : len(tokens)].cpu().double()
    clear, every = values.masked_fill(is_sink[:, None], math.nan), activations.directions(site)
    sizes = clear.nan_to_num().abs().amax(1)
    kept = set(sorted(every, key=lambda row: float(sizes[row]), reverse=True)[:_MOST_ROWS])
    rows = [row for row in every if row in kept]
    z = [clear[s, :, r].tolist() for s, r in rows]
    names = [(activations.sites[s].name, r) for s, r in rows]
    y = names_axis((f"{n} {r}" for n, r in names), autorange="reversed" if site else None)

    def says(i: int, t: int, _: object) -> str:
        (name, rank), value = names[i], signed(float(values[rows[i][0], t, rows[i][1]]))
        value += " (a sink)" if is_sink[t] else ""
        return f"{name} rank {rank}<br>{t} {label(visible(tokens[t]))}<br>{value}"

    shown = directions_text(site, len(rows), len(every))
    heading = f"Activations over “{short_prompt(tokens)}”"
    if len(asked_of(tokens)) < len(tokens):
        heading += " and what is said after it"
    below = f"{shown}; sinks are grey; z read at {activations.at}"
    units = GAUGES[activations.gauge]
    return heatmap((heading, below), z, says, figures.tokens_axis(tokens), y, units, "signed")


# --- Directions


@drawing.figure.register(results.Contrast)
def contrast_figure(contrast: results.Contrast) -> go.Figure:
    """Held-out AUC and the direction's size by hook point, beside what chance gives."""
    names = [contrast.names[i] for i in layer_order(contrast.names)]
    share = dict(contrast.to_frame()[["name", "share"]].values.tolist())
    lines = {
        "held-out AUC": (contrast.auc, figures.EXACT, "solid"),
        "95 % of shuffled labels": (contrast.chance, figures.INK, "dot"),
        "‖μ₊ − μ₋‖ / ‖h‖": (share, figures.NEGATIVE, "solid"),
    }
    figure, places = go.Figure(), list(map(float, range(len(names))))
    for name, (values, colour, dash) in lines.items():
        numbers, marker = [values[point] for point in names], {"size": 6}
        pairs = zip(names, numbers, strict=True)
        hover = [f"<b>{point}</b><br>{label(name)}: {value:.3f}" for point, value in pairs]
        drawn = places, numbers, name, colour, hover
        figure.add_trace(figures.curve(*drawn, dash=dash, marker=marker))
    positive, negative = contrast.counts
    titles = "Contrast of two sets of texts", f"{positive} against {negative}; AUC ½ is chance"
    x = figures.ticks(places, names)
    return figures.finish(figure, titles, ("hook point", ""), 420, xaxis=x)


@drawing.figure.register(results.Alignment)
def alignment_figure(alignment: results.Alignment, index: int) -> go.Figure:
    """Layer × kind of module, of one direction."""
    values, limits = alignment.values[:, index].tolist(), alignment.quantile.tolist()
    says = [
        f"{side}s {percent(value)} of ‖ΔW‖ along it<br>99 % of random directions: below {limit:.3f}"
        for side, value, limit in zip(alignment.sides, values, limits, strict=True)
    ]
    random = f"random directions: {alignment.expected:.3f}"
    below = f"what each writes or reads along it, of ‖ΔW‖; {random}"
    titles = f"ΔW along {alignment.directions[index]!r}", below
    return figures.kinds_by_layer(titles, alignment.sites, values, says, "‖vᵀΔW‖/‖ΔW‖", "amount")


@drawing.figure.register(results.Intruders)
def intruders_figure(intruders: results.Intruders, index: int | None = None) -> go.Figure:
    """How many intruders each site has, layer × kind; or the overlaps of one site."""
    k = intruders.sigma.shape[1]
    if index is not None:
        x, y = (names_axis(range(k), title) for title in ("direction of W", "of W + ΔW"))
        says = "W + ΔW %{y}, W %{x}<br>|cosine| %{z:.3f}<extra></extra>"
        cells = intruders.overlap[index].tolist()
        titles = intruders.sites[index].name, f"the leading {k} directions of W and of W + ΔW"
        return heatmap(titles, cells, says, x, y, "|cosine|", "amount", reach=1.0)
    counts = intruders.counts.tolist()
    below = f"largest |cosine| with W below {intruders.threshold:g}"
    says = [f"{count} of {k} leading directions: {below}" for count in counts]
    intruding = many(sum(counts), "intruder")
    titles = f"{intruding} among the leading {k} directions of each site", below
    return figures.kinds_by_layer(titles, intruders.sites, counts, says, "directions", "amount")
