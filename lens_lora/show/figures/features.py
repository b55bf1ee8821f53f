"""Figures of features: how far each is pushed, and which site writes it."""

from __future__ import annotations

import plotly.graph_objects as go

from lens_lora.analyses.feature_shift import FeatureShift
from lens_lora.analyses.feature_writes import FeatureWrites
from lens_lora.results import drawing
from lens_lora.results.choosing import only_prompt
from lens_lora.show.figures.parts import heatmap, token_ticks, whose
from lens_lora.show.figures.style import EXACT, LINEAR, Cells, style, title
from lens_lora.show.text import label, signed, visible

__all__ = ["feature_figure", "writes_figure"]


@drawing.figure.register(FeatureShift)
def feature_figure(shift: FeatureShift, k: int = 20, prompt: int | None = None) -> go.Figure:
    """Bars of the exact shift with its first order; by position, feature × position.

    Position 0 sees no other token, and its activations are often hundreds of times those after it:
    where there are others, features and colours are chosen by them, and the title says so.

    Args:
        shift: to be drawn.
        k: how many features, by their largest |shift|.
        prompt: an index; without it the mean over prompts, or by position the only prompt.

    Raises:
        ArgumentError: no such prompt; by position, several prompts and none named.
    """
    figure = _by_position(shift, k, prompt) if shift.by_position else _bars(shift, k, prompt)
    heading = f"features at {shift.name}"
    where = "by position" if shift.positions == "each" else _at(shift.positions)
    if shift.by_position and shift.base.shape[2] > 1:
        where += "; features and colours chosen without position 0"
    figure.update_layout(
        title=title(heading, f"pushed by the adapter, {where} · {whose(prompt, shift.str_tokens)}")
    )
    return figure


@drawing.figure.register(FeatureWrites)
def writes_figure(writes: FeatureWrites, k: int = 20, prompt: int | None = None) -> go.Figure:
    """Site × feature, of the k features that some site writes most.

    Args:
        writes: to be drawn.
        k: how many features.
        prompt: an index; without it, the mean over prompts.

    Raises:
        ArgumentError: no such prompt.
    """
    values = writes.of_prompt(prompt)
    chosen = values.abs().amax(0).topk(min(k, values.shape[1])).indices.tolist()
    z: Cells = values[:, chosen].tolist()
    hover = [
        [
            f"<b>{label(site.name)}</b>, feature {feature}<br>{signed(value or 0.0)} "
            f"{label(writes.units)}"
            for feature, value in zip(chosen, row, strict=True)
        ]
        for site, row in zip(writes.sites, z, strict=True)
    ]
    names = [label(site.name) for site in writes.sites]
    features = [str(f) for f in chosen]
    figure = heatmap(z, hover, features, names, writes.units, scale="signed", row_height=20)
    heading = "δz of each site onto features"
    where = f"what it writes by itself, {_at(writes.positions)}"
    below = f"{where} · {whose(prompt, writes.str_tokens)}"
    figure.update_layout(title=title(heading, below))
    figure.update_xaxes(title_text="feature", type="category")
    figure.update_yaxes(type="category")
    return figure


def _bars(shift: FeatureShift, k: int, prompt: int | None) -> go.Figure:
    top = shift.top(k, prompt)[::-1]
    names = [f"feature {feature}" for feature in top["feature"]]
    units = label(shift.units)
    exact = go.Bar(
        x=top["shift"].tolist(),
        y=names,
        orientation="h",
        name="exact",
        marker={"color": EXACT},
        hovertemplate=f"<b>%{{y}}</b><br>%{{x:.4g}} {units}, exact<extra></extra>",
    )
    line = go.Scatter(
        x=top["first_order"].tolist(),
        y=names,
        mode="markers",
        name=f"first order at ε = {shift.at:g}",
        marker={"color": LINEAR, "symbol": "diamond", "size": 8},
        hovertemplate=f"<b>%{{y}}</b><br>%{{x:.4g}} {units}, first order<extra></extra>",
    )
    figure = go.Figure([exact, line])
    style(figure, height=max(300, 150 + 22 * len(names)))
    figure.update_xaxes(title_text=f"shift, {units}", zeroline=True)
    figure.update_yaxes(showgrid=False, type="category")
    return figure


def _by_position(shift: FeatureShift, k: int, prompt: int | None) -> go.Figure:
    values = shift.of_prompt(prompt)["shift"]
    tokens = shift.str_tokens[only_prompt(prompt, len(shift.base))]
    first = 1 if len(tokens) > 1 else 0
    largest = values[:, first : len(tokens)].abs().nan_to_num(0.0).amax(1)
    top = largest.topk(min(k, len(largest)))
    chosen = top.indices.tolist()[::-1]
    z: Cells = values[chosen, : len(tokens)].tolist()
    hover = [
        [
            f"<b>feature {feature}</b>, position {i} {label(visible(token))}"
            f"<br>{signed(value or 0.0)} {label(shift.units)}"
            for i, (token, value) in enumerate(zip(tokens, row, strict=True))
        ]
        for feature, row in zip(chosen, z, strict=True)
    ]
    names = [f"feature {feature}" for feature in chosen]
    reach, columns = float(top.values[0]), list(range(len(tokens)))
    figure = heatmap(
        z, hover, columns, names, shift.units, scale="signed", reach=reach, row_height=20
    )
    figure.update_yaxes(type="category")
    token_ticks(figure, tokens)
    return figure


def _at(position: int) -> str:
    return f"position {position}".replace("-", "−")
