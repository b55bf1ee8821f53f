"""One fine-tune through its training: the same question at every checkpoint.

1. Checkpoints: adapters in order, or a trainer's run folder with `checkpoint-<step>` in it.
2. At each: the readout and its first order by site, the readout along ε, and where it flips there.
3. Of the weights, from the SVD of each ΔW: ‖ΔW_k‖, how far ΔW moved since the checkpoint before,
   and its cosine to the last one's, site by site and over all of them; and how far what it reads
   and what it writes turned since the checkpoint before (arXiv 2506.11613).
4. Phase changes: a series changes at once over a span of consecutive steps if it changes in one
   direction there and the whole span makes up at least `SHARE` of the range of the series. In each
   interval of the span the change per step must be more than `TIMES` times the median over all
   intervals, and the change itself at least `PART` of the range, and more than three noise floors
   (σ of a change is √(σ_a² + σ_b²) of its two values). With fewer than four intervals there is no
   usual pace to stand out from, and the series is not judged.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.arguments import numbers_of
from lens_lora.core import (
    SIGMAS,
    Adapter,
    Evaluations,
    LoraLens,
    PromptsLike,
    Readout,
    Site,
    alone,
    flip_scales,
    load_adapter,
)
from lens_lora.errors import ArgumentError, many
from lens_lora.formats.folders import checkpoint_folders
from lens_lora.two_adapters.overlap import Overlap, SiteChange, changes_of_sites, overlap_of
from lens_lora.two_adapters.training import Checkpoints, Trainings

# One training: its checkpoints in order, or the folder or hub id of its run.
Training = Sequence[Adapter] | str | Path


@overload
def checkpoints(
    lens: LoraLens,
    adapters: Training,
    prompts: PromptsLike,
    readout: Readout,
    *,
    steps: Sequence[float] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    progress: bool = True,
) -> Checkpoints: ...
@overload
def checkpoints(
    lens: LoraLens,
    adapters: Mapping[str, Training],
    prompts: PromptsLike,
    readout: Readout,
    *,
    steps: Sequence[float] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    progress: bool = True,
) -> Trainings: ...
@alone
def checkpoints(
    lens: LoraLens,
    adapters: Training | Mapping[str, Training],
    prompts: PromptsLike,
    readout: Readout,
    *,
    steps: Sequence[float] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    progress: bool = True,
) -> Checkpoints | Trainings:
    """A readout, its first order, its flip and the weights at every checkpoint of a training.

    Cost per checkpoint: 14 forward passes, ten along the path and four for its noise floor, about
    ten more where a prompt flips, and two thin products a module for its first order; once for each
    training six forward passes and one backward of the base.

    Args:
        lens: any adapter over the base model, such as the last checkpoint's.
        adapters: the checkpoints in the order of training, or the folder or hub id of a run,
            whose `checkpoint-<step>` folders are found and sorted by step. Several trainings, such
            as one recipe from several seeds, by name: {'seed 0': 'runs/0', 'seed 1': 'runs/1'}.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: what is read; a margin, for flips that mean something. For a `Projection`, sites,
            norms and angles are those of the modules before its point.
        steps: the steps of a list's checkpoints, increasing, and the same for each training; by
            default 1, 2, …. A run's folder has its own steps, so none are given.
        revision: branch, tag or commit of the run's hub repository.
        subfolder: the run's folder within its folder or repository.
        progress: show a bar.

    Returns:
        `Checkpoints`; of several trainings `Trainings`, which has the `Checkpoints` of each.

    Raises:
        AdapterError: a folder without checkpoints, one that cannot be read or does not fit the
            model, or two that name different bases.
        ArgumentError: fewer than two checkpoints, checkpoints of one training that adapt different
            modules, steps that do not increase or are given for a run's folder, a revision or
            subfolder that is given for a list, no training at all, a training whose name is not a
            string, or a readout without a derivative at the base.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a readout or derivative that is not finite.
    """
    asked = _Asked(lens, prompts, readout, progress)
    if not isinstance(adapters, Mapping):
        run = _in_order(adapters, steps, revision, subfolder)
        return _one_training(asked, run, "checkpoints")
    runs: dict[str, _Run] = {}
    for name, of_run in adapters.items():
        if not isinstance(name, str) or not name:
            raise ArgumentError(f"a training is called {name!r}", remedy="name it by a word.")
        runs[name] = _in_order(of_run, steps, revision, subfolder)
    return _several_trainings(asked, runs)


class _Asked(NamedTuple):
    """The questions that are asked at every checkpoint."""

    lens: LoraLens
    prompts: PromptsLike
    readout: Readout
    progress: bool


class _Run(NamedTuple):
    """The checkpoints of one training.

    Attributes:
        adapters: the adapters, in the order of training.
        steps: the step of each.
        name: the name of its folder; '' for a list.
    """

    adapters: tuple[Adapter, ...]
    steps: tuple[float, ...]
    name: str = ""


def _several_trainings(asked: _Asked, runs: Mapping[str, _Run]) -> Trainings:
    """Each training by itself, one after another."""
    if not runs:
        raise ArgumentError(
            "adapters={}: no training was given",
            remedy="write {'seed 0': 'runs/0', 'seed 1': 'runs/1'}.",
        )
    last_of_each = [run.adapters[-1] for run in runs.values()]
    Adapter.require_one_base(last_of_each, "trainings that are compared have one base model")
    each: list[Checkpoints] = []
    for name, run in runs.items():
        each.append(_one_training(asked, run, f"checkpoints of {name}"))
    first = each[0]
    names = ", ".join(training.meta["adapter"] for training in each)
    return Trainings(
        runs=tuple(runs),
        each=tuple(each),
        str_tokens=first.str_tokens,
        readout=first.readout,
        units=first.units,
        meta={**first.meta, "adapter": names},
    )


def _one_training(asked: _Asked, run: _Run, shown_as: str) -> Checkpoints:
    """The readout, its first order and the weights at every checkpoint of one training.

    Args:
        asked: what is asked.
        run: the checkpoints.
        shown_as: what the bar says.
    """
    _require_one_training(run.adapters)
    g = _function_of(asked, run.adapters[0])
    # For a readout inside the model, these are only the modules before its point.
    moving = list(g.lens.adapter.modules)
    adapters = tuple(adapter.only(*moving) for adapter in run.adapters)
    base_noise = g.noise((1.0,), at=0.0)
    (base,) = g.along((0.0,))

    measurements: list[_Measured] = []
    sites: tuple[Site, ...] = ()
    with tqdm(adapters, desc=shown_as, leave=False, disable=not asked.progress) as bar:
        for adapter in bar:
            checkpoint = asked.lens.with_adapter(adapter)
            sites = _same_sites(sites, checkpoint, adapter)
            g_of_checkpoint = Evaluations.of(g.over(checkpoint))
            g_of_checkpoint.know(0.0, base)
            measurements.append(_measured(g_of_checkpoint))
    effects = g.slopes_of_adapters(lambda: adapters, sites, like=adapters)
    weights = _weights([measured.update for measured in measurements])

    base = base.cpu().double()
    adapted = torch.stack([measured.adapted for measured in measurements])
    noise_of_adapted = torch.stack([measured.noise for measured in measurements])
    # The series in which phase changes are looked for begin with the base model.
    values = torch.cat([base[None], adapted])
    noise = torch.cat([base_noise.cpu().double()[None], noise_of_adapted])
    labels = g.labels()
    labels["meta"] = {**labels["meta"], "adapter": adapters[-1].name}
    if run.name:
        labels["meta"]["run"] = run.name
    return Checkpoints(
        steps=run.steps,
        names=tuple(adapter.name for adapter in adapters),
        sites=sites,
        base=base,
        adapted=adapted,
        effects=effects.cpu().double(),
        flip_scale=torch.stack([measured.flip_scale for measured in measurements]),
        noise=noise,
        **weights,
        phases=_phases(run.steps, values, weights["angle"], noise),
        **labels,
    )


def _function_of(asked: _Asked, adapter: Adapter) -> Evaluations:
    """The function g of the questions, under this adapter."""
    f = asked.lens.with_adapter(adapter).function(asked.prompts, progress=False)
    g = Evaluations(f.about(Readout.required(asked.readout)))
    g.require_slope_at_base()
    return g


class _Measured(NamedTuple):
    """The numbers that are measured at one checkpoint.

    Attributes:
        adapted: g(1).
        flip_scale: the first ε at which the readout changes sign; NaN where it does not.
        noise: σ of g(1) from rounding.
        update: what the adapter changes at each site.
    """

    adapted: Float[Tensor, " batch"]
    flip_scale: Float[Tensor, " batch"]
    noise: Float[Tensor, " batch"]
    update: Mapping[str, SiteChange]


def _in_order(
    adapters: Training,
    steps: Sequence[float] | None,
    revision: str | None,
    subfolder: str | None,
) -> _Run:
    """The adapters in the order of training, and their steps."""
    if isinstance(adapters, str | Path):
        if steps is not None:
            raise ArgumentError("the steps of a run folder are those of its checkpoint-<step>.")
        return _run_of_folder(adapters, revision, subfolder)
    if revision is not None or subfolder is not None:
        raise ArgumentError(
            "a revision and a subfolder are those of a run's folder, and these are adapters that "
            "have been loaded",
            remedy="pass both to ll.load_adapter.",
        )
    return _run_of_list(adapters, steps)


def _run_of_folder(run: str | Path, revision: str | None, subfolder: str | None) -> _Run:
    """The `checkpoint-<step>` folders of a run, sorted by step."""
    folders = checkpoint_folders(run, revision, subfolder)
    adapters = tuple(load_adapter(path).named(path.name) for path in folders.values())
    place = Path(run)
    name = place.resolve().name if place.is_dir() else str(run)
    return _Run(adapters, tuple(float(step) for step in folders), name)


def _run_of_list(adapters: Sequence[Adapter], steps: Sequence[float] | None) -> _Run:
    """Adapters in the order that they are given in, at steps 1, 2, … where none are given."""
    is_list = isinstance(adapters, list | tuple)
    if not is_list or not all(isinstance(adapter, Adapter) for adapter in adapters):
        raise ArgumentError(
            f"the checkpoints are a {type(adapters).__name__}; expected a list of ll.Adapter, or "
            "the folder of a run, or several of them by name."
        )
    count = len(adapters)
    if count < 2:
        raise ArgumentError(
            f"{many(count, 'checkpoint')}: a training is read from two or more",
            remedy="of one adapter use ll.fact_margin or ll.remainder.",
            in_shell="of one adapter use `lens-lora explain`.",
        )
    if steps is None:
        steps = range(1, count + 1)
    numbers = numbers_of("steps", steps)
    is_increasing = all(a < b for a, b in itertools.pairwise([0.0, *numbers]))
    if len(numbers) != count or not is_increasing:
        raise ArgumentError(
            f"steps={numbers} for {count} checkpoints; expected one each, above 0 and increasing."
        )
    return _Run(tuple(adapters), tuple(numbers))


def _require_one_training(adapters: Sequence[Adapter]) -> None:
    """Refuse checkpoints that adapt different modules, or name different bases."""
    first = adapters[0]
    for other in adapters[1:]:
        unshared = sorted(set(first.modules) ^ set(other.modules))
        if not unshared:
            continue
        module = unshared[0]
        has = first if module in first.modules else other
        lacks = other if has is first else first
        raise ArgumentError(
            f"{has.name} adapts {module} and {lacks.name} does not ({len(unshared)} such modules); "
            "checkpoints of one training adapt the same modules.",
            remedy="Two trainings are compared by ll.compare_adapters.",
        )
    Adapter.require_one_base(adapters, "checkpoints of one training have one base model")


def _same_sites(sites: tuple[Site, ...], lens: LoraLens, adapter: Adapter) -> tuple[Site, ...]:
    """The sites of this checkpoint, which are those of the ones before it."""
    names = [site.name for site in lens.sites]
    expected = [site.name for site in sites]
    if sites and names != expected:
        unshared = sorted(set(names) ^ set(expected))
        raise ArgumentError(
            f"{adapter.name}: {unshared[0]} is as in the base in one checkpoint and changed in "
            "another",
            remedy="leave such modules out: adapter.without_modules(…).",
        )
    return lens.sites


def _measured(g: Evaluations) -> _Measured:
    """Run one checkpoint; g at the base is known already.

    Cost: ten forward passes along the path and four for the noise floor, and those that refine a
    flip.
    """
    scales = torch.tensor([i / 10 for i in range(1, 11)], dtype=g.lens.gate_dtype)
    values = g.along(scales.tolist())
    base, adapted = g.ends
    return _Measured(
        adapted=adapted.cpu().double(),
        flip_scale=flip_scales(g, base, scales.to(values.device), values.T),
        noise=g.noise((1.0,), at=1.0).cpu().double(),
        update=changes_of_sites(g.lens),
    )


# --- Weights


def _weights(updates: Sequence[Mapping[str, SiteChange]]) -> dict[str, Tensor]:
    """The fields of `Checkpoints` that say how large ΔW is and where it points."""
    norms = torch.stack([_norms(of_step) for of_step in updates])
    squares = norms.square()

    # ‖ΔW_k − ΔW_{k−1}‖² = ‖ΔW_k‖² + ‖ΔW_{k−1}‖² − 2⟨ΔW_k, ΔW_{k−1}⟩
    with_previous = [_overlaps(later, prior) for prior, later in itertools.pairwise(updates)]
    square_moves = squares[1:] + squares[:-1] - 2 * _inner(with_previous)
    # The first checkpoint moved from ΔW = 0.
    moved = torch.cat([norms[:1], square_moves.clamp(min=0).sqrt()])

    last = updates[-1]
    inner_with_last = _inner([_overlaps(of_step, last) for of_step in updates])
    size = squares.sum(1).sqrt()
    cosines = inner_with_last.sum(1) / (size * size[-1])
    angle = torch.rad2deg(cosines.clamp(-1, 1).acos())
    read: list[list[Tensor]] = []
    write: list[list[Tensor]] = []
    for of_step in with_previous:
        read.append([overlap.read for overlap in of_step])
        write.append([overlap.write for overlap in of_step])
    return {
        "norms": norms,
        "moved": moved,
        "to_final": inner_with_last / (norms * norms[-1]),
        "read_angle": _mean_angles(read),
        "write_angle": _mean_angles(write),
        "angle": angle,
    }


def _norms(updates: Mapping[str, SiteChange]) -> Float[Tensor, " site"]:
    return torch.stack([update.sigma.norm() for update in updates.values()])


def _overlaps(mine: Mapping[str, SiteChange], theirs: Mapping[str, SiteChange]) -> list[Overlap]:
    return [overlap_of(update, theirs[name]) for name, update in mine.items()]


def _inner(overlaps: Sequence[Sequence[Overlap]]) -> Float[Tensor, "step site"]:
    """⟨ΔW, ΔW′⟩ of each pair of updates."""
    rows: list[list[float]] = []
    for of_step in overlaps:
        rows.append([overlap.inner for overlap in of_step])
    return torch.tensor(rows, dtype=torch.float64)


def _mean_angles(cosines: Sequence[Sequence[Tensor]]) -> Float[Tensor, "step site"]:
    """The angles acos √(mean cos²) in degrees, after a row of NaN for the first checkpoint.

    Args:
        cosines: the cosines of the principal angles to the checkpoint before, for each later one
            and each site.
    """
    mean_squares: list[Tensor] = []
    for of_step in cosines:
        mean_squares.append(torch.stack([of_site.square().mean() for of_site in of_step]))
    shared = torch.stack(mean_squares).clamp(max=1)
    angles = torch.rad2deg(shared.sqrt().acos())
    return torch.cat([torch.full_like(angles[:1], torch.nan), angles])


# --- Phase changes

# From the first step of a phase change to its last.
Span = tuple[float, float]

# How many times the usual pace the change per step must be, in each interval.
TIMES = 3.0
# The share of the range of the series that each interval must change.
PART = 0.1
# The share of the range that the whole span must change.
SHARE = 0.25
# A series with fewer intervals than this is not judged.
_FEWEST = 4
# Saving in half precision may turn ΔW by this many degrees.
_TURNED = 0.1


def _phases(
    steps: tuple[float, ...],
    values: Float[Tensor, "point batch"],
    angle: Float[Tensor, " step"],
    noise: Float[Tensor, "point batch"],
) -> dict[str, tuple[Span, ...]]:
    """The phase changes of each prompt's readout, from the base on, and of the direction of ΔW."""
    from_base = (0.0, *steps)
    by_series: dict[str, tuple[Span, ...] | None] = {}
    for prompt in range(values.shape[1]):
        series = values[:, prompt].tolist()
        floors = noise[:, prompt].tolist()
        by_series[f"prompt {prompt}"] = phase_changes(from_base, series, floors)
    floors_of_angle = [_TURNED] * len(steps)
    by_series["angle"] = phase_changes(steps, angle.tolist(), floors_of_angle)
    return {name: spans for name, spans in by_series.items() if spans is not None}


