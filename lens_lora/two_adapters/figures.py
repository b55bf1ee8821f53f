"""The figures of a comparison of two adapters, of a training and of a repair."""

from __future__ import annotations

import itertools
import math

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lens_lora.core import drawing
from lens_lora.errors import ArgumentError, many
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
    largest_rows,
    names_axis,
    whose,
)
from lens_lora.show.text import label, short_prompt
from lens_lora.two_adapters.comparison import AdapterComparison
from lens_lora.two_adapters.repair import STATES, Repair
from lens_lora.two_adapters.training import (
    Checkpoints,
    GroupName,
    Trainings,
    What,
    spread_over_runs,
)
from lens_lora.two_adapters.words import too_few


@drawing.figure.register(AdapterComparison)
def comparison_heatmap(comparison: AdapterComparison) -> go.Figure:
    """A heatmap of the cosine of ΔW and ΔW′ at every shared site; the colours end at ±1."""
    if not comparison.sites:
        raise ArgumentError("the two adapters share no site, so there is no cosine to draw.")
    cosines = comparison.cosines.tolist()
    below = f"cosine over all sites {comparison.cosine:+.3f}"
    unshared = sum(map(len, comparison.only))
    if unshared:
        below += f", {many(unshared, 'site')} in one of them alone"
    if comparison.begin_alike:
        below += "; what is read overlaps as of adapters that begin alike"
    titles = (f"ΔW of {' and '.join(comparison.names)}", below)
    hover = [f"cosine {cosine:+.3f}" for cosine in cosines]
    return kinds_by_layer(titles, comparison.sites, cosines, hover, "cosine", "signed", reach=1.0)


# The heading of each heatmap of modules by step, and the line below it.
_HEADINGS = {
    "moved": ("Which modules move when", "how far ΔW moved since the checkpoint before"),
    "effect": ("First order through the training", "Σ of each group, mean over prompts"),
    "norm": ("How large ΔW is through the training", "‖ΔW‖ of each group"),
    "read": ("How far what ΔW reads turns", "mean angle to the checkpoint before"),
    "write": ("How far what ΔW writes turns", "mean angle to the checkpoint before"),
}
# What the colours mean in the heatmaps of sizes; 'effect' is signed, in the readout's units.
_AMOUNTS = {"moved": "‖change‖", "norm": "‖ΔW‖", "read": "degrees", "write": "degrees"}


@drawing.modules.register(Checkpoints)
def modules_heatmap(training: Checkpoints, what: What, group: GroupName) -> go.Figure:
    """A heatmap of groups of modules by step; if there are many sites, the largest of them."""
    whole = training.by_group(what, group)
    frame = largest_rows(whole)
    hover = "<b>%{y}</b>, step %{x}<br>%{z:.3g}<extra></extra>"
    heading, below = _HEADINGS[what]
    below = _of_run(training, below) + _left_out(frame, whole)
    colours = _AMOUNTS.get(what, training.units)
    return _groups_by_step(frame, what, group, (heading, below), colours, hover)


@drawing.modules.register(Trainings)
def mean_modules_heatmap(trainings: Trainings, what: What, group: GroupName) -> go.Figure:
    """A heatmap of groups of modules by step, the mean over runs."""
    whole = trainings.by_group(what, group)
    mean = largest_rows(whole)
    spread = trainings.by_group(what, group, over="spread").loc[mean.index].to_numpy()

    def hover(row: int, column: int, value: float | None) -> str:
        place = f"<b>{label(str(mean.index[row]))}</b>, step {mean.columns[column]:g}"
        if value is None or math.isnan(value):
            return place
        return f"{place}<br>{value:.3g}, spread over runs {spread[row, column]:.2g}"

    heading, below = _HEADINGS[what]
    below = f"{below}, mean of {many(len(trainings.runs), 'run')}" + _left_out(mean, whole)
    colours = _AMOUNTS.get(what, trainings.units)
    return _groups_by_step(mean, what, group, (heading, below), colours, hover)


def _left_out(drawn: pd.DataFrame, whole: pd.DataFrame) -> str:
    """The end of the line below the heading, if only some rows are drawn."""
    if len(drawn) == len(whole):
        return ""
    return f"; the {len(drawn)} largest of {len(whole)}"


def _groups_by_step(
    frame: pd.DataFrame,
    what: What,
    group: GroupName,
    headings: figures.Pair,
    colours: str,
    hover: figures.Says,
) -> go.Figure:
    """A heatmap of a table whose rows are groups of modules and whose columns are steps.

    Args:
        frame: the rows that are drawn.
        what, group: as for `Checkpoints.by_group`.
        headings: the heading, and the smaller line below it.
        colours: what the colours mean.
        hover: as for `heatmap`.
    """
    heading, below = headings
    titles = (f"{heading}, by {group}", below)
    x = names_axis((f"{step:g}" for step in frame.columns), "step")
    autorange = "reversed" if group == "kind" else None
    y = names_axis(frame.index, autorange=autorange)
    values = frame.to_numpy().tolist()
    if what in _AMOUNTS:
        return heatmap(titles, values, hover, x, y, colours, "amount")
    return heatmap(titles, values, hover, x, y, colours)


