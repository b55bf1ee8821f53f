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
from typing import Annotated, Literal, NamedTuple, final, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.arguments import numbers_of, word
from lens_lora.core import (
    SIGMAS,
    Adapter,
    Evaluations,
    LoraLens,
    Paged,
    Pictured,
    PromptsLike,
    Read,
    Readout,
    Site,
    alone,
    changes_sign,
    drawing,
    evaluations,
    flip_scales,
    group_sites,
    hides_sign,
    indicator,
    load_adapter,
    long_table,
    require_one_base,
)
from lens_lora.errors import ArgumentError, many
from lens_lora.formats.folders import checkpoint_folders
from lens_lora.two_adapters.overlap import Overlap, ThinSVD, overlap_of, svd_of_sites

What = Literal["moved", "effect", "norm", "read", "write"]
GroupName = Literal["site", "layer", "kind"]


@final
class Checkpoints(Read, Paged, Pictured):
    """A readout, its first order and the weights at each checkpoint of a training.

    `plot` is the readout of each prompt over the steps, its first order, flips and phase changes.
    The base model is step 0 of every series, before the first checkpoint.

    Attributes:
        steps: the checkpoints' steps, increasing.
        names: their adapters' names.
        sites: that every checkpoint adapts.
        base: [batch], g(0): the readout of the base model.
        adapted: [step, batch], g(1) of each checkpoint, exact.
        effects: [step, batch, site], first order at ε = 0.
        flip_scale: [step, batch], the first ε at which the readout changes sign at that checkpoint;
            NaN where it does not.
        norms: [step, site], ‖ΔW‖_F.
        moved: [step, site], ‖ΔW_k − ΔW_{k−1}‖_F since the checkpoint before, or since zero.
        to_final: [step, site], cosine of ΔW to that of the last checkpoint. Of a rank-1 site it is
            the product of the cosine of what is read and of what is written: it mixes both.
        read_angle, write_angle: [step, site], in degrees, between what ΔW reads (its row space), or
            writes (its column space), and what it did at the checkpoint before: acos √(mean cos²)
            of the principal angles. NaN at the first checkpoint, and of a norm.
        angle: [step], between ΔW of all sites and the last checkpoint's, in degrees.
        phases: series → the spans of steps in which it changes at once; 'prompt 0', … for the
            readout, 'angle' for the direction. A series of fewer than four intervals is not judged,
            and not there.
        noise: [1 + step, batch], σ of the readout from rounding: of the base, then of each
            checkpoint.
        str_tokens, readout, units, meta: as in `Read`.
    """

    steps: Annotated[tuple[float, ...], "step"]
    names: Annotated[tuple[str, ...], "step"]
    sites: Annotated[tuple[Site, ...], "site"]
    base: Float[Tensor, " batch"]
    adapted: Float[Tensor, "step batch"]
    effects: Float[Tensor, "step batch site"]
    flip_scale: Float[Tensor, "step batch"]
    norms: Float[Tensor, "step site"]
    moved: Float[Tensor, "step site"]
    to_final: Float[Tensor, "step site"]
    read_angle: Float[Tensor, "step site"]
    write_angle: Float[Tensor, "step site"]
    angle: Float[Tensor, " step"]
    phases: dict[str, tuple[tuple[float, float], ...]]
    noise: Float[Tensor, "step+1 batch"]

    @property
    def shift(self) -> Float[Tensor, "step batch"]:
        """The exact shift g(1) − g(0) at each checkpoint."""
        return self.adapted - self.base

    @property
    def noise_floor(self) -> Float[Tensor, "step batch"]:
        """The noise floor of each checkpoint's shift: its σ from rounding alone."""
        return (self.noise[:1].square() + self.noise[1:].square()).sqrt()

    @property
    def first_order(self) -> Float[Tensor, "step batch"]:
        """The sum of first order over the sites, Σ_l a_l, at each checkpoint."""
        return self.effects.sum(2)

    @property
    def remainder(self) -> Float[Tensor, "step batch"]:
        """The exact shift of each checkpoint minus first order."""
        return self.shift - self.first_order

    @property
    def flips(self) -> Float[Tensor, "step batch"]:
        """Whether the readout has another sign than at the base: 1 where it has, else 0.

        It is 0 where either is within three noise floors of zero, so that rounding hides its sign.
        """
        base = self.base.expand_as(self.adapted)
        return changes_sign(base, self.adapted, self.noise[:1], self.noise[1:]).double()

    @property
    def hidden(self) -> Bool[Tensor, "step batch"]:
        """Whether rounding hides a sign, of the base or of the checkpoint."""
        at_base = hides_sign(self.base, self.noise[0])
        return at_base | hides_sign(self.adapted, self.noise[1:])

    @property
    def flip_step(self) -> Float[Tensor, " batch"]:
        """The step at which the readout first changes sign, linear between checkpoints.

        It is NaN where the readout never changes sign, or rounding hides it.
        """
        steps = torch.tensor([0.0, *self.steps], dtype=torch.float64)
        values = torch.cat([self.base[None], self.adapted]).cpu().double()
        flips = self.flips.cpu().int()
        before = flips.argmax(0)  # in `values`, the row before the first flip
        prompts = torch.arange(values.shape[1])
        value_before = values[before, prompts]
        value_after = values[before + 1, prompts]
        # The value before may have crossed zero already, within rounding.
        share = (value_before / (value_before - value_after)).clamp(0, 1)
        crossing = steps[before] + (steps[before + 1] - steps[before]) * share
        return torch.where(flips.any(0), crossing, torch.nan)

    def to_frame(self) -> pd.DataFrame:
        """One row per checkpoint and prompt."""
        numbers = {
            "adapted": self.adapted,
            "shift": self.shift,
            "first_order": self.first_order,
            "remainder": self.remainder,
            "flips": self.flips,
            "hidden": self.hidden,
            "flip_scale": self.flip_scale,
            "angle": self.angle[:, None].expand_as(self.adapted),
            "norm": self.norms.square().sum(1).sqrt()[:, None].expand_as(self.adapted),
        }
        frame = long_table(numbers, {"step": self.steps}, {"prompt": range(len(self.base))})
        return frame.astype({"flips": bool, "hidden": bool})

    def by_group(self, what: What = "moved", group: GroupName = "layer") -> pd.DataFrame:
        """Rows of groups, columns of steps.

        Args:
            what: 'moved' and 'norm', roots of sums of squares; 'effect', the sum of first order,
                mean over prompts; 'read' and 'write', the mean angle to the checkpoint before.
            group: 'site', 'layer' or 'kind'.

        Raises:
            ArgumentError: another `what` or `group`.
        """
        word("what", what, get_args(What))
        groups = group_sites(self.sites, group)
        members = indicator(groups, len(self.sites)).double().T

        def sums(values: Float[Tensor, "step site"]) -> Float[Tensor, "step group"]:
            return values.cpu().double() @ members

        match what:
            case "effect":
                values = sums(self.effects.cpu().double().mean(1))
            case "moved":
                values = sums(self.moved.cpu().double().square()).sqrt()
            case "norm":
                values = sums(self.norms.cpu().double().square()).sqrt()
            case "read" | "write":
                angles = self.read_angle if what == "read" else self.write_angle
                counts = sums((~angles.isnan()).double())
                values = sums(angles.nan_to_num()) / counts
        return pd.DataFrame(values.T.numpy(), index=list(groups), columns=list(self.steps))

    def story(self) -> str:
        """Where each prompt flips, and where anything changes at once, in plain words."""
        return drawing.story(self)

    def plot_modules(self, what: What = "moved", group: GroupName = "layer") -> drawing.Figure:
        """A heatmap of groups by step, which shows which modules move when.

        Args:
            what, group: as for `by_group`.

        Raises:
            ArgumentError: another `what` or `group`.
        """
        return drawing.modules(self, what, group)


