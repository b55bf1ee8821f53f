"""A training: the readout over its steps, and which modules move when."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go

from lens_lora.results import drawing
from lens_lora.results.checkpoints import Checkpoints
from lens_lora.show.figures.parts import heatmap
from lens_lora.show.figures.style import FLIP, LEGEND_BELOW, style, title
from lens_lora.show.figures.theme import INK, PALETTE
from lens_lora.show.text import label, short_prompt

__all__ = ["checkpoints_figure", "modules_heatmap"]

_HEADINGS = {
    "moved": ("Which modules move when", "how far ΔW moved since the checkpoint before"),
    "effect": ("First order through the training", "Σ of each group, mean over prompts"),
    "norm": ("How large ΔW is through the training", "‖ΔW‖ of each group"),
}
_NORMS = {"moved": "‖change‖", "norm": "‖ΔW‖"}
_FEW_STEPS = 12  # each has its tick; without this there are ticks between steps


@drawing.figure.register(Checkpoints)
def checkpoints_figure(found: Checkpoints) -> go.Figure:
    """Each prompt's readout, exact and to first order, over the steps; flips and phase changes.

    Args:
        found: to be drawn.
    """
    figure, steps = go.Figure(), [0.0, *found.steps]
    units = label(found.units)
    for p, tokens in enumerate(found.str_tokens):
        name, colour = label(short_prompt(tokens)), PALETTE[p % len(PALETTE)]
        base = float(found.base[p])
        exact = [base, *found.adapted[:, p].tolist()]
        linear = [base, *(base + found.first_order[:, p]).tolist()]
        shared: dict[str, Any] = {"x": steps, "legendgroup": str(p)}
        figure.add_scatter(
            **shared,
            y=exact,
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2.5},
            hovertemplate=f"step %{{x:g}}<br>%{{y:.4g}} {units}<extra>{name}</extra>",
        )
        figure.add_scatter(
            **shared,
            y=linear,
            name="base + first order",
            showlegend=p == 0,
            mode="lines",
            line={"color": colour, "width": 1.5, "dash": "dash"},
            hovertemplate=f"step %{{x:g}}<br>%{{y:.4g}} {units}, first order<extra>{name}</extra>",
        )
        flip = float(found.flip_step[p])
        if math.isfinite(flip):
            figure.add_scatter(
                x=[flip],
                y=[0],
                name="flips",
                showlegend=p == 0,
                mode="markers",
                marker={"color": FLIP, "size": 11, "symbol": "x"},
                hovertemplate=f"flips at step {flip:.3g}<extra>{name}</extra>",
            )
        for first, last in found.phases.get(f"prompt {p}", ()):
            figure.add_vrect(x0=first, x1=last, fillcolor=colour, opacity=0.12, line_width=0)
    figure.add_hline(y=0, line={"color": INK, "width": 1.5})
    style(figure, height=420)
    shades = any(found.phases.get(f"prompt {p}") for p in range(len(found.base)))
    below = "shaded: a phase change" if shades else "no phase change of the readout"
    figure.update_layout(
        title=title(f"{found.readout} through the training", below),
        legend=LEGEND_BELOW,
        margin={"b": 120},
    )
    figure.update_xaxes(title_text="step", dtick=1 if steps[-1] <= _FEW_STEPS else None)
    figure.update_yaxes(title_text=units)
    return figure


@drawing.modules.register(Checkpoints)
def modules_heatmap(found: Checkpoints, what: Any, group: Any) -> go.Figure:
    """Groups of modules by step.

    Args:
        found: to be drawn.
        what, group: as for `Checkpoints.by_group`.

    Raises:
        ArgumentError: another `what` or `group`.
    """
    frame = found.by_group(what, group)
    names, steps = list(map(str, frame.index)), [f"{step:g}" for step in frame.columns]
    values = frame.to_numpy().tolist()
    hover = [
        [
            f"<b>{label(name)}</b>, step {step}<br>{v:.3g}"
            for step, v in zip(steps, row, strict=True)
        ]
        for name, row in zip(names, values, strict=True)
    ]
    units, scale = (found.units, "pushes") if what == "effect" else (_NORMS[what], "amount")
    rows = [label(name) for name in names]
    figure = heatmap(values, hover, steps, rows, units, scale=scale)
    heading, below = _HEADINGS[what]
    figure.update_layout(title=title(f"{heading}, by {group}", below))
    figure.update_xaxes(title_text="step", type="category")
    figure.update_yaxes(type="category", autorange="reversed" if group == "kind" else None)
    return figure
