"""One fine-tune through its training: every scalar of it as a series over the steps."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal, final

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.arguments import word
from lens_lora.hooked.sites import Groups, Site, group_sites, indicator
from lens_lora.results import drawing
from lens_lora.results.measured import Read, site_labels
from lens_lora.results.signs import changes_sign, hides_sign

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["Checkpoints"]

What = Literal["moved", "effect", "norm"]


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Checkpoints(Read):
    """A readout, its first order and the weights at each checkpoint of a training.

    The base model is step 0 of every series, before the first checkpoint.

    Attributes:
        steps: of the checkpoints, increasing.
        names: of their adapters.
        sites: that every checkpoint adapts.
        base: [batch], g(0): the readout of the base model.
        adapted: [step, batch], g(1) of each checkpoint, exact.
        effects: [step, batch, site], first order at ε = 0.
        flip_scale: [step, batch], the first ε at which the readout changes sign at that checkpoint;
            NaN where it does not.
        norms: [step, site], ‖ΔW‖_F.
        moved: [step, site], ‖ΔW_k − ΔW_{k−1}‖_F since the checkpoint before, or since zero.
        to_final: [step, site], cosine of ΔW to that of the last checkpoint.
        angle: [step], between ΔW of all sites and the last checkpoint's, in degrees.
        phases: series → the spans of steps in which it changes at once
            (`analyses/phase_changes.py`); 'prompt 0', … for the readout, 'angle' for the direction.
        noise: [1 + step, batch], σ of the readout from rounding: of the base, then of each
            checkpoint.
        str_tokens, readout, units, meta: as in `Read`.
    """

    steps: tuple[float, ...]
    names: tuple[str, ...]
    sites: tuple[Site, ...]
    base: Float[Tensor, "batch"]
    adapted: Float[Tensor, "step batch"]
    effects: Float[Tensor, "step batch site"]
    flip_scale: Float[Tensor, "step batch"]
    norms: Float[Tensor, "step site"]
    moved: Float[Tensor, "step site"]
    to_final: Float[Tensor, "step site"]
    angle: Float[Tensor, "step"]
    phases: dict[str, tuple[tuple[float, float], ...]]
    noise: Float[Tensor, "base_and_step batch"]

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
        base, adapted = self._ends
        return changes_sign(base, adapted, *self._end_floors).double()

    @property
    def hidden(self) -> Bool[Tensor, "step batch"]:
        """Where rounding hides a sign, of the base or of the checkpoint."""
        return hides_sign(self._ends, self._end_floors).any(0)

    @property
    def _ends(self) -> Float[Tensor, "two step batch"]:
        return torch.stack([self.base.expand_as(self.adapted), self.adapted])

    @property
    def _end_floors(self) -> Float[Tensor, "two step batch"]:
        return torch.stack([self.noise[:1].expand_as(self.adapted), self.noise[1:]])

    @property
    def flip_step(self) -> Float[Tensor, "batch"]:
        """The step at which the readout first changes sign, linear between checkpoints; NaN where
        it never does, or rounding hides it."""
        steps = torch.tensor([0.0, *self.steps], dtype=torch.float64)
        values = torch.cat([self.base[None], self.adapted]).cpu().double()
        crossed = self.flips.cpu().int()
        first = crossed.argmax(0)
        columns = torch.arange(values.shape[1])
        low, high = values[first, columns], values[first + 1, columns]
        share = (low / (low - high)).clamp(0, 1)  # `low` may have crossed within rounding
        at = steps[first] + (steps[first + 1] - steps[first]) * share
        return torch.where(crossed.any(0), at, torch.nan)

    def to_frame(self) -> pd.DataFrame:
        """One row per checkpoint and prompt."""
        batch = len(self.base)
        series = {
            "value": self.adapted,
            "shift": self.shift,
            "first_order": self.first_order,
            "remainder": self.remainder,
            "flips": self.flips.bool(),
            "hidden": self.hidden,
            "flip_scale": self.flip_scale,
            "angle": self.angle[:, None].expand(-1, batch),
            "norm": self.norms.square().sum(1).sqrt()[:, None].expand(-1, batch),
        }
        labels = {
            "step": [step for step in self.steps for _ in range(batch)],
            "prompt": list(range(batch)) * len(self.steps),
        }
        return pd.DataFrame(labels | {k: v.flatten().tolist() for k, v in series.items()})

    def modules_to_frame(self) -> pd.DataFrame:
        """One row per checkpoint and site: norm, how far it moved, cosine to the last, effect."""
        count = len(self.sites)
        series = {
            "norm": self.norms,
            "moved": self.moved,
            "to_final": self.to_final,
            "effect": self.effects.mean(1),
        }
        steps = [step for step in self.steps for _ in range(count)]
        labels = {"step": steps, **site_labels(self.sites, len(self.steps))}
        return pd.DataFrame(labels | {k: v.flatten().tolist() for k, v in series.items()})

    def by_group(
        self, what: What = "moved", group: Literal["site", "layer", "kind"] = "layer"
    ) -> pd.DataFrame:
        """Rows of groups, columns of steps.

        Args:
            what: 'moved' and 'norm', roots of sums of squares; 'effect', the sum of first order,
                mean over prompts.
            group: 'site', 'layer' or 'kind'.

        Raises:
            ArgumentError: another `what` or `group`.
        """
        word("what", what, ("moved", "effect", "norm"))
        groups: Groups = group_sites(self.sites, group)
        members = indicator(groups, len(self.sites)).double()
        if what == "effect":
            found = self.effects.cpu().double().mean(1) @ members.T
        else:
            of = self.moved if what == "moved" else self.norms
            found = (of.cpu().double().square() @ members.T).sqrt()
        return pd.DataFrame(found.T.numpy(), index=list(groups), columns=list(self.steps))

    def story(self) -> str:
        """Where each prompt flips, and where anything changes at once, in plain words."""
        return drawing.story(self)

    def plot(self) -> Figure:
        """The readout of each prompt over the steps, its first order, flips and phase changes."""
        return drawing.figure(self)

    def plot_modules(
        self, what: What = "moved", group: Literal["site", "layer", "kind"] = "layer"
    ) -> Figure:
        """Which modules move when: heatmap of groups by step.

        Args:
            what, group: as for `by_group`.

        Raises:
            ArgumentError: another `what` or `group`.
        """
        return drawing.modules(self, what, group)