@alone
def checkpoints(
    lens: LoraLens,
    adapters: Sequence[Adapter] | str | Path,
    prompts: PromptsLike,
    readout: Readout,
    *,
    steps: Sequence[float] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    progress: bool = True,
) -> Checkpoints:
    """A readout, its first order, its flip and the weights at every checkpoint of a training.

    Cost per checkpoint: 14 forward passes, ten along the path and four for its noise floor, about
    ten more where a prompt flips, and two thin products a module for its first order; once six
    forward passes and one backward of the base.

    Args:
        lens: any adapter over the base model, such as the last checkpoint's.
        adapters: the checkpoints in the order of training, or the folder or hub id of a run,
            whose `checkpoint-<step>` folders are found and sorted by step.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: what is read; a margin, for flips that mean something. Of a `Projection` the sites
            are those before its point, and so are all norms and angles.
        steps: of the checkpoints, increasing; without it 1, 2, …, or the folders' own.
        revision: branch, tag or commit of the run's hub repository.
        subfolder: the run's folder within its folder or repository.
        progress: show a bar.

    Raises:
        AdapterError: a folder without checkpoints, one that cannot be read or does not fit the
            model, or two that name different bases.
        ArgumentError: fewer than two checkpoints, other modules in one than in another, steps that
            do not increase, or a readout without a derivative at the base.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a readout or derivative that is not finite.
    """
    run, run_steps = _in_order(adapters, steps, revision, subfolder)
    _require_one_training(run)

    g = evaluations(lens.with_adapter(run[0]), prompts, readout, progress=False)
    g.require_slope_at_base()
    # Of a readout inside the model these are the modules before its point, and no others.
    moving = list(g.lens.adapter.modules)
    run = tuple(adapter.only(*moving) for adapter in run)
    base_noise = g.noise((1.0,), at=0.0)
    (base,) = g.along((0.0,))

    measurements: list[_Measured] = []
    updates: list[dict[str, ThinSVD]] = []
    sites: tuple[Site, ...] = ()
    with tqdm(run, desc="checkpoints", leave=False, disable=not progress) as bar:
        for adapter in bar:
            checkpoint = lens.with_adapter(adapter)
            sites = _same_sites(sites, checkpoint, adapter)
            g_of_checkpoint = Evaluations.of(g.over(checkpoint))
            g_of_checkpoint.know(0.0, base)
            measurements.append(_measured(g_of_checkpoint))
            updates.append(svd_of_sites(checkpoint))
    effects = g.slopes_of_adapters(lambda: run, sites, like=run)
    weights = _weights(updates)

    base = base.cpu().double()
    adapted = torch.stack([each.adapted for each in measurements])
    noise = torch.stack([base_noise.cpu().double(), *(each.noise for each in measurements)])
    labels = g.labels()
    labels["meta"] = {**labels["meta"], "adapter": run[-1].name}
    return Checkpoints(
        steps=run_steps,
        names=tuple(adapter.name for adapter in run),
        sites=sites,
        base=base,
        adapted=adapted,
        effects=effects.cpu().double(),
        flip_scale=torch.stack([each.flip_scale for each in measurements]),
        noise=noise,
        **weights,
        phases=_phases(run_steps, torch.cat([base[None], adapted]), weights["angle"], noise),
        **labels,
    )


