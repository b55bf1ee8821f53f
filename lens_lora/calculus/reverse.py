"""Reverse mode: one readout, every site, position, head and rank, in one forward and one backward.

1. What the first adapted block reads, or the embedding's output where that is adapted, becomes the
   leaf of the graph; every site lies between it and g (a position embedding gets a leaf of its own,
   for it lies beside).
2. Each site's output gets a gradient hook that contracts G = ∂g/∂(output) with u = Az + a₀ as the
   backward pass goes by, and keeps nothing else.
3. The gradient that reaches the leaf is discarded; parameters never receive one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.calculus.function import read_value
from lens_lora.errors import ModelStateError
from lens_lora.hooked.gates import ScaleInject
from lens_lora.hooked.plan import Injection
from lens_lora.lens import LoraLens
from lens_lora.reading import Reading

__all__ = ["site_gradients"]

Visit = Callable[[Injection, Tensor | None, Tensor, Tensor], None]


class _TapInject:
    """Adds ε_l ΔW_l z_l and shows the visitor each injection on the way back."""

    def __init__(
        self, lens: LoraLens, gates: Float[Tensor, "*row site"], visit: Visit, leaves: list[Tensor]
    ) -> None:
        self._scaled = ScaleInject(lens.plan, gates)
        self._injections = lens.plan.injections
        self._kinds = [site.kind for site in lens.sites]
        self._gates = gates
        self._visit, self._leaves = visit, leaves
        self.seen: set[int] = set()

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor:
        injection = self._injections[index]
        partner = None if injection.partner is None else self._gates[..., injection.partner]
        moved = self._scaled(index, out, z)
        moved = out.view_as(out) if moved is None else moved
        if self._kinds[injection.site] == "pos_embed":
            self._leaves.append(moved.new_zeros(moved.shape).requires_grad_())
            moved = moved + self._leaves[-1]
        kept = z.detach()

        def on_gradient(gradient: Tensor) -> None:
            self.seen.add(injection.site)
            self._visit(injection, partner, gradient.flatten(2), kept)

        moved.register_hook(on_gradient)
        return moved


def _leaf(lens: LoraLens) -> str:
    """The last hook point before every site."""
    first = min(site.layer for site in lens.sites)
    return lens.embedding_output if first < 0 else lens.plan.view.block_input(first)


def site_gradients(
    lens: LoraLens,
    reading: Reading,
    gates: Float[Tensor, "*row site"],
    visit: Visit,
) -> Float[Tensor, "batch"]:
    """Visit every injection at these gates; returns g there. One forward and one backward.

    The visitor gets (injection, its partner's gate or None, G = Jᵀu_y [row, pos, out], z): the
    site's derivative is the sum of weight · ⟨G, δ(z)⟩ over its injections. The weight is a scalar,
    or one per row as the gates are.

    Raises:
        ModelStateError: a gradient did not reach some site.
    """
    leaves: list[Tensor] = []

    def start(tensor: Tensor, hook: Any) -> Tensor:
        del hook
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    tap = _TapInject(lens, gates, visit, leaves)
    with torch.enable_grad():
        with lens.injected(tap, before=[(_leaf(lens), start)]):
            values = read_value(lens, reading)
        torch.autograd.grad(values.sum(), leaves)
    missed = [site.name for i, site in enumerate(lens.sites) if i not in tap.seen]
    if missed:
        raise ModelStateError(
            f"no gradient reached {missed[0]} ({len(missed)} sites in all): the readout does not "
            "depend on it, or a hook on the model detaches its output."
        )
    return values.detach()
