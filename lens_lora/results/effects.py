"""Effects of real interventions on sites or groups of sites: one number per prompt and group."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lens_lora.errors import ArgumentError
from lens_lora.hooked.sites import Groups, Site, indicator
from lens_lora.results import drawing
from lens_lora.results.attribution import Attribution
from lens_lora.results.measured import Entries, Ranked

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["Effects"]


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Effects(Ranked):
    """What intervening on each group of sites does to a readout, exactly, in its units.

    Attributes:
        values: [batch, group]. Positive where the group raises the readout.
        groups: {name: indices into sites}; single sites carry their own name.
        how: 'add_one', g(e_G) − g(0), or 'leave_one_out', g(1) − g(1 − e_G).
        of: 'site', or 'rank' where each group is one rank of its only site, as 'blocks.0.attn.q[2]'
            names it, in the coordinates of the SVD of ΔW.
        replace: what stood in the place of δ_G: 'zero', 'mean' or 'resample'.
        texts: from how many texts that came.
        noise_floor: [batch], σ of an effect from rounding alone; None where it was not measured.
        sites, base, adapted, str_tokens, readout, units, meta: as in `Measured`.
    """

    values: Float[Tensor, "batch group"]
    groups: Groups
    how: str
    of: str = "site"
    replace: str = "zero"
    texts: int = 0
    noise_floor: Float[Tensor, "batch"] | None = None

    @property
    def key(self) -> str:
        """'add_one', 'leave_one_out', 'leave_one_out/mean': its stable name."""
        return self.how if self.replace == "zero" else f"{self.how}/{self.replace}"

    @property
    def share(self) -> Float[Tensor, "batch group"]:
        """The effects as shares of the shift."""
        return self.share_of(self.values)

    @property
    def interaction(self) -> Float[Tensor, "batch"]:
        """g(1) − g(0) − Σ effects: of the shift, what no group does on its own.

        Raises:
            ArgumentError: the groups overlap or leave sites out, are ranks, or were replaced by
                something else than zero, so that their sum means nothing.
        """
        if self.of == "rank" or self.replace != "zero":
            raise ArgumentError(
                f"the sum of effects of {self.of}s replaced by {self.replace} cannot be compared "
                "with the shift; use of='site', replace='zero'."
            )
        members = sorted(index for of in self.groups.values() for index in of)
        if members != list(range(len(self.sites))):
            raise ArgumentError(
                "the groups do not hold every site exactly once, so their sum cannot be compared "
                "with the shift; use group='site', 'layer' or 'kind' over all sites."
            )
        return self.shift - self.values.sum(1)

    @property
    def is_by_site(self) -> bool:
        """Whether the groups are the single sites, all of them."""
        every = [(i,) for i in range(len(self.sites))]
        return self.of == "site" and list(self.groups.values()) == every

    def summed(self, attribution: Attribution) -> Float[Tensor, "batch group"]:
        """An attribution of the same sites, summed over each group.

        Args:
            attribution: of the same lens.

        Raises:
            ArgumentError: it is of other sites, or the groups are single ranks.
        """
        if self.of == "rank":
            raise ArgumentError("effects of single ranks meet no sum over sites; use of='site'.")
        names = [site.name for site in self.sites]
        if [site.name for site in attribution.sites] != names:
            raise ArgumentError(
                f"the attribution is of {len(attribution.sites)} sites, the effects of {len(names)}"
                "; compute both with the same lens."
            )
        rows = indicator(self.groups, len(names)).to(attribution.per_site)
        return attribution.per_site @ rows.T

    def attribution(self) -> Attribution:
        """The effects of single sites, all or some, as an attribution: heatmap, table and file.

        Of single ranks they are split by rank.

        Raises:
            ArgumentError: the effects are of groups of several sites.
        """
        if any(len(of) > 1 for of in self.groups.values()):
            raise ArgumentError("effects of groups are no attribution to sites; use group='site'.")
        chosen = dict.fromkeys(index for (index,) in self.groups.values())
        sites, is_by_rank = tuple(self.sites[index] for index in chosen), self.of == "rank"
        return Attribution(
            values=self._by_rank(sites) if is_by_rank else self.values,
            by=("rank",) if is_by_rank else (),
            sites=sites,
            heads=(0,) * len(sites),
            base=self.base,
            adapted=self.adapted,
            str_tokens=self.str_tokens,
            readout=self.readout,
            units=self.units,
            method=self.key,
            at=float(self.how == "leave_one_out"),
            meta=self.meta,
            gauge="svd" if is_by_rank else "",
        )

    def _by_rank(self, sites: tuple[Site, ...]) -> Float[Tensor, "batch site rank"]:
        ranks = [site.rank for site in sites]
        split = [values.T for values in self.values.T.split(ranks)]
        most = max(ranks)
        return torch.stack([functional.pad(own, (0, most - own.shape[1])) for own in split], 1)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and group: number of sites, effect, share of the shift."""
        batch, count = self.values.shape
        return pd.DataFrame(
            {
                "prompt": np.repeat(np.arange(batch), count),
                "group": list(self.groups) * batch,
                "sites": [len(of) for of in self.groups.values()] * batch,
                "effect": self.values.cpu().double().flatten().numpy(),
                "share": self.share.cpu().double().flatten().numpy(),
            }
        )

    def entries(self, prompt: int | None = None) -> Entries:
        """Each group's effect; mean over prompts, or one prompt.

        Args:
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        values, shift = self.mean_over(prompt, self.values)
        return Entries({"group": list(self.groups)}, values, shift, "effect")

    def plot(self, prompt: int | None = None) -> Figure:
        """Heatmap layer × kind of single sites; bars of groups.

        Args:
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        return drawing.figure(self, prompt)
