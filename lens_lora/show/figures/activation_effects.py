"""Effects of activation patching: hook point × position, layer × hook point, or bars."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from lens_lora.results import drawing
from lens_lora.results.activation_effects import ActivationEffects
from lens_lora.results.choosing import layer_order, only_prompt
from lens_lora.show.figures.parts import bars, heatmap, token_ticks, value_text, whose
from lens_lora.show.figures.style import Cells, Labels, title
from lens_lora.show.text import label, visible

__all__ = ["activation_figure"]

_DIRECTIONS = {
    "base_to_adapted": "base activations into the adapted model",
    "adapted_to_base": "adapted activations into the base model",
}


@drawing.figure.register(ActivationEffects)
def activation_figure(effects: ActivationEffects, prompt: int | None = None) -> go.Figure:
    """Hook point × position where each was patched alone; else layer × hook point, or bars.

    Args:
        effects: to be drawn.
        prompt: an index; without it the mean over prompts, or by position the only prompt.

    Raises:
        ArgumentError: no such prompt; by position, several prompts and none named.
    """
    values, total = effects.of_prompt(prompt)
    rows, shift = values.tolist(), float(total)
    if effects.by_position:
        figure = _by_position(effects, rows, shift, prompt)
    elif len({layer for layer, _ in effects.places}) > 1:
        figure = _by_layer(effects, rows, shift)
    else:
        hover = [
            _text(n, v, shift, effects.units) for n, v in zip(effects.names, rows, strict=True)
        ]
        figure = bars(effects.names, rows, hover, effects.units)
    where = "" if effects.positions in ("all", "each") else f", positions {effects.positions}"
    heading = f"{effects.readout}: {_DIRECTIONS[effects.direction]}"
    below = f"activation patching{where} · {whose(prompt, effects.str_tokens)}"
    figure.update_layout(title=title(heading, below))
    return figure


def _by_position(
    effects: ActivationEffects, rows: Cells, shift: float, prompt: int | None
) -> go.Figure:
    tokens = effects.str_tokens[only_prompt(prompt, len(effects.base))]
    order = layer_order(effects.names)
    names = [effects.names[i] for i in order]
    z = [[_or_none(v) for v in rows[i][: len(tokens)]] for i in order]
    hover = [
        [
            _text(f"{name}, position {i} {visible(token)}", value, shift, effects.units)
            for i, (token, value) in enumerate(zip(tokens, row, strict=True))
        ]
        for name, row in zip(names, z, strict=True)
    ]
    figure = heatmap(z, hover, list(range(len(tokens))), names, effects.units, height=170)
    token_ticks(figure, tokens)
    figure.update_yaxes(type="category")
    return figure


def _by_layer(effects: ActivationEffects, values: Sequence[float], shift: float) -> go.Figure:
    """Layer × hook point; points outside the blocks in a row of their own, below."""
    kinds = list(dict.fromkeys(kind for _, kind in effects.places))
    layers = sorted({-1 if layer is None else layer for layer, _ in effects.places})
    z: Cells = [[None] * len(kinds) for _ in layers]
    hover: Labels = [[""] * len(kinds) for _ in layers]
    for name, (layer, kind), value in zip(effects.names, effects.places, values, strict=True):
        row, column = layers.index(-1 if layer is None else layer), kinds.index(kind)
        z[row][column] = _or_none(value)
        hover[row][column] = _text(name, value, shift, effects.units)
    labels = ["outside" if layer < 0 else str(layer) for layer in layers]
    figure = heatmap(z, hover, kinds, labels, effects.units, height=170)
    figure.update_xaxes(type="category")
    figure.update_yaxes(title_text="layer", type="category")
    return figure


def _text(name: str, value: float | None, shift: float, units: str) -> str:
    if value is None:
        return "no such position"
    return f"<b>{label(name)}</b><br>{value_text(value, shift, units)}"


def _or_none(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
