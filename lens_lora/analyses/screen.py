"""What a first-order number misses of an effect (`reliability`, step 1).

1. Leave one out: a_l(1) − a_l(0), first order at the other end of the path, of all sites at once.
2. Add one: the sites that carry the attribution are added one at a time, and what their effects
   differ by from a_l is taken.

Cost: one forward and one backward pass, or a forward pass for each site that is added.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.analyses.patch_sites import How
from lens_lora.engine.asked import Asked
from lens_lora.engine.reverse import require_finite_sites, site_slopes
from lens_lora.results.attribution import Attribution
from lens_lora.results.effects import Effects

__all__ = ["Screen"]


@dataclasses.dataclass(frozen=True)
class Screen:
    """Where what a_l misses is found: at the other end, by interventions, or in what is known.

    Attributes:
        asked: of what.
        first: first order at ε = 0.
        how: the effect that a_l is asked to predict.
        adapted_end: first order at ε = 1, where it is known.
        effects: of every single site, where they were measured.
        progress: show a bar.
    """

    asked: Asked
    first: Attribution
    how: How
    adapted_end: Attribution | None
    effects: Effects | None
    progress: bool

    def missed(self, material: Float[Tensor, "batch"]) -> tuple[Float[Tensor, "batch site"], int]:
        """What a_l misses, and in how many passes: at the other end, or of what is material.

        Args:
            material: a site whose |a| is above it at some prompt is added.
        """
        a = self.first.per_site
        if self.how == "leave_one_out":
            return self._slopes_at_1() - a, 2
        some = (a.abs() > material[:, None]).any(0)
        missed = torch.full_like(a, float("nan"))
        missed[:, some] = self.measured(some) - a[:, some]
        return missed, int(some.sum())

    def _slopes_at_1(self) -> Float[Tensor, "batch site"]:
        if self.adapted_end is not None:
            return self.adapted_end.per_site
        lens = self.asked.lens
        slopes = site_slopes(lens, self.asked.reading, lens.gates(1.0))
        require_finite_sites(lens, slopes)
        return slopes

    def measured(self, some: Bool[Tensor, "site"]) -> Float[Tensor, "batch some"]:
        """The effects of these sites, one at a time; a forward pass each.

        Args:
            some: which sites.
        """
        if self.effects is not None:
            return self.effects.values[:, some]
        alone = torch.eye(len(some), dtype=self.asked.lens.gate_dtype)[some.cpu()]
        if not len(alone):
            return self.first.per_site[:, some]
        base, adapted = self.asked.ends[..., None]
        adds = self.how == "add_one"
        points, what = (alone, "sites added") if adds else (1 - alone, "sites left out")
        values = self.asked.at_gates(points, progress=self.progress, what=what)
        return values - base if adds else adapted - values
