"""The tables and the pages of a training and of a repair."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from lens_lora.core import drawing
from lens_lora.show import text
from lens_lora.show.page import Block, Part, Section, folded, made_by, page_html, warned
from lens_lora.show.tables import Pairs, Row, Table, table_of
from lens_lora.show.text import magnitude, percent, signed
from lens_lora.two_adapters.comparison import AdapterComparison
from lens_lora.two_adapters.repair import Repair
from lens_lora.two_adapters.training import Checkpoints, Trainings
from lens_lora.two_adapters.words import (
    beside_scaling,
    checkpoints_story,
    fate,
    outcome_of_repair,
    phases_text,
    repair_story,
    too_few,
    trainings_story,
)


def checkpoints_table(training: Checkpoints) -> Table:
    """The readout at every checkpoint, the base model first, as step 0."""
    prompts = [text.short_prompt(tokens) for tokens in training.str_tokens]
    rows: list[Row] = []
    for prompt, base in zip(prompts, training.base.tolist(), strict=True):
        rows.append(("0", prompt, signed(base), "", "", "", ""))
    series = (training.adapted, training.first_order, training.remainder)
    for k, step in enumerate(training.steps):
        angle = f"{training.angle[k]:.0f}°".replace("nan°", "—")
        for p, prompt in enumerate(prompts):
            numbers = [signed(float(values[k, p])) for values in series]
            flip = magnitude(float(training.flip_scale[k, p]))
            rows.append((f"{step:g}", prompt, *numbers, flip, angle))
    value = f"value, {training.units}"
    heads = ("step", "prompt", value, "first order", "remainder", "flips at ε", "angle")
    return Table(heads, rows, texts=(1,), title=f"{training.readout} through the training")


@drawing.report.register(Checkpoints)
def checkpoints_report(training: Checkpoints, *, title: str | None = None) -> str:
    """The page of a training, as a string."""
    first, *_, last = training.steps
    # A list of adapters has no name of its own, so its training is called by the last checkpoint.
    whose = training.meta.get("run") or f"Training up to {training.names[-1]}"
    name = f"{whose}: {len(training.steps)} checkpoints, steps {first:g} to {last:g}"
    return page_html(title or name, [_training_part(training)])


def _training_part(training: Checkpoints) -> Part:
    """All that the page of a training has below its title."""
    sections = [
        Section("Which layers move when", [training.plot_modules("moved", "layer")]),
        Section("Which kinds of module move when", [training.plot_modules("moved", "kind")]),
        Section("First order by layer", [training.plot_modules("effect", "layer")]),
        Section("The numbers", [checkpoints_table(training)]),
    ]
    prompts = "; ".join(f"“{text.short_prompt(tokens)}”" for tokens in training.str_tokens)
    model = training.meta.get("model", "")
    over = f" · over {model}" if model else ""
    return Part(
        subtitle=f"{training.readout} · {prompts}{over}",
        headline=_training_headline(training),
        numbers=_training_numbers(training),
        top=[training.plot()],
        sections=folded(checkpoints_story(training), sections, "training", training.meta),
        warnings=warned(training.meta),
    )


def trainings_table(trainings: Trainings) -> Table:
    """The mean over runs and its standard deviation, at the steps that every run has."""
    prompts = [text.short_prompt(tokens) for tokens in trainings.str_tokens]
    runs = len(trainings.runs)
    rows: list[Row] = []
    for prompt, base in zip(prompts, trainings.base.tolist(), strict=True):
        rows.append(("0", prompt, signed(base), "", "", ""))
    summary: Any = trainings.summary()
    for row in summary.itertuples():
        spread = "—" if math.isnan(row.adapted_spread) else magnitude(row.adapted_spread)
        numbers = (signed(row.adapted), spread, signed(row.first_order))
        rows.append((f"{row.step:g}", prompts[row.prompt], *numbers, f"{row.flips} of {runs}"))
    value = f"value, {trainings.units}"
    heads = ("step", "prompt", value, "standard deviation", "first order", "runs that flip")
    return Table(heads, rows, texts=(1,), title=f"{trainings.readout}, mean over {runs} runs")


@drawing.report.register(Trainings)
def trainings_report(trainings: Trainings, *, title: str | None = None) -> str:
    """The page of several trainings, as a string: their mean, then each run's own page."""
    parts: list[Part] = []
    for run, training in zip(trainings.runs, trainings.each, strict=True):
        parts.append(dataclasses.replace(_training_part(training), name=run))
    overview: list[Block] = [*trainings_story(trainings).splitlines(), trainings.plot()]
    if trainings.steps:
        overview.append(trainings_table(trainings))
        if trainings.has_same_sites:
            overview += [trainings.plot_modules("moved"), trainings.plot_modules("effect")]
    name = f"{trainings.readout} through {len(parts)} trainings"
    below = ", ".join(trainings.runs)
    model = trainings.each[0].meta.get("model", "")
    if model:
        below = f"{below} over {model}"
    return page_html(title or name, parts, overview, below)


