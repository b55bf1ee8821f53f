"""f(ε) with a gate for each rank of each site, or for each site: differentiable in all of them.

    u_l ← ε_l ∘ u_l   in rank space, so that δ_l = B_l (ε_l ∘ u_l)

1. Ranks are those of the SVD of each site's ΔW (`hooked/gauge.py`), so that one of them means
   something by itself. A change of bias is one more coordinate, and a gate of its own.
2. Directions with σ = 0 do nothing; their gates are held at zero.
3. All gates are one vector, site after site (`GateLayout`).

Cost: as a plain pass, forward or backward.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.engine.activations import in_gauge
from lens_lora.engine.function import require_finite
from lens_lora.engine.read import read_value
from lens_lora.engine.replaced import require_ranks
from lens_lora.errors import ModelStateError
from lens_lora.hooked.gates import write
from lens_lora.lens import LoraLens
from lens_lora.readouts.rows import Reading

__all__ = ["GateLayout", "Of", "layout_of", "value_at"]

Of = Literal["rank", "site"]


@dataclasses.dataclass(frozen=True, eq=False)
class GateLayout:
    """Which gate is where in the one vector of gates.

    Attributes:
        lens: the adapter over the model; for ranks in the coordinates of the SVD.
        of: what a gate is of.
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
    def alive(self) -> Bool[Tensor, "gate"]:
        """Which gates move anything; of ranks those with σ > 0, and changes of bias."""
        if self.of == "site":
            return torch.ones(self.count, dtype=torch.bool)
        found = []
        for turn, size in zip(self.lens.plan.turns, self.sizes, strict=True):
            of_weight = torch.zeros(0) if turn is None else turn.sigma.cpu()
            bias = torch.ones(size - len(of_weight), dtype=torch.bool)
            found.append(torch.cat([of_weight > 0, bias]))
        return torch.cat(found)

    def by_site(self, gates: Tensor) -> tuple[Tensor, ...]:
        """Each site's own gates.

        Args:
            gates: [gate], of all.
        """
        return gates.split(self.sizes)


def layout_of(lens: LoraLens, of: Of) -> GateLayout:
    """The gates of a lens.

    Args:
        lens: the adapter over the model.
        of: 'rank' or 'site'.

    Raises:
        ArgumentError: ranks of a norm.
        ModelStateError: ranks, where value biases were folded and updates of v and o multiply.
    """
    if of == "site":
        return GateLayout(lens, of, (1,) * len(lens.sites))
    require_ranks(lens, range(len(lens.sites)))
    partnered = [i.site for i in lens.plan.injections if i.partner is not None]
    if partnered:
        raise ModelStateError(
            f"{lens.sites[partnered[0]].name}: value biases of this model were folded into b_O, so "
            "its update multiplies that of v there, and single ranks of the two have no gates of "
            "their own. Load the model unprocessed (from_pretrained_no_processing), or use "
            "of='site'."
        )
    turned = in_gauge(lens, "svd")
    return GateLayout(turned, of, tuple(own.rank for own in turned.maps))


class _GateInject:
    """Each site writes B(ε_l ∘ u_l)."""

    def __init__(self, layout: GateLayout, gates: Float[Tensor, "gate"]) -> None:
        self._injections = layout.lens.plan.injections
        self._gates = layout.by_site(gates)
        self._one = gates.new_ones(())

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor:
        injection = self._injections[index]
        u = injection.map.coordinates(z)
        gate = self._gates[injection.site].to(u.device, u.dtype)
        if injection.partner is not None:
            gate = gate * self._gates[injection.partner].to(gate) / 2
        return write(out, injection.map, u * gate, self._one)


def value_at(
    layout: GateLayout, reading: Reading, gates: Float[Tensor, "gate"]
) -> Float[Tensor, "batch"]:
    """g at these gates, differentiable in them. One forward pass.

    Args:
        layout: of the gates.
        reading: what is run, and read.
        gates: of all ranks or sites.

    Raises:
        NumericsError: a non-finite readout.
    """
    with layout.lens.injected(_GateInject(layout, gates)):
        values = read_value(layout.lens, reading)
    require_finite(values.detach(), "the readout")
    return values
