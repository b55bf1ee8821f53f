"""One fine-tune through its training: the same question at every checkpoint.

1. Checkpoints: adapters in order, or a trainer's run folder with `checkpoint-<step>` in it.
2. At each: the readout and its first order by site, the readout along ε, and where it flips there.
3. Of the weights, from thin factors: ‖ΔW_k‖, how far ΔW moved since the checkpoint before, its
   cosine to the last one's, site by site and over all of them; and how far what it reads and what
   it writes turned since the checkpoint before (arXiv 2506.11613).
4. Phase changes: a series changes at once over a span of consecutive steps if, in each of its
   intervals, the change per step is more than `TIMES` times the median over all intervals, and the
   change is in one direction, at least `PART` of the range of the series, and more than three noise
   floors (σ of a change is √(σ_a² + σ_b²) of its two values); and the whole span makes up at least
   `SHARE` of that range. With fewer than four intervals there is no usual pace to stand out from,
   and the series is not judged.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, final, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.arguments import numbers_of, word
from lens_lora.banks.base_half import first_orders
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
from lens_lora.two_adapters.overlap import Pair, Thin, compared, thin_updates

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
        """g(1) − g(0) at each checkpoint, exact."""
        return self.adapted - self.base

    @property
    def noise_floor(self) -> Float[Tensor, "step batch"]:
        """σ of each checkpoint's shift from rounding."""
        return (self.noise[:1].square() + self.noise[1:].square()).sqrt()

    @property
    def first_order(self) -> Float[Tensor, "step batch"]:
        """Σ_l a_l at each checkpoint."""
        return self.effects.sum(2)

    @property
    def remainder(self) -> Float[Tensor, "step batch"]:
        """Shift minus first order."""
        return self.shift - self.first_order

    @property
    def flips(self) -> Float[Tensor, "step batch"]:
        """1 where the readout has another sign than at the base, else 0.

        0 where either is within three noise floors of zero, so that rounding hides its sign.
        """
        base = self.base.expand_as(self.adapted)
        base_noise = self.noise[:1]
        return changes_sign(base, self.adapted, base_noise, self.noise[1:]).double()

    @property
    def hidden(self) -> Bool[Tensor, "step batch"]:
        """Where rounding hides a sign, of the base or of the checkpoint."""
        at_base = hides_sign(self.base, self.noise[0])
        return at_base | hides_sign(self.adapted, self.noise[1:])

    @property
    def flip_step(self) -> Float[Tensor, " batch"]:
        """The step at which the readout first changes sign, linear between checkpoints; NaN where
        it never does, or rounding hides it."""
        steps = torch.tensor([0.0, *self.steps], dtype=torch.float64)
        values = torch.cat([self.base[None], self.adapted]).cpu().double()
        crossed = self.flips.cpu().int()
        first = crossed.argmax(0)
        columns = torch.arange(values.shape[1])
        low = values[first, columns]
        high = values[first + 1, columns]
        share = (low / (low - high)).clamp(0, 1)  # `low` may have crossed within rounding
        crossing = steps[first] + (steps[first + 1] - steps[first]) * share
        return torch.where(crossed.any(0), crossing, torch.nan)

    def to_frame(self) -> pd.DataFrame:
        """One row per checkpoint and prompt."""
        numbers = {
            "value": self.adapted,
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
        members = indicator(groups, len(self.sites)).double()
        if what == "effect":
            values = self.effects.cpu().double().mean(1) @ members.T
        elif what in ("read", "write"):
            angles = (self.read_angle if what == "read" else self.write_angle).cpu().double()
            counted = (~angles.isnan()).double() @ members.T
            values = angles.nan_to_num() @ members.T / counted
        else:
            sizes = self.moved if what == "moved" else self.norms
            values = (sizes.cpu().double().square() @ members.T).sqrt()
        return pd.DataFrame(values.T.numpy(), index=list(groups), columns=list(self.steps))

    def story(self) -> str:
        """Where each prompt flips, and where anything changes at once, in plain words."""
        return drawing.story(self)

    def plot_modules(self, what: What = "moved", group: GroupName = "layer") -> drawing.Figure:
        """Which modules move when: heatmap of groups by step.

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
    forward passes and one backward of the base (`banks/base_half.py`).

    Args:
        lens: any adapter over the base model, such as the last checkpoint's.
        adapters: the checkpoints in the order of training, or the folder or hub id of a run,
            whose `checkpoint-<step>` folders are found and sorted by step.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: what is read of the logits; a margin, for flips that mean something.
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
    g.require_logits("checkpoints")
    g.require_slope_at_base()
    base_noise = g.noise((1.0,), at=0.0)
    (base,) = g.along((0.0,))
    rows: list[dict[str, Tensor]] = []
    updates: list[dict[str, Thin]] = []
    sites: tuple[Site, ...] = ()
    with tqdm(run, desc="checkpoints", leave=False, disable=not progress) as bar:
        for adapter in bar:
            checkpoint = lens.with_adapter(adapter)
            sites = _same_sites(sites, checkpoint, adapter)
            of_step = Evaluations.of(g.over(checkpoint))
            of_step.know(0.0, base)
            rows.append(_measured(of_step))
            updates.append(thin_updates(checkpoint))
    series = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    effects = first_orders(g.lens, run, g.reading, lambda: run, sites)
    weights = _weights(updates)
    base = base.cpu().double()
    noise = torch.cat([base_noise[None].cpu().double(), series.pop("noise")])
    labels = g.labels()
    labels["meta"] = {**labels["meta"], "adapter": run[-1].name}
    return Checkpoints(
        steps=run_steps,
        names=tuple(adapter.name for adapter in run),
        sites=sites,
        base=base,
        effects=effects.cpu().double(),
        **series,
        **weights,
        phases=_phases(run_steps, base, series["adapted"], weights["angle"], noise),
        noise=noise,
        **labels,
    )


def _in_order(
    adapters: Sequence[Adapter] | str | Path,
    steps: Sequence[float] | None,
    revision: str | None,
    subfolder: str | None,
) -> tuple[tuple[Adapter, ...], tuple[float, ...]]:
    if isinstance(adapters, str | Path):
        if steps is not None:
            raise ArgumentError("the steps of a run folder are those of its checkpoint-<step>.")
        folders = checkpoint_folders(adapters, revision, subfolder)
        run = (load_adapter(path).named(path.name) for path in folders.values())
        return tuple(run), tuple(map(float, folders))
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
    increasing = all(a < b for a, b in itertools.pairwise([0.0, *numbers]))
    if len(numbers) != count or not increasing:
        raise ArgumentError(
            f"steps={numbers} for {count} checkpoints; expected one each, above 0 and increasing."
        )
    return tuple(adapters), tuple(numbers)


def _require_one_training(adapters: Sequence[Adapter]) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        if odd := sorted(set(first.modules) ^ set(other.modules)):
            has, lacks = (first, other) if odd[0] in first.modules else (other, first)
            raise ArgumentError(
                f"{has.name} adapts {odd[0]} and {lacks.name} does not ({len(odd)} such modules); "
                "checkpoints of one training adapt the same modules.",
                remedy="Two trainings are compared by ll.compare_adapters.",
            )
    require_one_base(adapters, "checkpoints of one training have one base model")


def _same_sites(sites: tuple[Site, ...], lens: LoraLens, adapter: Adapter) -> tuple[Site, ...]:
    names = [site.name for site in lens.sites]
    expected = [site.name for site in sites]
    if sites and names != expected:
        odd = sorted(set(names) ^ set(expected))
        raise ArgumentError(
            f"{adapter.name}: {odd[0]} is as in the base in one checkpoint and changed in another",
            remedy="leave such modules out: adapter.without(…).",
        )
    return lens.sites


def _measured(g: Evaluations) -> dict[str, Tensor]:
    """What is run of one checkpoint, of which g at the base is known.

    Ten forward passes along the path and four for the noise floor, and those that refine a flip.
    """
    scales = torch.tensor([i / 10 for i in range(1, 11)], dtype=g.lens.gate_dtype)
    values = g.along(scales.tolist())
    base, adapted = g.ends
    return {
        "adapted": adapted.cpu().double(),
        "flip_scale": flip_scales(g, base, scales.to(values.device), values.T),
        "noise": g.noise((1.0,), at=1.0).cpu().double(),
    }


def _weights(updates: Sequence[Mapping[str, Thin]]) -> dict[str, Tensor]:
    """Norms, moves and cosines of every site at every checkpoint."""
    norms = torch.stack([_norms(of_step) for of_step in updates])
    with_last = _inner([_pairs(of_step, updates[-1]) for of_step in updates])
    since = [_pairs(later, prior) for prior, later in itertools.pairwise(updates)]
    before = _inner(since)
    squares = norms.square()
    steps = squares[1:] + squares[:-1] - 2 * before
    moved = torch.cat([norms[:1], steps.clamp(min=0).sqrt()])
    sizes = squares.sum(1).sqrt()
    cosines = (with_last.sum(1) / (sizes * sizes[-1])).clamp(-1, 1)
    return {
        "norms": norms,
        "moved": moved,
        "to_final": with_last / (norms * norms[-1]),
        "read_angle": _turned([[pair.read for pair in pairs] for pairs in since]),
        "write_angle": _turned([[pair.write for pair in pairs] for pairs in since]),
        "angle": torch.rad2deg(cosines.acos()),
    }


def _norms(updates: Mapping[str, Thin]) -> Float[Tensor, " site"]:
    return torch.stack([update.sigma.norm() for update in updates.values()])


def _pairs(mine: Mapping[str, Thin], theirs: Mapping[str, Thin]) -> list[Pair]:
    return [compared(update, theirs[name]) for name, update in mine.items()]


def _inner(pairs: Sequence[Sequence[Pair]]) -> Float[Tensor, "step site"]:
    return torch.tensor([[pair.inner for pair in row] for row in pairs], dtype=torch.float64)


def _turned(cosines: Sequence[Sequence[Tensor]]) -> Float[Tensor, "step site"]:
    """acos √(mean cos²), in degrees, beneath a row of NaN for the first checkpoint."""
    rows = [torch.stack([site.square().mean() for site in row]) for row in cosines]
    shared = torch.stack(rows)
    angles = torch.rad2deg(shared.clamp(max=1).sqrt().acos())
    return torch.cat([torch.full_like(angles[:1], torch.nan), angles])


# --- phase changes


TIMES = 3.0  # the pace of a change, over the usual one
PART = 0.1  # of the range of the series, that each interval changes at least
SHARE = 0.25  # of the range, that the whole span changes at least
_FEWEST = 4  # intervals of a series that can be judged
_TURNED = 0.1  # degrees by which saving in half precision turns ΔW


def _phases(
    steps: tuple[float, ...], base: Tensor, adapted: Tensor, angle: Tensor, noise: Tensor
) -> dict[str, tuple[tuple[float, float], ...]]:
    """The phase changes of each prompt's readout, and of the direction of ΔW."""
    values = torch.cat([base[None], adapted])
    judged: dict[str, tuple[tuple[float, float], ...] | None] = {}
    for p in range(len(base)):
        judged[f"prompt {p}"] = phase_changes(
            (0.0, *steps), values[:, p].tolist(), noise[:, p].tolist()
        )
    judged["angle"] = phase_changes(steps, angle.tolist(), [_TURNED] * len(steps))
    return {name: spans for name, spans in judged.items() if spans is not None}


def phase_changes(
    steps: Sequence[float], values: Sequence[float], floors: Sequence[float] | None = None
) -> tuple[tuple[float, float], ...] | None:
    """(first step, last step) of each phase change; None of a series that is too short to judge."""
    changes = np.diff(values)
    if len(changes) < _FEWEST:
        return None
    noise = np.zeros(len(values)) if floors is None else np.array(floors)
    span = np.ptp(values)
    paces = np.abs(changes) / np.diff(steps)
    usual = np.sort(paces)[(len(paces) - 1) // 2]
    least = np.maximum(PART * span, SIGMAS * np.hypot(noise[:-1], noise[1:]))
    stands_out = (paces > TIMES * usual) & (np.abs(changes) > least)
    spans: list[tuple[float, float]] = []
    start = 0
    for sign, run in itertools.groupby(np.where(stands_out, np.sign(changes), 0.0)):
        end = start + len(list(run))
        if sign and abs(values[end] - values[start]) >= SHARE * span:
            spans.append((float(steps[start]), float(steps[end])))
        start = end
    return tuple(spans)
