"""How an adapter came about (`checkpoints`), and what a repair made of it: words, tables, pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from plotly.graph_objects import Figure

from lens_lora import results
from lens_lora.results import drawing
from lens_lora.show.curves import too_few
from lens_lora.show.figures import heatmap, names_axis
from lens_lora.show.page import Part, Section, folded, made_by, page_html
from lens_lora.show.tables import Pairs, Row, Table, table_of
from lens_lora.show.text import magnitude, percent, short_prompt, signed

# --- A training

_MODULES = {
    "moved": ("Which modules move when", "how far ΔW moved since the checkpoint before"),
    "effect": ("First order through the training", "Σ of each group, mean over prompts"),
    "norm": ("How large ΔW is through the training", "‖ΔW‖ of each group"),
    "read": ("How far what ΔW reads turns", "mean angle to the checkpoint before"),
    "write": ("How far what ΔW writes turns", "mean angle to the checkpoint before"),
}
_AMOUNTS = {"moved": "‖change‖", "norm": "‖ΔW‖", "read": "degrees", "write": "degrees"}


@drawing.modules.register(results.Checkpoints)
def modules_heatmap(training: results.Checkpoints, what: Any, group: Any) -> Figure:
    """Groups of modules by step.

    Raises:
        ArgumentError: another `what` or `group`.
    """
    frame = training.by_group(what, group)
    heading, below = _MODULES[what]
    says = "<b>%{y}</b>, step %{x}<br>%{z:.3g}<extra></extra>"
    x = names_axis((f"{step:g}" for step in frame.columns), "step")
    y = names_axis(frame.index, autorange="reversed" if group == "kind" else None)
    is_amount = what in _AMOUNTS
    units, scale = _AMOUNTS.get(what, training.units), "amount" if is_amount else "pushes"
    values = frame.to_numpy().tolist()
    return heatmap((f"{heading}, by {group}", below), values, says, x, y, units, scale)


@drawing.story.register(results.Checkpoints)
def checkpoints_story(training: results.Checkpoints) -> str:
    """Where each prompt flips, in steps and in strength, and where anything changes at once."""
    prompts = range(len(training.str_tokens))
    lines = [_fate(training, p) + _phases(training, f"prompt {p}", " It") for p in prompts]
    lines.append(_phases(training, "angle", "The direction of ΔW"))
    lines.append(too_few(training))
    return "\n".join(filter(None, lines))


def _fate(training: results.Checkpoints, p: int) -> str:
    """When a prompt's readout changes sign."""
    step, end = float(training.flip_step[p]), float(training.flip_scale[-1, p])
    last = "does not flip" if math.isnan(end) else f"flips at ε = {end:.2g}"
    happened = f"changes sign at about step {step:.3g}; the last checkpoint {last}."
    if math.isnan(step):
        happened = f"keeps its sign through all {len(training.steps)} checkpoints."
        if bool(training.hidden[:, p].any()):
            happened = (
                "changes sign at no checkpoint beyond rounding, which hides its sign at the "
                "base or later."
            )
    return f"“{short_prompt(training.str_tokens[p])}”: {training.readout} {happened}"


def _phases(training: results.Checkpoints, series: str, subject: str) -> str:
    spans = [f"{a:g} and {b:g}" for a, b in training.phases.get(series, ())]
    return f"{subject} changes at once between steps {', and '.join(spans)}." if spans else ""


def checkpoints_table(training: results.Checkpoints) -> Table:
    """The readout at every checkpoint, the base model first, as step 0."""
    prompts = list(map(short_prompt, training.str_tokens))
    rows: list[Row] = [
        ("0", prompt, signed(base), "", "", "", "")
        for prompt, base in zip(prompts, training.base.tolist(), strict=True)
    ]
    for k, step in enumerate(training.steps):
        for p, prompt in enumerate(prompts):
            series = (training.adapted, training.first_order, training.remainder)
            numbers = (signed(float(values[k, p])) for values in series)
            flip = magnitude(float(training.flip_scale[k, p]))
            rows.append((f"{step:g}", prompt, *numbers, flip, f"{training.angle[k]:.0f}°"))
    value = f"value, {training.units}"
    heads = ("step", "prompt", value, "first order", "remainder", "flips at ε", "angle")
    return Table(heads, rows, texts=(1,), title=f"{training.readout} through the training")


@drawing.report.register(results.Checkpoints)
def checkpoints_report(training: results.Checkpoints, *, title: str | None = None) -> str:
    """The page of a training, as a string."""
    sections = [
        Section("Which layers move when", [training.plot_modules("moved", "layer")]),
        Section("Which kinds of module move when", [training.plot_modules("moved", "kind")]),
        Section("First order by layer", [training.plot_modules("effect", "layer")]),
        Section("The numbers", [checkpoints_table(training)]),
    ]
    prompts = "; ".join(f"“{short_prompt(tokens)}”" for tokens in training.str_tokens)
    part = Part(
        subtitle=f"{training.readout} · {prompts}",
        headline=_training_headline(training),
        numbers=_training_numbers(training),
        top=[training.plot()],
        sections=folded(checkpoints_story(training), sections, "training", training.meta),
    )
    first, *_, last = training.steps
    name = f"{len(training.steps)} checkpoints, steps {first:g} to {last:g}"
    return page_html(title or name, [part])


