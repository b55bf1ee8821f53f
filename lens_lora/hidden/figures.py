"""Figures of results inside the model: activations, their shifts, features, constant parts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lens_lora.arguments import whole
from lens_lora.core import PromptTokens, drawing, layer_order
from lens_lora.hidden.activation_shift import ActivationShift
from lens_lora.hidden.activations import Activations
from lens_lora.hidden.constant_part import ConstantPart
from lens_lora.hidden.feature_writes import FeatureWrites
from lens_lora.hidden.features import FeatureShift
from lens_lora.hidden.words import kept_by_constants
from lens_lora.show import figures, go, text
from lens_lora.show.figures import heatmap, names_axis, whose
from lens_lora.show.spread import GAUGES, directions_text, spread_figure
from lens_lora.show.text import label, magnitude, percent, short_prompt, signed, visible

# A reader can tell apart this many directions in one heatmap.
_MOST_DIRECTIONS = 40


@drawing.figure.register(Activations)
def activations_figure(
    activations: Activations, site: str | None = None, prompt: int | None = None
) -> go.Figure:
    """A heatmap of every rank of the named sites, or of the first rank of each; sinks are grey.

    If there are more than 40 directions, those of largest |u| are shown, and the title says so.
    """
    count = len(activations.str_tokens)
    if prompt is None and count > 1:
        return spread_figure(activations.spread(site), f"{count} prompts", site, activations.gauge)
    index = activations.only_prompt(prompt, "activations")
    tokens = activations.str_tokens[index]
    is_sink = activations.sinks[index, : len(tokens)].cpu()
    values = activations.values[index, :, : len(tokens)].cpu().double()
    without_sinks = values.masked_fill(is_sink[:, None], math.nan)
    directions = activations.directions(site)
    largest = _largest_directions(without_sinks, directions)
    cells: list[list[float]] = []
    names: list[str] = []
    for site_index, rank in largest:
        cells.append(without_sinks[site_index, :, rank].tolist())
        names.append(f"{activations.sites[site_index].name} {rank}")

    def says(row: int, token: int, _: object) -> str:
        site_index, rank = largest[row]
        name = activations.sites[site_index].name
        value = signed(float(values[site_index, token, rank]))
        if is_sink[token]:
            value += " (a sink)"
        return f"{name} rank {rank}<br>{token} {label(visible(tokens[token]))}<br>{value}"

    heading = f"Activations over “{short_prompt(tokens)}”"
    if len(PromptTokens.of(tokens).asked) < len(tokens):
        heading += " and its response"
    described = directions_text(site, len(largest), len(directions))
    below = f"{described}; sinks are grey; z read at {activations.at}"
    x = figures.tokens_axis(tokens)
    # The directions of one site are ordered from the top.
    autorange = "reversed" if site else None
    y = names_axis(names, autorange=autorange)
    return heatmap((heading, below), cells, says, x, y, GAUGES[activations.gauge], "signed")


def _largest_directions(
    values: Tensor, directions: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The directions of largest |u| at any token, in the order in which they came."""
    sizes = values.nan_to_num().abs().amax(1)
    ranked = sorted(directions, key=lambda direction: float(sizes[direction]), reverse=True)
    largest = set(ranked[:_MOST_DIRECTIONS])
    return [direction for direction in directions if direction in largest]


@drawing.figure.register(ActivationShift)
def activation_shift_figure(shift: ActivationShift, prompt: int) -> go.Figure:
    """‖Δh‖/‖h(0)‖ of each hook point over the tokens of one text.

    Sinks are grey, and so are tokens at other positions than the chosen ones.
    """
    tokens = shift.str_tokens[prompt]
    names = [shift.names[i] for i in layer_order(shift.names)]
    sizes: list[Tensor] = []
    cells: list[list[float]] = []
    for name in names:
        size = shift.values[name][prompt].norm(dim=-1) / shift.base_norms[name][prompt]
        without_sinks = size.masked_fill(shift.sinks[prompt].to(size.device), math.nan)
        sizes.append(size)
        cells.append(without_sinks[: len(tokens)].tolist())

    def says(row: int, token: int, _: object) -> str:
        share = percent(float(sizes[row][token]))
        return f"{names[row]}<br>{token} {label(visible(tokens[token]))}<br>{share} of ‖h(0)‖"

    heading = f"Shift of activations over “{short_prompt(tokens)}”"
    below = f"‖Δh‖/‖h(0)‖ at {shift.at}; sinks are grey"
    x = figures.tokens_axis(tokens)
    return heatmap((heading, below), cells, says, x, names_axis(names), "‖Δh‖/‖h‖", "amount")


