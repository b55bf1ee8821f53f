"""What an adapter does to features: results of `feature_shift` and `feature_writes`.

A feature is a direction d in the space of an activation h; its value is d·h. A sparse autoencoder's
features are its encoder's columns, and d·h its pre-activation up to the encoder's own bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.hooked.sites import Site, match_sites
from lens_lora.results import drawing
from lens_lora.results.choosing import largest, only_prompt, prompt_rows
from lens_lora.results.measured import Result, site_labels

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["FeatureShift", "FeatureWrites"]


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureShift(Result):
    """How far the adapter moves each feature at one hook point, exactly and to first order.

    Attributes:
        base: [batch, feature], d·h at ε = 0; [batch, feature, position] for every position (NaN
            where a prompt has no such position), and so all values below.
        shift: d·(h(scale) − h(0)), exact. For an autoencoder, its pre-activations' change.
        first_order: d·∂h along the adapter, at ε = at·scale.
        noise_floor: σ of a shift from rounding alone, the mean square over features: [batch], or
            [batch, position].
        activations: an autoencoder's activations at ε = 0 and at ε = scale; None for directions,
            or where the autoencoder has no `encode`.
        name: of the hook point where h is.
        positions: the index within each prompt, or 'each' for one number per position.
        str_tokens: each prompt's tokens.
        features: what the directions are: 'directions', 'encoder'.
        units: of the values.
        at: where along the way to `scale` the derivative is taken.
        meta: model, adapter, dtype and versions.
    """

    base: Float[Tensor, "batch feature *position"]
    shift: Float[Tensor, "batch feature *position"]
    first_order: Float[Tensor, "batch feature *position"]
    noise_floor: Float[Tensor, "batch *position"]
    activations: tuple[Tensor, Tensor] | None
    name: str
    positions: int | Literal["each"]
    str_tokens: tuple[tuple[str, ...], ...]
    features: str
    units: str
    at: float
    meta: Mapping[str, str]

    @property
    def remainder(self) -> Float[Tensor, "batch feature *position"]:
        """shift − first order: what the model's nonlinearity adds."""
        return self.shift - self.first_order

    @property
    def by_position(self) -> bool:
        """Whether every position has its own values."""
        return self.positions == "each"

    def columns(self) -> dict[str, Tensor]:
        """The values by the names that tables give them, in float64 on the CPU."""
        found = {
            "base": self.base,
            "shift": self.shift,
            "first_order": self.first_order,
            "remainder": self.remainder,
        }
        if self.activations is not None:
            found["activation_base"], found["activation_adapted"] = self.activations
        return {name: values.double().cpu() for name, values in found.items()}

    def of_prompt(self, prompt: int | None) -> dict[str, Float[Tensor, "feature *position"]]:
        """One prompt's values, or the mean over prompts.

        Args:
            prompt: an index; without it the mean over prompts, or by position the only prompt.

        Raises:
            ArgumentError: no such prompt; by position, several prompts and none named.
        """
        batch = len(self.base)
        if self.by_position:
            prompt = only_prompt(prompt, batch, "positions")
        rows = prompt_rows(prompt, batch)
        return {name: values[rows].mean(0) for name, values in self.columns().items()}

    def top(self, k: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The k features (and positions) of largest |shift|.

        Args:
            k: how many.
            prompt: an index; without it the mean over prompts, or by position the only prompt.

        Raises:
            ArgumentError: no such prompt; by position, several prompts and none named.
        """
        values = self.of_prompt(prompt)
        order = largest(values["shift"], k)
        width = values["shift"].shape[1] if self.by_position else 1
        columns: dict[str, Any] = {"feature": [i // width for i in order]}
        if self.by_position:
            tokens = self.str_tokens[only_prompt(prompt, len(self.base))]
            columns["position"] = [i % width for i in order]
            columns["token"] = [tokens[i % width] for i in order]
        columns |= {name: v.flatten()[order].tolist() for name, v in values.items()}
        return pd.DataFrame(columns)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, feature and existing position."""
        index = (~self.shift.isnan()).cpu().nonzero()
        columns: dict[str, Any] = {"prompt": index[:, 0].tolist(), "feature": index[:, 1].tolist()}
        if self.by_position:
            columns["position"] = at = index[:, 2].tolist()
            pairs = zip(columns["prompt"], at, strict=True)
            columns["token"] = [self.str_tokens[p][i] for p, i in pairs]
        where = tuple(index.T)
        return pd.DataFrame(columns | {n: v[where].tolist() for n, v in self.columns().items()})

    def plot(self, k: int = 20, prompt: int | None = None) -> Figure:
        """The k features of largest |shift|: bars with their first order, or feature × position.

        Args:
            k: how many.
            prompt: an index; without it the mean over prompts, or by position the only prompt.

        Raises:
            ArgumentError: no such prompt; by position, several prompts and none named.
        """
        return drawing.figure(self, k, prompt)


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureWrites(Result):
    """What each site writes to each feature: d·δz_l, before any later module has seen it.

    Attributes:
        values: [batch, site, feature], at one position.
        sites: those that write to the residual stream.
        positions: the index within each prompt.
        str_tokens, features, units, at, meta: as in `FeatureShift`.
    """

    values: Float[Tensor, "batch site feature"]
    sites: tuple[Site, ...]
    positions: int
    str_tokens: tuple[tuple[str, ...], ...]
    features: str
    units: str
    at: float
    meta: Mapping[str, str]

    def top(self, site: str | None = None, k: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The k pairs of site and feature of largest |d·δz|, of one site or of all.

        Args:
            site: its name; without it, all sites.
            k: how many.
            prompt: an index; without it, the mean over prompts.

        Raises:
            SiteError: no site that writes has this name.
            ArgumentError: no such prompt.
        """
        chosen = list(range(len(self.sites)))
        if site is not None:
            chosen = list(match_sites([s.name for s in self.sites], {site: 0}))
        values = self.of_prompt(prompt)[chosen]
        order, width = largest(values, k), values.shape[1]
        return pd.DataFrame(
            {
                "site": [self.sites[chosen[i // width]].name for i in order],
                "feature": [i % width for i in order],
                "write": values.flatten()[order].tolist(),
            }
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, site and feature."""
        batch, sites, features = self.values.shape
        index = torch.cartesian_prod(*map(torch.arange, (batch, sites, features)))
        labels = site_labels([self.sites[i] for i in index[:, 1].tolist()])
        return pd.DataFrame(
            {
                "prompt": index[:, 0].tolist(),
                **{name: labels[name] for name in ("site", "layer", "kind")},
                "feature": index[:, 2].tolist(),
                "write": self.values.double().cpu().flatten().tolist(),
            }
        )

    def plot(self, k: int = 20, prompt: int | None = None) -> Figure:
        """Site × feature, of the k features that are written most.

        Args:
            k: how many features.
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        return drawing.figure(self, k, prompt)

    def of_prompt(self, prompt: int | None) -> Float[Tensor, "site feature"]:
        """One prompt's values in float64, or the mean over prompts.

        Args:
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        return self.values[prompt_rows(prompt, len(self.values))].double().cpu().mean(0)