@drawing.figure.register(Repair)
def repair_figure(repair: Repair) -> go.Figure:
    """The share left of what was to be dropped against the share kept of what was to be kept.

    The repair is one point, beside random sets and the curve of the whole adapter, scaled.
    """
    hover = "%{hovertext}<br>kept %{x:.3g}%, left %{y:.3g}%<extra></extra>"

    kept, left = _percentages_kept_and_left(repair, repair.along)
    scaled = curve(kept, left, "whole adapter, scaled", LINEAR, hover, marker={"size": 5})
    scaled.update(
        hovertext=[f"whole adapter at ε = {scale:.2f}" for scale in repair.scales.tolist()]
    )

    kept, left = _percentages_kept_and_left(repair, repair.random)
    random_sets = figures.points(kept, left, hover, "random sets", color=NOISE, size=8, symbol="x")
    random_sets.update(hovertext="random sets")

    kept, left = _percentages_kept_and_left(repair, repair.shares[STATES.index("repaired")])
    repaired = figures.points(kept, left, hover, "repaired", color=EXACT, size=14, symbol="star")
    repaired.update(hovertext="repaired")

    judged = "held-out prompts" if repair.is_held_out else "the prompts given (none held out)"
    heading = f"{int(repair.kept.sum())} of {repair.gate_count} {repair.of}s kept, on {judged}"
    below = f"scaling leaves {repair.gain:.3g} times as much at the same share kept"
    if repair.exceeds:
        below = f"the whole adapter leaves {repair.gain:.3g} times as much and keeps less"
    axes = ("kept of what was to be kept, %", "left of what was to be dropped, %")
    figure = go.Figure([scaled, random_sets, repaired])
    return finish(figure, (heading, below), axes, 440, legend=BELOW, yaxis={"rangemode": "tozero"})


def _percentages_kept_and_left(
    repair: Repair, shares: Float[Tensor, "*state question"]
) -> tuple[list[float], list[float]]:
    """The percentages kept and left, each a mean over the questions that judge.

    Args:
        repair: the result to draw.
        shares: what is kept or left of each question, in one state or in several.
    """
    percentages = 100 * shares
    kept = percentages[..., repair.judging(keep=True)].mean(-1)
    left = percentages[..., repair.judging(keep=False)].mean(-1)
    return kept.reshape(-1).tolist(), left.reshape(-1).tolist()


# If the last step is at most this, there is a tick at every step and none between them.
_FEW_STEPS = 12


@drawing.figure.register(Checkpoints)
def checkpoints_figure(training: Checkpoints) -> go.Figure:
    """Each prompt's readout, exact and to first order, over the steps; flips and phase changes."""
    figure = go.Figure()
    has_phase_change = False
    for p in range(len(training.base)):
        for trace in _traces_of(training, p):
            figure.add_trace(trace)
        for first, last in training.phases.get(f"prompt {p}", ()):
            has_phase_change = True
            colour = _colour_of(p)
            figure.add_vrect(x0=first, x1=last, fillcolor=colour, opacity=0.12, line_width=0)
    if has_phase_change:
        below = "shaded: a phase change"
    else:
        below = too_few(training) or "no phase change of the readout"
    heading = f"{training.readout} through the training"
    titles = (heading, _of_run(training, below))
    return _over_steps(figure, titles, training.units, training.steps[-1])


def _over_steps(figure: go.Figure, titles: figures.Pair, units: str, last_step: float) -> go.Figure:
    """The finished figure of a readout over the steps, with a line at zero."""
    figure.add_hline(y=0, line={"color": INK, "width": 1.5})
    # Without a dtick, plotly chooses where the ticks stand.
    ticks = {"dtick": 1} if last_step <= _FEW_STEPS else {}
    axes = ("step", label(units))
    return finish(figure, titles, axes, legend=BELOW, margin={"b": 120}, xaxis=ticks)


def _of_run(training: Checkpoints, below: str) -> str:
    """The smaller line of a figure's title, after the name of the run where it has one."""
    run = training.meta.get("run")
    return f"{label(run)} · {below}" if run else below


def _colour_of(prompt: int) -> str:
    return figures.PALETTE[prompt % len(figures.PALETTE)]


