"""The results of `checkpoints`: one training, or several trainings side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, final, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.arguments import word
from lens_lora.core import (
    Drawn,
    Paged,
    Pictured,
    Read,
    Site,
    Sites,
    changes_sign,
    drawing,
    hides_sign,
    tables,
)
from lens_lora.errors import ArgumentError

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
        sites: the sites that every checkpoint adapts.
        base: [batch], g(0): the readout of the base model.
        adapted: [step, batch], g(1) of each checkpoint, exact.
        effects: [step, batch, site], first order at ε = 0.
        flip_scale: [step, batch], the first ε at which the readout changes sign at that checkpoint;
            NaN where it does not.
        norms: [step, site], ‖ΔW‖_F.
        moved: [step, site], ‖ΔW_k − ΔW_{k−1}‖_F since the checkpoint before, or since zero.
        to_final: [step, site], cosine of ΔW to that of the last checkpoint. For a rank-1 site it is
            the cosine of what is read times that of what is written, so it mixes both.
        read_angle, write_angle: [step, site], in degrees, between what ΔW reads (its row space), or
            writes (its column space), and the same at the checkpoint before: acos √(mean cos²) of
            the principal angles. NaN at the first checkpoint, and for a norm.
        angle: [step], between ΔW of all sites and the last checkpoint's, in degrees.
        phases: series → the spans of steps in which it changes at once; 'prompt 0', … for the
            readout, 'angle' for the direction. A series of fewer than four intervals is not judged
            and has no entry.
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
        frame = tables.long_table(numbers, {"step": self.steps}, {"prompt": range(len(self.base))})
        return frame.astype({"flips": bool, "hidden": bool})

    def by_group(self, what: What = "moved", group: GroupName = "layer") -> pd.DataFrame:
        """A table with a row per group of modules and a column per step.

        Args:
            what: 'moved' or 'norm', the root of the sum of squares over sites; 'effect', the sum
                of first order, mean over prompts; 'read' or 'write', the mean angle to the
                checkpoint before.
            group: 'site', 'layer' or 'kind'.

        Raises:
            ArgumentError: another `what` or `group`.
        """
        word("what", what, get_args(What))
        groups = Sites(self.sites).grouped(group)
        members = Sites(self.sites).indicator(groups).double().T

        def sums(values: Float[Tensor, "step site"]) -> Float[Tensor, "step group"]:
            return values.cpu().double() @ members

        def mean_angles(angles: Float[Tensor, "step site"]) -> Float[Tensor, "step group"]:
            """The mean over a group's sites, without those that have no angle."""
            count = sums((~angles.isnan()).double())
            return sums(angles.nan_to_num()) / count

        match what:
            case "effect":
                values = sums(self.effects.cpu().double().mean(1))
            case "moved":
                values = sums(self.moved.cpu().double().square()).sqrt()
            case "norm":
                values = sums(self.norms.cpu().double().square()).sqrt()
            case "read":
                values = mean_angles(self.read_angle)
            case "write":
                values = mean_angles(self.write_angle)
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


# What is taken over runs: their mean, or their sample standard deviation.
Over = Literal["mean", "spread"]