@drawing.figure.register(ConstantPart)
def constant_part_figure(constant: ConstantPart) -> go.Figure:
    """A heatmap of the constant share of each site's δ, layer × kind of module."""
    kept = f"the constants alone keep {kept_by_constants(constant)}"
    below = f"held-out texts, first tokens left out; {kept}"
    titles = "How much of each module's δ is one vector", below
    shares = constant.share.tolist()
    says: list[str] = []
    for share, size in zip(shares, constant.size.tolist(), strict=True):
        says.append(f"{percent(share)} constant<br>‖δ‖ {magnitude(size)}")
    return figures.kinds_by_layer(
        titles, constant.sites, shares, says, "constant share", "signed", reach=1.0
    )


@drawing.figure.register(FeatureWrites)
def writes_figure(writes: FeatureWrites, k: int = 20, prompt: int | None = None) -> go.Figure:
    """Site × feature, of the k features that some site writes most."""
    values = writes.of_prompt(prompt)
    count = min(whole("k", k, 1), values.shape[1])
    most_written = values.abs().amax(0).topk(count)
    chosen = most_written.indices.tolist()
    x = names_axis(chosen, "feature")
    y = names_axis(site.name for site in writes.sites)

    def says(row: int, column: int, value: float) -> str:
        heading = f"<b>{y.values[row]}</b>, feature {chosen[column]}"
        return f"{heading}<br>{signed(value)} {label(writes.units)}"

    below = f"what it writes by itself, {text.position_text(writes.positions)}"
    if writes.name:
        below += f", to {writes.name}"
    titles = "δz of each site onto features", f"{below} · {whose(prompt, writes.str_tokens)}"
    return heatmap(titles, values[:, chosen].tolist(), says, x, y, writes.units, "signed")


@drawing.figure.register(FeatureShift)
def feature_figure(shift: FeatureShift, k: int = 20, prompt: int | None = None) -> go.Figure:
    """Bars of the exact shift with its first order; by position, feature × position.

    Position 0 attends to no other token, and its activations are often hundreds of times larger.
    So features and colours are chosen by the other positions, if there are any, and the title says
    so.
    """
    # An index of no prompt is refused here, before it is named in the heading.
    shift.prompt_rows(prompt)
    heading = f"features at {shift.name}"
    whose_prompt = whose(prompt, shift.str_tokens)
    if not shift.by_position:
        place = text.position_text(shift.positions)
        below = f"pushed by the adapter, {place} · {whose_prompt}"
        return _bars_of_features((heading, below), shift, k, prompt)
    place = "by position"
    if shift.base.shape[2] > 1:
        place += "; features and colours chosen without position 0"
    below = f"pushed by the adapter, {place} · {whose_prompt}"
    return _features_by_position((heading, below), shift, k, prompt)


def _bars_of_features(
    titles: figures.Pair, shift: FeatureShift, k: int, prompt: int | None
) -> go.Figure:
    """A bar for the exact shift of each feature, and a diamond for its first order."""
    top = shift.top(k, prompt)
    names = [f"feature {feature}" for feature in top["feature"]]
    hover = f"<b>%{{y}}</b><br>%{{x:.4g}} {label(shift.units)}"
    figure = figures.bars(titles, names, top["shift"].tolist(), [], f"shift, {shift.units}")
    figure.update_traces(name="exact", hovertemplate=f"{hover}, exact<extra></extra>")
    diamonds = figures.points(
        top["first_order"].tolist(),
        names,
        f"{hover}, first order<extra></extra>",
        f"first order at ε = {shift.at:g}",
        color=figures.LINEAR,
        symbol="diamond",
        size=8,
    )
    return figure.add_trace(diamonds)


def _features_by_position(
    titles: figures.Pair, shift: FeatureShift, k: int, prompt: int | None
) -> go.Figure:
    """Feature × position of the k features of largest shift after position 0."""
    values = shift.of_prompt(prompt)["shift"]
    tokens = shift.str_tokens[shift.only_prompt(prompt)]
    # A prompt of one token has no other position to choose by.
    first = min(1, len(tokens) - 1)
    sizes = values[:, first : len(tokens)].abs().nan_to_num(0.0).amax(1)
    top = sizes.topk(min(whole("k", k, 1), len(sizes)))
    chosen = top.indices.tolist()[::-1]
    x = figures.tokens_axis(tokens)
    y = names_axis(f"feature {feature}" for feature in chosen)
    cells = values[chosen, : len(tokens)].tolist()

    def says(row: int, token: int, value: float) -> str:
        place = f"<b>{y.values[row]}</b>, position {token} {label(visible(tokens[token]))}"
        return f"{place}<br>{signed(value)} {label(shift.units)}"

    reach = float(top.values[0])
    return heatmap(titles, cells, says, x, y, shift.units, "signed", reach=reach)
