"""The first strength ε at which g changes its sign, from the points of a curve that are known.

Where the curve changes sign, the scale is found for all prompts together: g is run on either side
of the root of a polynomial through the nearest points, about as far from it as the root may be off,
until the step is narrow. On a smooth curve it is narrow after one pass.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.interpolate import BarycentricInterpolator
from scipy.optimize import root_scalar
from torch import Tensor

from lens_lora.core.function.function import Function
from lens_lora.core.function.many_gates import Bar, gated_readout

# The precision of a flip: nearer to it, the rounding of float32 hides a margin's sign.
_PRECISION = 1e-5
# The nodes of the interpolant: with more of them rounding grows.
_NODES = 6
# A smooth margin takes one or two passes; one that jumps, where experts switch, takes many.
_MOST_PASSES = 16


def flip_scales(
    g: Function,
    base: Float[Tensor, " batch"],
    scales: Float[Tensor, " scale"],
    values: Float[Tensor, "batch scale"],
) -> Float[Tensor, " batch"]:
    """The first ε at which each prompt's g changes its sign; NaN where it does not.

    All prompts are refined together, two points of each in a pass: mostly one forward pass.

    Args:
        g: the function.
        base: g(0).
        scales: the ε at which g is known, rising.
        values: g(ε·1) there.
    """
    known_scales = torch.cat([scales.new_zeros(1), scales]).cpu().double()
    known_values = torch.cat([base[:, None], values], 1).cpu().double()
    crossings = _first_crossings(known_scales, known_values)
    for _ in range(_MOST_PASSES):
        wide = [prompt for prompt, crossing in crossings.items() if not crossing.is_narrow]
        if not wide:
            break
        probes = torch.tensor([crossings[prompt].probes for prompt in wide])
        values_at_probes = _values_at(g, torch.tensor(wide), probes).numpy()
        for prompt, between in zip(wide, values_at_probes, strict=True):
            crossings[prompt] = crossings[prompt].narrowed(between)

    flips = torch.full((len(known_values),), float("nan"), dtype=torch.float64)
    for prompt, crossing in crossings.items():
        flips[prompt] = crossing.root
    return flips


def _first_crossings(
    scales: Float[Tensor, " point"], values: Float[Tensor, "batch point"]
) -> dict[int, _Crossing]:
    """The first step of the curve in which g changes sign, by prompt; none where it does not."""
    before = values[:, :-1]
    after = values[:, 1:]
    crosses = (before != 0) & (before * after <= 0)
    crossings: dict[int, _Crossing] = {}
    for prompt in crosses.any(1).nonzero()[:, 0].tolist():
        first_step = int(crosses[prompt].int().argmax())
        crossings[prompt] = _Crossing(scales.numpy(), values[prompt].numpy(), low=first_step)
    return crossings


@dataclasses.dataclass(frozen=True)
class _Crossing:
    """Where g changes sign between two neighbours of the points ε at which it is known.

    Attributes:
        scales, values: ε of each point, rising, and g there.
        low: the index of the point before the change.
    """

    scales: NDArray[np.float64]
    values: NDArray[np.float64]
    low: int

    @property
    def step(self) -> tuple[float, float]:
        """The ε of the two neighbours."""
        return float(self.scales[self.low]), float(self.scales[self.low + 1])

    @property
    def is_narrow(self) -> bool:
        """Whether nothing is left to look for; also where g is exactly zero at a neighbour."""
        low, high = self.step
        return high - low <= _PRECISION or not self.values[self.low : self.low + 2].all()

    @property
    def root(self) -> float:
        """The root of the polynomial through the nearest points, the two neighbours among them."""
        return self._root_through(_NODES)

    def _root_through(self, nodes: int) -> float:
        """The root of the polynomial through so many of the nearest points."""
        low, high = self.step
        nearest = np.abs(self.scales - (low + high) / 2).argsort()[:nodes]
        # Without `rng` it draws from numpy's global state.
        through = BarycentricInterpolator(self.scales[nearest], self.values[nearest], rng=0)
        return float(root_scalar(through, bracket=(low, high)).root)

    @property
    def probes(self) -> tuple[float, float]:
        """Two ε, one on either side of that root, about as far from it as it may be wrong.

        They keep a gap from each other and from the two neighbours.
        """
        low, high = self.step
        root = self.root
        error = abs(root - self._root_through(_NODES - 1))
        reach = max(0.4 * _PRECISION, min(error, (high - low) ** 2 / 8))
        gap = min(reach, high - low) / 8
        left = min(max(root - reach, low + gap), high - 2 * gap)
        right = min(max(root + reach, left + gap), high - gap)
        return left, right

    def narrowed(self, between: NDArray[np.float64]) -> _Crossing:
        """The part of the step with the first change, g being known at the probes as well."""
        scales = np.insert(self.scales, self.low + 1, self.probes)
        values = np.insert(self.values, self.low + 1, between)
        # The old neighbours, with the two probes between them.
        inner = values[self.low : self.low + 4]
        changes = inner[:-1] * inner[1:] <= 0
        first_change = int(changes.argmax())
        return _Crossing(scales, values, self.low + first_change)


def _values_at(
    g: Function, chosen: Int[Tensor, " chosen"], scales: Float[Tensor, "chosen point"]
) -> Float[Tensor, "chosen point"]:
    """Run some prompts, each at its own ε: g(ε·1).

    Args:
        g: the function.
        chosen: indices of prompts.
        scales: the ε of each of them.
    """
    lens = g.lens
    some = g.reading.only(chosen)
    takes_all = some is g.reading  # a user's function reads all prompts together
    if takes_all:
        of_all = scales.new_zeros(some.batch, scales.shape[1])
        scales = of_all.index_copy(0, chosen, scales)
    gates = scales[..., None].expand(-1, -1, len(lens.sites))
    values = gated_readout(lens, some, lens.gates(gates), bar=Bar(shown=False)).cpu().double()
    return values[chosen] if takes_all else values
