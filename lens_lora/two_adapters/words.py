"""The words of a comparison of two adapters, of a training and of a repair."""

from __future__ import annotations

import math

from lens_lora.core import drawing
from lens_lora.errors import many, named, worded
from lens_lora.show import text
from lens_lora.show.text import magnitude, percent, reading_text, signed
from lens_lora.two_adapters.comparison import AdapterComparison
from lens_lora.two_adapters.repair import Repair
from lens_lora.two_adapters.training import Checkpoints, Trainings


def too_few(training: Checkpoints) -> str:
    """A sentence where there are too few checkpoints to tell a phase change; else nothing."""
    if "prompt 0" in training.phases:
        return ""
    return f"{len(training.steps)} checkpoints are too few to tell a phase change of the readout."


@drawing.story.register(Checkpoints)
def checkpoints_story(training: Checkpoints) -> str:
    """Where each prompt flips, in steps and in strength, and where anything changes at once."""
    prompts = range(len(training.str_tokens))
    lines = [fate(training, p) + phases_text(training, f"prompt {p}", " It") for p in prompts]
    lines.append(phases_text(training, "angle", "The direction of ΔW"))
    lines += [too_few(training), reading_text(training.meta)]
    return "\n".join(filter(None, lines))


def fate(training: Checkpoints, p: int) -> str:
    """When a prompt's readout changes sign."""
    prompt = text.short_prompt(training.str_tokens[p])
    return f"“{prompt}”: {training.readout} {_change_of_sign(training, p)}"


def _change_of_sign(training: Checkpoints, p: int) -> str:
    """The predicate of `fate`: 'keeps its sign …', or 'changes sign …'."""
    step = float(training.flip_step[p])
    if not math.isnan(step):
        end = float(training.flip_scale[-1, p])
        last = "does not flip" if math.isnan(end) else f"flips at ε = {end:.2g}"
        return f"changes sign at about step {step:.3g}; the last checkpoint {last}."
    if bool(training.hidden[:, p].any()):
        return (
            "changes sign at no checkpoint beyond rounding, which hides its sign at the base or "
            "later."
        )
    return f"keeps its sign through all {len(training.steps)} checkpoints."


def phases_text(training: Checkpoints, series: str, subject: str) -> str:
    """Between which steps a series changes at once; nothing where it does not."""
    spans = [f"{first:g} and {last:g}" for first, last in training.phases.get(series, ())]
    if not spans:
        return ""
    return f"{subject} changes at once between steps {', and '.join(spans)}."


@drawing.story.register(Trainings)
def trainings_story(trainings: Trainings) -> str:
    """Say in how many runs each prompt flips, at which steps, and where the runs end."""
    lines: list[str] = []
    for p, tokens in enumerate(trainings.str_tokens):
        start = f"“{text.short_prompt(tokens)}”: {trainings.readout}"
        lines.append(f"{start} {_flips_of_runs(trainings, p)}{_end_of_runs(trainings, p)}")
    lines.append(reading_text(trainings.meta))
    return "\n".join(filter(None, lines))


def _flips_of_runs(trainings: Trainings, p: int) -> str:
    """'changes sign in 2 of 3 runs (seed 0 at about step 14, seed 1 at about step 15).'."""
    steps = trainings.flip_step[:, p].tolist()
    flips: list[str] = []
    for run, step in zip(trainings.runs, steps, strict=True):
        if not math.isnan(step):
            flips.append(f"{run} at about step {step:.3g}")
    count = f"{len(flips)} of {many(len(trainings.runs), 'run')}"
    if not flips:
        return f"changes sign in {count}."
    return f"changes sign in {count} ({', '.join(flips)})."


def _end_of_runs(trainings: Trainings, p: int) -> str:
    """The mean at the last step that all runs have, and the spread; nothing for a single run."""
    if len(trainings.runs) < 2:
        return ""
    if not trainings.steps:
        return " The runs have no step in common, so they have no mean."
    last = trainings.adapted[:, -1, p]
    return (
        f" At step {trainings.steps[-1]:g} it is {signed(float(last.mean()))} "
        f"{trainings.units} on average, with a standard deviation of "
        f"{magnitude(float(last.std()))} over runs."
    )


@drawing.story.register(Repair)
def repair_story(repair: Repair) -> str:
    """Kept and left on the prompts that judge, and whether that is better than scaling."""
    sentences = [outcome_of_repair(repair), beside_scaling(repair)]
    if repair.verdict != "nothing" and not repair.is_held_out:
        held_out = worded("test_keep and test_drop", "--test-prompt and --test-drop")
        sentences.append(f"Give {held_out} to judge it fairly.")
    sentences.append(reading_text(repair.meta))
    return " ".join(filter(None, sentences))


def outcome_of_repair(repair: Repair) -> str:
    """Say what is kept and left on the prompts that judge."""
    judged = "On held-out prompts" if repair.is_held_out else "On the prompts that it was made on,"
    return (
        f"{judged} the repaired adapter keeps {percent(repair.kept_share)} of what was to be kept "
        f"and leaves {percent(repair.left_share)} of what was to be dropped."
    )


def beside_scaling(repair: Repair) -> str:
    """Say whether the repair is better than the whole adapter, scaled down to keep the same."""
    if repair.verdict == "nothing":
        return (
            f"No smaller set of {repair.of}s that was tried kept {percent(repair.keep_share)} and "
            f"left less, so the adapter is whole: ask for a smaller {named('keep_share')}, or more "
            "steps."
        )
    gain = f"{repair.gain:.3g} times as much"
    if repair.exceeds:
        return f"No strength of the whole adapter up to 1 keeps as much. At 1 it leaves {gain}."
    match repair.verdict:
        case "helps":
            return f"The whole adapter, scaled down to keep the same, leaves {gain}."
        case "tie":
            return "That is a tie with scaling the whole adapter down to keep the same."
        case "worse":
            return (
                "Scaling the whole adapter down to keep the same leaves less: the repair does not "
                "help here."
            )


@drawing.body.register(AdapterComparison)
def _two_adapters(comparison: AdapterComparison) -> str:
    sites = [f"{many(len(comparison.sites), 'site')} in both"]
    # Their place is said too, as two adapters may have the same name.
    for place, only, name in zip(
        ("first", "second"), comparison.only, comparison.names, strict=True
    ):
        if only:
            sites.append(f"{len(only)} in the {place} alone ({name!r})")
    lines = [", ".join(sites), comparison.summary().to_string()]
    if comparison.note:
        lines.append(comparison.note)
    return "\n".join(lines)


@drawing.body.register(Checkpoints)
def _checkpoints(training: Checkpoints) -> str:
    flips = ", ".join(f"{step:.3g}" for step in training.flip_step.tolist())
    steps = flips.replace("nan", "never")
    return f"flips at step {steps}\n{training.to_frame().to_string()}"


@drawing.body.register(Trainings)
def _trainings(trainings: Trainings) -> str:
    return f"{trainings.story()}\n{trainings.summary().to_string()}"


@drawing.body.register(Repair)
def _repair(repair: Repair) -> str:
    table = repair.to_frame().drop(columns="base").round(4).to_string()
    kept = f"{int(repair.kept.sum())} of {repair.gate_count} {repair.of}s kept"
    return f"{kept}. {repair.story()}\n{table}"