def _training_headline(training: results.Checkpoints) -> Sequence[str]:
    """When the readout flips, whether anything changes at once, and where ΔW is in the end."""
    flips, count = training.flip_step.nan_to_num(math.inf), len(training.base)
    first = int(flips.argmin())
    several = f"{int(flips.isfinite().sum())} of {count} prompts change sign. " if count > 1 else ""
    at_once = _phases(training, f"prompt {first}", "It") or too_few(training)
    none = "It changes at no step at once."
    effect, norm = (training.by_group(what, "layer").iloc[:, -1] for what in ("effect", "norm"))
    where = (
        f"At the last checkpoint first order is largest in {effect.abs().idxmax()} "
        f"({signed(effect[effect.abs().idxmax()])} {training.units}), and ΔW in {norm.idxmax()} "
        f"(‖ΔW‖ = {magnitude(norm.max())})."
    )
    return several + _fate(training, first), at_once or none, where


def _training_numbers(training: results.Checkpoints) -> Pairs:
    count, first = len(training.base), int(training.flip_step.nan_to_num(math.inf).argmin())
    mean = f", mean of {count} prompts" if count > 1 else ""
    step, scale = float(training.flip_step[first]), float(training.flip_scale[-1, first])
    return (
        (signed(float(training.base.mean())), f"{training.units}, the base model{mean}"),
        (signed(float(training.adapted[-1].mean())), f"{training.units}, the last checkpoint"),
        (f"{step:.3g}" if math.isfinite(step) else "never", "step of the first change of sign"),
        (f"ε = {scale:.2g}" if math.isfinite(scale) else "—", "where the last checkpoint flips"),
    )


# --- A repair


@drawing.story.register(results.Repair)
def repair_story(repair: results.Repair) -> str:
    """Kept and left on the prompts that judge, and whether that is better than scaling."""
    return " ".join(filter(None, _judged(repair)))


def _judged(repair: results.Repair) -> tuple[str, str, str]:
    judged = "On held-out prompts" if repair.is_held_out else "On the prompts that it was made on"
    outcome = (
        f"{judged} the repaired adapter keeps {percent(repair.kept_share)} of what was to be kept "
        f"and leaves {percent(repair.left_share)} of what was to be dropped."
    )
    if repair.verdict == "nothing":
        none = (
            f"No smaller set of {repair.of}s that was tried kept {percent(repair.keep_share)} and "
            "left less, so the adapter is whole: ask for a smaller keep_share, or more steps."
        )
        return outcome, none, ""
    gain = f"{repair.gain:.3g} times as much"
    beside = {
        "helps": f"The whole adapter, scaled down to keep the same, leaves {gain}.",
        "tie": "That is a tie with scaling the whole adapter down to keep the same.",
        "worse": "Scaling the whole adapter down to keep the same leaves less: the repair does not "
        "help here.",
    }[repair.verdict]
    if repair.exceeds:
        beside = f"No strength of the whole adapter up to 1 keeps as much. At 1 it leaves {gain}."
    fair = "" if repair.is_held_out else "Give test_keep and test_drop to judge it fairly."
    return outcome, beside, fair


def repair_table(repair: results.Repair) -> Table:
    """What stays of each question, by adapter."""
    frame = repair.to_frame()
    frame.loc[frame["held out"], "kind"] += ", held out"
    heads = {name: name for name in ("question", "kind", "adapter", "value")}
    heads["share"] = "kept or left"
    return table_of(frame, heads, texts=(0, 1, 2), title="What stays of each")


@drawing.report.register(results.Repair)
def repair_report(repair: results.Repair, *, title: str | None = None) -> str:
    """The page of a repair, as a string."""
    kept = f"{int(repair.kept.sum())} of {repair.gate_count}"
    outcome, beside, _ = _judged(repair)
    scaled = "which keeps less" if repair.exceeds else "scaled to keep this"
    sections = [Section("What stays of each", [repair_table(repair)])]
    part = Part(
        subtitle=made_by(repair.meta),
        headline=(outcome, beside, f"{kept} {repair.of}s of the adapter are kept."),
        numbers=(
            (percent(repair.kept_share), "of what was to be kept stays"),
            (percent(repair.left_share), "of what was to be dropped is left"),
            (kept, f"{repair.of}s kept"),
            (f"{repair.gain:.3g} ×", f"as much is left by the whole adapter, {scaled}"),
        ),
        top=[repair.plot()],
        sections=folded(repair_story(repair), sections, "repair", repair.meta),
    )
    return page_html(title or f"What a repair left of {repair.meta.get('adapter', 'it')}", [part])