class _Measured(NamedTuple):
    """The numbers of one checkpoint that passes of it give.

    Attributes:
        adapted: g(1).
        flip_scale: the first ε at which the readout changes sign; NaN where it does not.
        noise: σ of g(1) from rounding.
    """

    adapted: Float[Tensor, " batch"]
    flip_scale: Float[Tensor, " batch"]
    noise: Float[Tensor, " batch"]


def _in_order(
    adapters: Sequence[Adapter] | str | Path,
    steps: Sequence[float] | None,
    revision: str | None,
    subfolder: str | None,
) -> tuple[tuple[Adapter, ...], tuple[float, ...]]:
    """The adapters in the order of training, and their steps."""
    if isinstance(adapters, str | Path):
        if steps is not None:
            raise ArgumentError("the steps of a run folder are those of its checkpoint-<step>.")
        folders = checkpoint_folders(adapters, revision, subfolder)
        run = [load_adapter(path).named(path.name) for path in folders.values()]
        return tuple(run), tuple(float(step) for step in folders)
    is_list = isinstance(adapters, list | tuple)
    if not is_list or not all(isinstance(adapter, Adapter) for adapter in adapters):
        raise ArgumentError(
            f"the checkpoints are a {type(adapters).__name__}; expected a list of ll.Adapter, or "
            "the folder of a run."
        )
    count = len(adapters)
    if count < 2:
        raise ArgumentError(
            f"{many(count, 'checkpoint')}: a training is read from two or more",
            remedy="of one adapter use ll.fact_margin or ll.remainder.",
            in_shell="of one adapter use `lens-lora explain`.",
        )
    numbers = numbers_of("steps", range(1, count + 1) if steps is None else steps)
    is_increasing = all(a < b for a, b in itertools.pairwise([0.0, *numbers]))
    if len(numbers) != count or not is_increasing:
        raise ArgumentError(
            f"steps={numbers} for {count} checkpoints; expected one each, above 0 and increasing."
        )
    return tuple(adapters), tuple(numbers)


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
    require_one_base(adapters, "checkpoints of one training have one base model")


