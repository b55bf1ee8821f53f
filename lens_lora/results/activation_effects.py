"""Effects of activation patching: one number per prompt and hook point, and position."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.results import drawing
from lens_lora.results.choosing import only_prompt, prompt_rows
from lens_lora.results.measured import Entries, Ranked

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["ActivationEffects"]

_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ActivationEffects(Ranked):
    """What replacing one activation by the other model's does to a readout, in its units.

    Attributes:
        values: [batch, name], or [batch, name, position] where each position was patched alone;
            NaN where a prompt has no such position. Positive where the adapted model's activation
            raises the readout.
        names: hook points.
        direction: 'base_to_adapted', g(1) − g(patched), or 'adapted_to_base', g(patched) − g(0).
        positions: what was patched: 'all', 'each', or indices, together.
        noise_floor: [batch], σ of an effect from rounding alone; None where it was not measured.
        sites, base, adapted, str_tokens, readout, units, meta: as in `Measured`.
    """

    values: Float[Tensor, "batch name *position"]
    names: tuple[str, ...]
    direction: str
    positions: str
    noise_floor: Float[Tensor, "batch"] | None = None

    @property
    def share(self) -> Float[Tensor, "batch name *position"]:
        """The effects as shares of the shift: 1 where the activation carries all of it."""
        return self.share_of(self.values)

    @property
    def by_position(self) -> bool:
        """Whether each position was patched alone."""
        return self.values.ndim == 3

    @property
    def places(self) -> tuple[tuple[int | None, str], ...]:
        """Each name's layer and the rest of it: (3, 'hook_resid_pre'); None outside the blocks."""
        found = [_IN_BLOCK.fullmatch(name) for name in self.names]
        return tuple(
            (None, name) if match is None else (int(match[1]), match[2])
            for name, match in zip(self.names, found, strict=True)
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, hook point and existing position: effect, share of the shift."""
        values, share = self.values.cpu().double(), self.share.cpu().double()
        index = (~values.isnan()).nonzero()
        prompts, names = index[:, 0].tolist(), index[:, 1].tolist()
        columns: dict[str, object] = {
            "prompt": prompts,
            "name": [self.names[i] for i in names],
            "layer": pd.array([self.places[i][0] for i in names], dtype="Int64"),
            "hook": [self.places[i][1] for i in names],
        }
        if self.by_position:
            at = index[:, 2].tolist()
            columns["position"] = at
            columns["token"] = [self.str_tokens[p][i] for p, i in zip(prompts, at, strict=True)]
        columns["effect"] = values[tuple(index.T)].tolist()
        columns["share"] = share[tuple(index.T)].tolist()
        return pd.DataFrame(columns)

    def entries(self, prompt: int | None = None) -> Entries:
        """Each hook point's effect, or that of each of its positions.

        Args:
            prompt: an index; without it the mean over prompts, or by position the only prompt.

        Raises:
            ArgumentError: no such prompt; by position, several prompts and none named.
        """
        values, shift = self.of_prompt(prompt)
        width = values.shape[1] if self.by_position else 1
        labels: dict[str, list[object]] = {"name": [n for n in self.names for _ in range(width)]}
        if self.by_position:
            tokens = self.str_tokens[only_prompt(prompt, len(self.base))]
            padded = [*tokens, *[""] * (width - len(tokens))]
            labels["position"] = [*range(width)] * len(self.names)
            labels["token"] = [*padded] * len(self.names)
        return Entries(labels, values.flatten(), shift, "effect")

    def of_prompt(
        self, prompt: int | None
    ) -> tuple[Float[Tensor, "name *position"], Float[Tensor, ""]]:
        """One prompt's effects and shift in float64, or the mean over prompts.

        Args:
            prompt: an index; without it the mean over prompts, or by position the only prompt.

        Raises:
            ArgumentError: no such prompt; by position, several prompts and none named.
        """
        batch = len(self.base)
        if self.by_position:
            prompt = only_prompt(prompt, batch, "positions")
        rows = prompt_rows(prompt, batch)
        values, shift = (x[rows].cpu().double() for x in (self.values, self.shift))
        return torch.mean(values, 0), shift.mean()

    def plot(self, prompt: int | None = None) -> Figure:
        """Hook point × position, or layer × hook point.

        Args:
            prompt: an index; without it the mean over prompts, or by position the only prompt.

        Raises:
            ArgumentError: no such prompt; by position, several prompts and none named.
        """
        return drawing.figure(self, prompt)
