"""What two adapters, a training and a repair show."""

from __future__ import annotations

import math
from typing import Any

from lens_lora.core import drawing
from lens_lora.errors import ArgumentError
from lens_lora.show import figures, go
from lens_lora.show.figures import (
    BELOW,
    EXACT,
    INK,
    LINEAR,
    NOISE,
    curve,
    finish,
    heatmap,
    kinds_by_layer,
    names_axis,
)
from lens_lora.show.text import (
    label,
    short_prompt,
)
from lens_lora.two_adapters.checkpoints import Checkpoints
from lens_lora.two_adapters.compare_adapters import AdapterComparison
from lens_lora.two_adapters.repair import Repair
from lens_lora.two_adapters.words import too_few


@drawing.figure.register(AdapterComparison)
def comparison_heatmap(comparison: AdapterComparison) -> go.Figure:
    """cos⟨ΔW, ΔW′⟩ of every shared site; the colours end at ±1."""
    if not comparison.sites:
        raise ArgumentError("the two adapters share no site, so there is no cosine to draw.")
    cosines, unshared = comparison.cosines.tolist(), sum(map(len, comparison.only))
    rest = f", {unshared} sites in one of them alone" if unshared else ""
    below = f"cosine over all sites {comparison.cosine:+.3f}{rest}"
    if comparison.begin_alike:
        below += "; what is read overlaps as of adapters that begin alike"
    titles, sites = (f"ΔW of {' and '.join(comparison.names)}", below), comparison.sites
    says = [f"cosine {cosine:+.3f}" for cosine in cosines]
    return kinds_by_layer(titles, sites, cosines, says, "cosine", "signed", reach=1.0)


_MOVES = {
    "moved": ("Which modules move when", "how far ΔW moved since the checkpoint before"),
    "effect": ("First order through the training", "Σ of each group, mean over prompts"),
    "norm": ("How large ΔW is through the training", "‖ΔW‖ of each group"),
    "read": ("How far what ΔW reads turns", "mean angle to the checkpoint before"),
    "write": ("How far what ΔW writes turns", "mean angle to the checkpoint before"),
}


_AMOUNTS = {"moved": "‖change‖", "norm": "‖ΔW‖", "read": "degrees", "write": "degrees"}


@drawing.modules.register(Checkpoints)
def modules_heatmap(training: Checkpoints, what: Any, group: Any) -> go.Figure:
    """Groups of modules by step."""
    frame = training.by_group(what, group)
    heading, below = _MOVES[what]
    says = "<b>%{y}</b>, step %{x}<br>%{z:.3g}<extra></extra>"
    x = names_axis((f"{step:g}" for step in frame.columns), "step")
    y = names_axis(frame.index, autorange="reversed" if group == "kind" else None)
    is_amount = what in _AMOUNTS
    units, scale = _AMOUNTS.get(what, training.units), "amount" if is_amount else "pushes"
    values = frame.to_numpy().tolist()
    return heatmap((f"{heading}, by {group}", below), values, says, x, y, units, scale)


@drawing.figure.register(Repair)
def repair_figure(repair: Repair) -> go.Figure:
    """What is left of what was to be dropped, against what is kept: scaled, repaired, random."""
    keep, drop = repair.judging(keep=True), repair.judging(keep=False)

    def kept_and_left(shares: Any) -> tuple[list[float], list[float]]:
        means = (100 * shares[..., tasks].mean(-1).reshape(-1) for tasks in (keep, drop))
        kept, left = (mean.tolist() for mean in means)
        return kept, left

    hover = "%{hovertext}<br>kept %{x:.3g}%, left %{y:.3g}%<extra></extra>"
    name, marker = "whole adapter, scaled", {"size": 5}
    scaled = curve(*kept_and_left(repair.along), name, LINEAR, hover, marker=marker)
    texts = [f"whole adapter at ε = {scale:.2f}" for scale in repair.scales.tolist()]
    figure = go.Figure(scaled.update(hovertext=texts))
    for name, shares, marker in (
        ("random sets", repair.random, {"color": NOISE, "size": 8, "symbol": "x"}),
        ("repaired", repair.shares[1], {"color": EXACT, "size": 14, "symbol": "star"}),
    ):
        marks = figures.points(*kept_and_left(shares), hover, name, **marker)
        figure.add_trace(marks.update(hovertext=name))
    judged = "held-out prompts" if repair.is_held_out else "the prompts given (none held out)"
    beside = "scaling leaves {} times as much at the same share kept"
    if repair.exceeds:
        beside = "the whole adapter leaves {} times as much and keeps less"
    heading = f"{int(repair.kept.sum())} of {repair.gate_count} {repair.of}s kept, on {judged}"
    titles = heading, beside.format(f"{repair.gain:.3g}")
    axes = "kept of what was to be kept, %", "left of what was to be dropped, %"
    return finish(figure, titles, axes, 440, legend=BELOW, yaxis={"rangemode": "tozero"})


_FEW_STEPS = 12  # each has its tick; without this there are ticks between steps


@drawing.figure.register(Checkpoints)
def checkpoints_figure(training: Checkpoints) -> go.Figure:
    """Each prompt's readout, exact and to first order, over the steps; flips and phase changes."""
    figure, steps, units = go.Figure(), [0.0, *training.steps], label(training.units)
    for p, tokens in enumerate(training.str_tokens):
        name, colour = label(short_prompt(tokens)), figures.PALETTE[p % len(figures.PALETTE)]
        base = float(training.base[p])
        exact = [base, *training.adapted[:, p].tolist()]
        linear = [base, *(base + training.first_order[:, p]).tolist()]
        hover, whole = f"step %{{x:g}}<br>%{{y:.4g}} {units}", f"<extra>{name}</extra>"
        shown, said = {"showlegend": p == 0}, f"{hover}, first order{whole}"
        line = curve(steps, exact, name, colour, hover + whole, width=2.5, marker={})
        dashed = curve(steps, linear, "base + first order", colour, said, width=1.5, dash="dash")
        for trace in (line, dashed.update(shown)):
            figure.add_trace(trace.update(legendgroup=str(p)))
        flip = float(training.flip_step[p])
        if math.isfinite(flip):
            hover = f"flips at step {flip:.3g}{whole}"
            look = {"color": figures.FLIP, "size": 11, "symbol": "x"}
            marks = figures.points([flip], [0], hover, "flips", **look)
            figure.add_trace(marks.update(shown))
        for first, last in training.phases.get(f"prompt {p}", ()):
            figure.add_vrect(x0=first, x1=last, fillcolor=colour, opacity=0.12, line_width=0)
    figure.add_hline(y=0, line={"color": INK, "width": 1.5})
    shades = any(training.phases.get(f"prompt {p}") for p in range(len(training.base)))
    none = too_few(training) or "no phase change of the readout"
    below = "shaded: a phase change" if shades else none
    titles, margin = (f"{training.readout} through the training", below), {"b": 120}
    step = {"dtick": 1 if steps[-1] <= _FEW_STEPS else None}
    return finish(figure, titles, ("step", units), legend=BELOW, margin=margin, xaxis=step)
