"""Effects of real interventions on sites or groups of sites: one number per prompt and group."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lens_lora.attribution import Attribution
from lens_lora.groups import Groups, indicator
from lens_lora.hooked.sites import Site

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["Effects"]


@dataclasses.dataclass(frozen=True, eq=False)
class Effects:
    """What intervening on each group of sites does to a readout, exactly, in its units.

    Attributes:
        values: [batch, group]. Positive where the group raises the readout.
        groups: {name: indices into sites}; single sites carry their own name.
        sites: the adapted sites of the lens.
        base, adapted: [batch], g(0) and g(1).
        how: 'add_one', g(e_G) − g(0), or 'leave_one_out', g(1) − g(1 − e_G).
        meta: model, adapter, dtype and versions.
    """

    values: Float[Tensor, "batch group"]
    groups: Groups
    sites: tuple[Site, ...]
    base: Float[Tensor, "batch"]
    adapted: Float[Tensor, "batch"]
    str_tokens: tuple[tuple[str, ...], ...]
    readout: str
    units: str
    how: str
    meta: Mapping[str, str]

    @property
    def shift(self) -> Float[Tensor, "batch"]:
        """g(1) − g(0), exact."""
        return self.adapted - self.base

    @property
    def is_by_site(self) -> bool:
        """Whether the groups are the single sites, all of them."""
        return list(self.groups.values()) == [(i,) for i in range(len(self.sites))]

    def summed(self, attribution: Attribution) -> Float[Tensor, "batch group"]:
        """An attribution of the same sites, summed over each group.

        Raises:
            ValueError: it is of other sites.
        """
        names = [site.name for site in self.sites]
        if [site.name for site in attribution.sites] != names:
            raise ValueError(
                f"the attribution is of {len(attribution.sites)} sites, the effects of {len(names)}"
                "; compute both with the same lens."
            )
        rows = indicator(self.groups, len(names)).to(attribution.per_site)
        return attribution.per_site @ rows.T

    def attribution(self) -> Attribution:
        """The effects of single sites as an attribution: for its heatmap, table and file.

        Raises:
            ValueError: the effects are of groups.
        """
        if not self.is_by_site:
            raise ValueError("effects of groups are no attribution to sites; use group='site'.")
        return Attribution(
            values=self.values,
            by=(),
            sites=self.sites,
            heads=(0,) * len(self.sites),
            base=self.base,
            adapted=self.adapted,
            str_tokens=self.str_tokens,
            readout=self.readout,
            units=self.units,
            method=self.how,
            at=float(self.how == "leave_one_out"),
            meta=self.meta,
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and group: effect, share of the shift."""
        batch, count = self.values.shape
        values = self.values.double().cpu()
        share = values / self.shift.double().cpu()[:, None]
        return pd.DataFrame(
            {
                "prompt": np.repeat(np.arange(batch), count),
                "group": list(self.groups) * batch,
                "effect": values.flatten().numpy(),
                "share": share.flatten().numpy(),
            }
        )

    def top(self, k: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The k groups of largest |effect|; mean over prompts, or one prompt."""
        rows = slice(None) if prompt is None else slice(prompt, prompt + 1)
        values, shift = self.values[rows].double().mean(0), self.shift[rows].double().mean()
        order, names = values.abs().argsort(descending=True)[:k].tolist(), list(self.groups)
        return pd.DataFrame(
            {
                "group": [names[i] for i in order],
                "effect": [float(values[i]) for i in order],
                "share": [float(values[i] / shift) for i in order],
            }
        )

    def plot(self, prompt: int | None = None) -> Figure:
        """Heatmap layer × kind of module; of single sites."""
        return self.attribution().plot(prompt)

    def __repr__(self) -> str:
        return f"Effects of {self.how} on {self.readout}:\n{self.top(5).to_string()}"