def phase_changes(
    steps: Sequence[float], values: Sequence[float], floors: Sequence[float] | None = None
) -> tuple[Span, ...] | None:
    """The spans in which a series changes at once; None for one that is too short to judge.

    Args:
        steps: where the values were taken, increasing.
        values: the series.
        floors: σ of each value from rounding; zero by default.
    """
    changes = np.diff(values)
    if len(changes) < _FEWEST:
        return None
    noise = np.zeros(len(values)) if floors is None else np.array(floors)
    value_range = np.ptp(values)
    paces = np.abs(changes) / np.diff(steps)
    # The lower of the two middle paces where their number is even, so that it is one of them.
    usual_pace = np.sort(paces)[(len(paces) - 1) // 2]
    noise_of_changes = np.hypot(noise[:-1], noise[1:])
    least_change = np.maximum(PART * value_range, SIGMAS * noise_of_changes)
    stands_out = (paces > TIMES * usual_pace) & (np.abs(changes) > least_change)

    # Intervals in a row that stand out in one direction are one span.
    directions = np.where(stands_out, np.sign(changes), 0.0)
    spans: list[Span] = []
    start = 0
    for direction, intervals in itertools.groupby(directions):
        end = start + len(list(intervals))
        if direction and abs(values[end] - values[start]) >= SHARE * value_range:
            spans.append((float(steps[start]), float(steps[end])))
        start = end
    return tuple(spans)