def _traces_of(training: Checkpoints, p: int) -> list[go.Scatter]:
    """One prompt's readout, what first order predicts of it, and where it flips."""
    steps = [0.0, *training.steps]
    units = label(training.units)
    name = label(short_prompt(training.str_tokens[p]))
    whole_name = f"<extra>{name}</extra>"
    hover = f"step %{{x:g}}<br>%{{y:.4g}} {units}"
    # First order and flips look the same for all prompts, so the legend names them once.
    is_named_in_legend = p == 0
    base = float(training.base[p])
    exact = [base, *training.adapted[:, p].tolist()]
    linear = [base, *(base + training.first_order[:, p]).tolist()]
    colour = _colour_of(p)
    readout = curve(steps, exact, name, colour, hover + whole_name, width=2.5, marker={})
    readout.update(legendgroup=str(p))
    first_order = curve(
        steps,
        linear,
        "base + first order",
        colour,
        f"{hover}, first order{whole_name}",
        width=1.5,
        dash="dash",
    )
    first_order.update(legendgroup=str(p), showlegend=is_named_in_legend)
    flip = float(training.flip_step[p])
    if not math.isfinite(flip):
        return [readout, first_order]
    look = {"color": figures.FLIP, "size": 11, "symbol": "x"}
    flips_at = f"flips at step {flip:.3g}{whole_name}"
    mark = figures.points([flip], [0], flips_at, "flips", **look)
    mark.update(showlegend=is_named_in_legend)
    return [readout, first_order, mark]


# --- Several trainings

# Blue is the exact mean, and orange is first order; each run has one of the other colours.
_RUN_COLOURS = [colour for colour in figures.PALETTE if colour not in (EXACT, LINEAR)]
_BAND = "rgba(47,131,197,0.18)"


@drawing.figure.register(Trainings)
def trainings_figure(trainings: Trainings, prompt: int | None = None) -> go.Figure:
    """The readout of each run over the steps, their mean, and one standard deviation around it."""
    rows = trainings.prompt_rows(prompt)
    lines = _lines_of_runs(trainings, rows)
    if len(trainings.runs) > 1 and trainings.steps:
        # The runs are drawn above their mean, which is wide and would hide them.
        lines = [_band_around_mean(trainings, rows), *_means_of_runs(trainings, rows), *lines]
    titles = (
        f"{trainings.readout} through {many(len(trainings.runs), 'training')}",
        whose(prompt, trainings.str_tokens),
    )
    last_step = max(training.steps[-1] for training in trainings.each)
    return _over_steps(go.Figure(lines), titles, trainings.units, last_step)


def _lines_of_runs(trainings: Trainings, rows: slice) -> list[go.Scatter]:
    """The exact readout of each run, at all steps that it has."""
    base = float(trainings.base[rows].mean())
    hover = f"step %{{x:g}}<br>%{{y:.4g}} {label(trainings.units)}"
    lines: list[go.Scatter] = []
    colours = itertools.cycle(_RUN_COLOURS)
    for run, training, colour in zip(trainings.runs, trainings.each, colours, strict=False):
        name = label(run)
        steps = [0.0, *training.steps]
        values = [base, *training.adapted[:, rows].mean(1).tolist()]
        named = f"{hover}<extra>{name}</extra>"
        lines.append(curve(steps, values, name, colour, named, width=1.5, marker={}))
    return lines


def _band_around_mean(trainings: Trainings, rows: slice) -> go.Scatter:
    """The area within one standard deviation of the mean over runs."""
    base = float(trainings.base[rows].mean())
    of_runs = trainings.adapted[:, :, rows].mean(2)
    mean = of_runs.mean(0)
    spread = spread_over_runs(of_runs)
    steps = [0.0, *trainings.steps]
    upper = [base, *(mean + spread).tolist()]
    lower = [base, *(mean - spread).tolist()]
    return go.Scatter(
        x=[*steps, *reversed(steps)],
        y=[*upper, *reversed(lower)],
        fill="toself",
        fillcolor=_BAND,
        line={"width": 0},
        mode="lines",
        name="mean ± standard deviation",
        hoverinfo="skip",
    )


def _means_of_runs(trainings: Trainings, rows: slice) -> list[go.Scatter]:
    """The means over runs, exact and to first order."""
    base = float(trainings.base[rows].mean())
    steps = [0.0, *trainings.steps]
    exact = trainings.adapted[:, :, rows].mean(2).mean(0)
    linear = base + trainings.first_order[:, :, rows].mean(2).mean(0)
    hover = f"step %{{x:g}}<br>%{{y:.4g}} {label(trainings.units)}"
    of_mean = "<extra>mean of runs</extra>"
    mean = curve(
        steps, [base, *exact.tolist()], "mean of runs", EXACT, hover + of_mean, width=6, opacity=0.5
    )
    first_order = curve(
        steps,
        [base, *linear.tolist()],
        "base + first order, mean of runs",
        LINEAR,
        f"{hover}, first order{of_mean}",
        dash="dash",
    )
    return [mean, first_order]
