"""Effects of interventions on sites, or groups of sites."""

from __future__ import annotations

import plotly.graph_objects as go

from lens_lora.results import drawing
from lens_lora.results.effects import Effects
from lens_lora.show.figures.attribution import site_heatmap
from lens_lora.show.figures.parts import bars, value_text, whose
from lens_lora.show.figures.style import title
from lens_lora.show.text import key_text, label, signed

__all__ = ["effects_figure", "group_bars"]


@drawing.figure.register(Effects)
def effects_figure(effects: Effects, prompt: int | None = None) -> go.Figure:
    """Layer × kind of module for single sites, bars for groups.

    Args:
        effects: to be drawn.
        prompt: an index; without it, the mean over prompts.

    Raises:
        ArgumentError: no such prompt.
    """
    if effects.of == "site" and all(len(of) == 1 for of in effects.groups.values()):
        return site_heatmap(effects.attribution(), prompt)
    return group_bars(effects, prompt)


def group_bars(effects: Effects, prompt: int | None = None) -> go.Figure:
    """One bar a group, in the order of the groups.

    Args:
        effects: of groups of sites.
        prompt: an index; without it, the mean over prompts.

    Raises:
        ArgumentError: no such prompt.
    """
    _, values, total, _ = effects.entries(prompt)
    shift, units = float(total), effects.units
    hover = [
        f"<b>{label(name)}</b><br>{value_text(value, shift, units)}<br>sites: {len(of)}"
        for (name, of), value in zip(effects.groups.items(), values.tolist(), strict=True)
    ]
    figure = bars(list(effects.groups), values.tolist(), hover, units)
    heading = f"{effects.readout}, {key_text(effects.key)}"
    below = f"of a shift of {signed(shift)} {units} · {whose(prompt, effects.str_tokens)}"
    figure.update_layout(title=title(heading, below))
    return figure