def _training_headline(training: Checkpoints) -> Sequence[str]:
    """When the readout flips, whether anything changes at once, and where ΔW is in the end."""
    flips = training.flip_step.nan_to_num(math.inf)
    count = len(training.base)
    first = int(flips.argmin())
    several = ""
    if count > 1:
        several = f"{int(flips.isfinite().sum())} of {count} prompts change sign. "
    at_once = phases_text(training, f"prompt {first}", "It") or too_few(training)
    how = at_once or "It changes gradually: no step stands out."
    last_effects: Any = training.by_group("effect", "layer").iloc[:, -1]
    last_norms: Any = training.by_group("norm", "layer").iloc[:, -1]
    largest = last_effects.abs().idxmax()
    where = (
        f"At the last checkpoint first order is largest in {largest} "
        f"({signed(last_effects[largest])} {training.units}), and ΔW in {last_norms.idxmax()} "
        f"(‖ΔW‖ = {magnitude(last_norms.max())})."
    )
    return several + fate(training, first), how, where


def _training_numbers(training: Checkpoints) -> Pairs:
    count = len(training.base)
    mean = f", mean of {count} prompts" if count > 1 else ""
    base = signed(float(training.base.mean()))
    adapted = signed(float(training.adapted[-1].mean()))
    first = int(training.flip_step.nan_to_num(math.inf).argmin())
    step = float(training.flip_step[first])
    flips_at = f"{step:.3g}" if math.isfinite(step) else "never"
    scale = float(training.flip_scale[-1, first])
    last_flips_at = f"ε = {scale:.2g}" if math.isfinite(scale) else "—"
    return (
        (base, f"{training.units}, the base model{mean}"),
        (adapted, f"{training.units}, the last checkpoint"),
        (flips_at, "step of the first change of sign"),
        (last_flips_at, "where the last checkpoint flips"),
    )


def comparison_table(comparison: AdapterComparison) -> Table:
    """One row for each number of two adapters, with its quantiles for random directions."""
    summary = comparison.summary().reset_index()
    heads = {str(name): str(name) for name in summary}
    title = "how alike, from −1 to 1; null: the second adapter in random directions"
    return table_of(summary, heads, title=title)


def repair_table(repair: Repair) -> Table:
    """One row for each question and adapter: the readout, and the share that is kept or left."""
    frame = repair.to_frame()
    frame.loc[frame["held_out"], "role"] += ", held out"
    heads = {
        "question": "question",
        "role": "role",
        "state": "adapter",
        "value": "value",
        "share": "share left",
    }
    return table_of(frame, heads, texts=(0, 1, 2), title="What stays of each")


@drawing.report.register(Repair)
def repair_report(repair: Repair, *, title: str | None = None) -> str:
    """The page of a repair, as a string."""
    kept = f"{int(repair.kept.sum())} of {repair.gate_count}"
    scaled = "which keeps less" if repair.exceeds else "scaled to keep this"
    sections = [Section("What stays of each", [repair_table(repair)])]
    part = Part(
        subtitle=made_by(repair.meta),
        headline=(
            outcome_of_repair(repair),
            beside_scaling(repair),
            f"{kept} {repair.of}s of the adapter are kept.",
        ),
        numbers=(
            (percent(repair.kept_share), "of what was to be kept stays"),
            (percent(repair.left_share), "of what was to be dropped is left"),
            (kept, f"{repair.of}s kept"),
            (f"{repair.gain:.3g} ×", f"as much is left by the whole adapter, {scaled}"),
        ),
        top=[repair.plot()],
        sections=folded(repair_story(repair), sections, "repair", repair.meta),
        warnings=warned(repair.meta),
    )
    return page_html(title or f"What a repair left of {repair.meta.get('adapter', 'it')}", [part])