def _same_sites(sites: tuple[Site, ...], lens: LoraLens, adapter: Adapter) -> tuple[Site, ...]:
    """The sites of this checkpoint, which are those of the ones before it."""
    names = [site.name for site in lens.sites]
    expected = [site.name for site in sites]
    if sites and names != expected:
        unshared = sorted(set(names) ^ set(expected))
        raise ArgumentError(
            f"{adapter.name}: {unshared[0]} is as in the base in one checkpoint and changed in "
            "another",
            remedy="leave such modules out: adapter.without(…).",
        )
    return lens.sites


def _measured(g: Evaluations) -> _Measured:
    """Run one checkpoint, of which g at the base is known.

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
    )


# --- Weights


def _weights(updates: Sequence[Mapping[str, ThinSVD]]) -> dict[str, Tensor]:
    """The fields of `Checkpoints` that say how large ΔW is and where it points."""
    norms = torch.stack([_norms(of_step) for of_step in updates])
    squares = norms.square()

    # ‖ΔW_k − ΔW_{k−1}‖² = ‖ΔW_k‖² + ‖ΔW_{k−1}‖² − 2⟨ΔW_k, ΔW_{k−1}⟩
    with_previous = [_overlaps(later, prior) for prior, later in itertools.pairwise(updates)]
    square_moves = squares[1:] + squares[:-1] - 2 * _inner(with_previous)
    moved = torch.cat([norms[:1], square_moves.clamp(min=0).sqrt()])

    inner_with_last = _inner([_overlaps(of_step, updates[-1]) for of_step in updates])
    sizes = squares.sum(1).sqrt()
    cosines = (inner_with_last.sum(1) / (sizes * sizes[-1])).clamp(-1, 1)
    read = [[overlap.read for overlap in of_step] for of_step in with_previous]
    write = [[overlap.write for overlap in of_step] for of_step in with_previous]
    return {
        "norms": norms,
        "moved": moved,
        "to_final": inner_with_last / (norms * norms[-1]),
        "read_angle": _mean_angles(read),
        "write_angle": _mean_angles(write),
        "angle": torch.rad2deg(cosines.acos()),
    }


def _norms(updates: Mapping[str, ThinSVD]) -> Float[Tensor, " site"]:
    return torch.stack([update.sigma.norm() for update in updates.values()])


def _overlaps(mine: Mapping[str, ThinSVD], theirs: Mapping[str, ThinSVD]) -> list[Overlap]:
    return [overlap_of(update, theirs[name]) for name, update in mine.items()]


def _inner(overlaps: Sequence[Sequence[Overlap]]) -> Float[Tensor, "step site"]:
    """⟨ΔW, ΔW′⟩ of each pair of updates."""
    rows = [[overlap.inner for overlap in of_step] for of_step in overlaps]
    return torch.tensor(rows, dtype=torch.float64)


def _mean_angles(cosines: Sequence[Sequence[Tensor]]) -> Float[Tensor, "step site"]:
    """The angles acos √(mean cos²) in degrees, after a row of NaN for the first checkpoint.

    Args:
        cosines: of the principal angles to the checkpoint before, of each later one and each site.
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
# How many intervals a series has at least that is judged.
_FEWEST = 4
# By how many degrees saving in half precision turns ΔW.
_TURNED = 0.1


def _phases(
    steps: tuple[float, ...],
    values: Float[Tensor, "point batch"],
    angle: Float[Tensor, " step"],
    noise: Float[Tensor, "point batch"],
) -> dict[str, tuple[Span, ...]]:
    """The phase changes of each prompt's readout, from the base on, and of the direction of ΔW."""
    from_base = (0.0, *steps)
    judged: dict[str, tuple[Span, ...] | None] = {}
    for p, (series, floors) in enumerate(zip(values.T.tolist(), noise.T.tolist(), strict=True)):
        judged[f"prompt {p}"] = phase_changes(from_base, series, floors)
    judged["angle"] = phase_changes(steps, angle.tolist(), [_TURNED] * len(steps))
    return {name: spans for name, spans in judged.items() if spans is not None}


def phase_changes(
    steps: Sequence[float], values: Sequence[float], floors: Sequence[float] | None = None
) -> tuple[Span, ...] | None:
    """The spans in which a series changes at once; None of a series that is too short to judge.

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
