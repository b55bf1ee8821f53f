"""Effects of activation patching: one number per prompt and hook point, and position."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.errors import ArgumentError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["ActivationEffects"]

_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclasses.dataclass(frozen=True, eq=False)
class ActivationEffects:
    """What replacing one activation by the other model's does to a readout, in its units.

    Attributes:
        values: [batch, name], or [batch, name, position] where each position was patched alone;
            NaN where a prompt has no such position. Positive where the adapted model's activation
            raises the readout.
        names: hook points.
        base, adapted: [batch], g(0) and g(1).
        direction: 'base_to_adapted', g(1) − g(patched), or 'adapted_to_base', g(patched) − g(0).
        positions: what was patched: 'all', 'each', or indices, together.
        meta: model, adapter, dtype and versions.
    """

    values: Float[Tensor, "batch name *position"]
    names: tuple[str, ...]
    base: Float[Tensor, "batch"]
    adapted: Float[Tensor, "batch"]
    str_tokens: tuple[tuple[str, ...], ...]
    readout: str
    units: str
    direction: str
    positions: str
    meta: Mapping[str, str]

    @property
    def shift(self) -> Float[Tensor, "batch"]:
        """g(1) − g(0), exact."""
        return self.adapted - self.base

    @property
    def share(self) -> Float[Tensor, "batch name *position"]:
        """The effects as shares of the shift: 1 where the activation carries all of it."""
        return self.values / self.shift.view(-1, *[1] * (self.values.ndim - 1))

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
        values, share = self.values.double().cpu(), self.share.double().cpu()
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

    def top(self, k: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The k hook points (and positions) of largest |effect|.

        Args:
            prompt: an index; without it, the mean over prompts (by position: of a single prompt).

        Raises:
            ArgumentError: by position, several prompts and no index.
        """
        values, shift = self.of_prompt(prompt)
        flat = values.flatten()
        order = flat.abs().nan_to_num(-1.0).argsort(descending=True)
        order = order[~flat[order].isnan()][:k].tolist()
        width = values.shape[1] if self.by_position else 1
        columns: dict[str, object] = {"name": [self.names[i // width] for i in order]}
        if self.by_position:
            tokens = self.str_tokens[prompt or 0]
            columns["position"] = [i % width for i in order]
            columns["token"] = [tokens[i % width] for i in order]
        columns["effect"] = [float(flat[i]) for i in order]
        columns["share"] = [float(flat[i]) / shift for i in order]
        return pd.DataFrame(columns)

    def of_prompt(self, prompt: int | None) -> tuple[Float[Tensor, "name *position"], float]:
        """One prompt's effects and shift in float64, or the mean over prompts.

        Raises:
            ArgumentError: no such prompt; by position, several prompts and no index.
        """
        batch = len(self.base)
        if prompt is not None and not 0 <= prompt < batch:
            raise ArgumentError(f"prompt {prompt}: the result has prompts 0 to {batch - 1}.")
        if prompt is None and self.by_position and batch > 1:
            raise ArgumentError(
                f"positions of {batch} prompts are not the same tokens, so they have no mean; "
                "choose one with prompt=…."
            )
        rows = slice(None) if prompt is None else slice(prompt, prompt + 1)
        values, shift = self.values.double().cpu(), self.shift.double().cpu()
        return torch.mean(values[rows], 0), float(shift[rows].mean())

    def plot(self, prompt: int | None = None) -> Figure:
        """Hook point × position, or layer × hook point; mean over prompts, or one prompt.

        Raises:
            ArgumentError: as `top`.
        """
        from lens_lora.show.figures.effects import activation_figure

        return activation_figure(self, prompt)

    def __repr__(self) -> str:
        first = 0 if self.by_position and len(self.base) > 1 else None
        of = "" if first is None else f", prompt 0 of {len(self.base)}"
        top = self.top(5, first).to_string()
        return f"ActivationEffects {self.direction} on {self.readout}{of}:\n{top}"
