"""A gate for each rank, or for each site, of an adapter; and g as a function of them.

    u ← ε ∘ u,    u = A z of a site, in the coordinates of the SVD of ΔW

Ranks are those of the SVD, so that one of them means something by itself. A change of bias is one
more coordinate, with a gate of its own. Directions with σ = 0 do nothing; their gates are held at
zero. All gates are one vector, site after site.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.core import Function, LoraLens
from lens_lora.errors import ArgumentError, ModelStateError, setting

Of = Literal["rank", "site"]


@dataclasses.dataclass(frozen=True, eq=False)
class GateLayout:
    """The places of all gates in one vector.

    Attributes:
        lens: the adapter over the model; for ranks, in the coordinates of the SVD.
        of: 'rank' or 'site': what has a gate of its own.
        sizes: how many gates each site has.
    """

    lens: LoraLens
    of: Of
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of gates."""
        return sum(self.sizes)

    @functools.cached_property
    def alive(self) -> Bool[Tensor, " gate"]:
        """Whether each gate moves anything: a rank with σ > 0 does, and a change of bias."""
        if self.of == "site":
            return torch.ones(self.count, dtype=torch.bool)
        alive: list[Tensor] = []
        for turn, size in zip(self.lens.plan.turns, self.sizes, strict=True):
            assert turn is not None, "only a norm has no SVD, and ranks of norms are refused"
            has_bias_coordinate = torch.ones(size - len(turn.sigma), dtype=torch.bool)
            alive += [turn.sigma.cpu() > 0, has_bias_coordinate]
        return torch.cat(alive)

    def by_site(self, gates: Tensor) -> tuple[Tensor, ...]:
        """Each site's own gates."""
        return gates.split(self.sizes)

    def value(self, g: Function, gates: Float[Tensor, " gate"]) -> Float[Tensor, " batch"]:
        """The value of g where each site writes B(ε_l ∘ u_l), differentiable in these gates.

        One forward pass. Without a graph it is taken in groups of prompts that fit within the bound
        of the lens.

        Args:
            g: the function, over this adapter.
            gates: ε, one vector.

        Raises:
            NumericsError: a readout that is not finite.
        """
        by_site = self.by_site(gates)
        one = gates.new_ones(())

        def write(index: int, out: Tensor, z: Tensor) -> Tensor:
            injection = self.lens.injections[index]
            u = injection.map.coordinates(z)
            gate = by_site[injection.site].to(u.device, u.dtype)
            if injection.partner is not None:
                gate = gate * by_site[injection.partner].to(gate) / 2
            return injection.map.added(out, u * gate, one)

        return g.over(self.lens).passes.written(write)


def layout_of(lens: LoraLens, of: Of) -> GateLayout:
    """The gates of a lens.

    Args:
        lens: the adapter over the model.
        of: 'rank' or 'site': what gets a gate of its own.

    Raises:
        ArgumentError: ranks of a norm.
        ModelStateError: ranks, where value biases were folded and updates of v and o multiply.
    """
    if of == "site":
        return GateLayout(lens, of, (1,) * len(lens.sites))
    for site, site_update in zip(lens.sites, lens.updates, strict=True):
        if site_update.norm is not None:
            raise ArgumentError(
                f"{site.name} is a norm that was trained, whose update has no ranks; leave it out "
                f"of the adapter, or use {setting('of', 'site')}."
            )
    partnered = [injection for injection in lens.injections if injection.partner is not None]
    if partnered:
        name = lens.sites[partnered[0].site].name
        raise ModelStateError(
            f"{name}: value biases of this model were folded into b_O, so "
            "its update multiplies that of v there, and single ranks of the two have no gates of "
            "their own. Load the model unprocessed (from_pretrained_no_processing), or use "
            f"{setting('of', 'site')}."
        )
    turned = lens.in_gauge("svd")
    return GateLayout(turned, of, tuple(site_map.rank for site_map in turned.maps))