@final
class Trainings(Read, Paged, Drawn):
    """The same readout through several trainings, such as one recipe from several seeds.

    `found.of_run("seed 0")` is the training of that run, with everything that `Checkpoints` has.
    `plot` is the readout of each run over the steps, and their mean within one standard deviation.

    Means and spreads over runs are taken at the steps that every run has. A spread is the sample
    standard deviation, NaN for a single run.

    Attributes:
        runs: the names of the runs.
        each: the training of each run.
        str_tokens, readout, units, meta: as in `Read`; `meta` names the last checkpoint of each.
    """

    runs: Annotated[tuple[str, ...], "run"]
    each: Annotated[tuple[Checkpoints, ...], "run"]

    def of_run(self, run: str) -> Checkpoints:
        """The training of one run.

        Args:
            run: its name.

        Raises:
            ArgumentError: no run has this name; the error lists the names.
        """
        word("run", run, self.runs)
        return self.each[self.runs.index(run)]

    @property
    def steps(self) -> tuple[float, ...]:
        """The steps at which every run has a checkpoint, increasing."""
        of_all = set(self.each[0].steps)
        for training in self.each[1:]:
            of_all &= set(training.steps)
        return tuple(sorted(of_all))

    @property
    def base(self) -> Float[Tensor, " batch"]:
        """The readout of the base model, which all runs begin from."""
        return self.each[0].base

    @property
    def adapted(self) -> Float[Tensor, "run step batch"]:
        """The readout of each run's checkpoints, exact, at `steps`."""
        return self._at_steps(lambda training: training.adapted)

    @property
    def shift(self) -> Float[Tensor, "run step batch"]:
        """The exact shift of each run's checkpoints, at `steps`."""
        return self._at_steps(lambda training: training.shift)

    @property
    def first_order(self) -> Float[Tensor, "run step batch"]:
        """The sum of first order over the sites, of each run's checkpoints, at `steps`."""
        return self._at_steps(lambda training: training.first_order)

    @property
    def flip_step(self) -> Float[Tensor, "run batch"]:
        """The step at which the readout first changes sign in each run; NaN where it does not."""
        return torch.stack([training.flip_step for training in self.each])

    def _at_steps(self, read: Callable[[Checkpoints], Tensor]) -> Float[Tensor, "run step batch"]:
        """Values of each run, at the steps that all runs have."""
        values: list[Tensor] = []
        for training in self.each:
            of_shared_steps = [training.steps.index(step) for step in self.steps]
            values.append(read(training)[of_shared_steps])
        return torch.stack(values)

    def to_frame(self) -> pd.DataFrame:
        """One row per run, checkpoint and prompt, at all steps that the run has."""
        frames: list[pd.DataFrame] = []
        for run, training in zip(self.runs, self.each, strict=True):
            frame = training.to_frame()
            frame.insert(0, "run", run)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """One row per step and prompt: the means over runs, their spreads, and how many flip."""
        labels = [{"step": self.steps}, {"prompt": range(len(self.base))}]
        numbers: dict[str, Tensor] = {}
        for name, values in (
            ("adapted", self.adapted),
            ("shift", self.shift),
            ("first_order", self.first_order),
        ):
            numbers[name] = values.mean(0)
            numbers[f"{name}_spread"] = spread_over_runs(values)
        numbers["flips"] = self._at_steps(lambda training: training.flips).sum(0)
        return tables.long_table(numbers, *labels).astype({"flips": int})

    def by_group(
        self, what: What = "moved", group: GroupName = "layer", over: Over = "mean"
    ) -> pd.DataFrame:
        """A row per group of modules and a column per step: the mean over runs, or their spread.

        Args:
            what, group: as for `Checkpoints.by_group`.
            over: 'mean' over runs, or 'spread', their standard deviation.

        Raises:
            ArgumentError: another `what`, `group` or `over`; runs that adapt different modules.
        """
        word("over", over, get_args(Over))
        self._require_same_sites()
        steps = list(self.steps)
        of_runs = [training.by_group(what, group)[steps] for training in self.each]
        values = torch.stack([torch.tensor(of_run.to_numpy()) for of_run in of_runs])
        over_runs = values.mean(0) if over == "mean" else spread_over_runs(values)
        return pd.DataFrame(over_runs.numpy(), index=of_runs[0].index, columns=steps)

    def _require_same_sites(self) -> None:
        first = {site.name for site in self.each[0].sites}
        for run, training in zip(self.runs, self.each, strict=True):
            unshared = sorted(first ^ {site.name for site in training.sites})
            if unshared:
                raise ArgumentError(
                    f"{self.runs[0]} and {run} differ in {unshared[0]} "
                    f"({len(unshared)} such sites), so their modules have no mean",
                    remedy=f"look at one run: found.of_run({run!r}).",
                )

    @property
    def has_same_sites(self) -> bool:
        """Whether all runs adapt the same modules, so that these have means over runs."""
        first = {site.name for site in self.each[0].sites}
        return all({site.name for site in other.sites} == first for other in self.each)

    def story(self) -> str:
        """Where each prompt flips in each run, and where the runs end, in plain words."""
        return drawing.story(self)

    def plot_modules(self, what: What = "moved", group: GroupName = "layer") -> drawing.Figure:
        """A heatmap of groups by step, the mean over runs; the hover text has their spread.

        Args:
            what, group: as for `by_group`.

        Raises:
            ArgumentError: another `what` or `group`; runs that adapt different modules.
        """
        return drawing.modules(self, what, group)


def spread_over_runs(values: Float[Tensor, " run *rest"]) -> Float[Tensor, " *rest"]:
    """The sample standard deviation over runs; NaN for a single run."""
    if len(values) == 1:
        return torch.full_like(values[0], torch.nan)
    return values.std(0)
