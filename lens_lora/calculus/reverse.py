"""Reverse mode: one readout, every site, position, head and rank, in one forward and one backward.

1. The embedding's output becomes the leaf of the graph; every site lies between it and g (a
   position embedding's own output is a leaf beside it).
2. Each site's output gets a gradient hook that contracts G = ∂g/∂(output) with u = Az + a₀ as the
   backward pass goes by, and keeps nothing else.
3. The gradient that reaches the embedding is discarded; parameters never receive one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.calculus.function import Bound, read_logits
from lens_lora.errors import ModelStateError
from lens_lora.hooked.gates import ScaleInject, attached
from lens_lora.lens import LoraLens
from lens_lora.prompts import Prompts

__all__ = ["site_gradients"]

Visit = Callable[[int, Float[Tensor, "batch pos out"], Float[Tensor, "batch pos in"]], None]


class _TapInject:
    """Adds ε_l ΔW_l z_l and shows the visitor each site's (index, G, z) on the way back."""

    def __init__(
        self, lens: LoraLens, gates: Float[Tensor, "site"], visit: Visit, leaves: list[Tensor]
    ) -> None:
        self._scaled = ScaleInject(lens.maps, gates)
        self._kinds = [site.kind for site in lens.sites]
        self._visit, self._leaves = visit, leaves
        self.seen: set[int] = set()

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor:
        moved = self._scaled(index, out, z)
        moved = out.view_as(out) if moved is None else moved
        if self._kinds[index] == "pos_embed":
            moved = moved.detach().requires_grad_()
            self._leaves.append(moved)
        kept = z.detach()

        def on_gradient(gradient: Tensor) -> None:
            self.seen.add(index)
            self._visit(index, gradient.flatten(2), kept)

        moved.register_hook(on_gradient)
        return moved


def site_gradients(
    lens: LoraLens,
    prompts: Prompts,
    readout: Bound,
    gates: Float[Tensor, "site"],
    visit: Visit,
) -> Float[Tensor, "batch"]:
    """Visit every site's G = Jᵀu_y and z at these gates; returns g there. One forward + backward.

    Raises:
        ModelStateError: a gradient did not reach some site.
    """
    leaves: list[Tensor] = []

    def start(tensor: Tensor, hook: Any) -> Tensor:
        del hook
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    tap = _TapInject(lens, gates, visit, leaves)
    with torch.enable_grad(), attached(lens.model, [(lens.embedding_output, start)]):
        with lens.injected(tap):
            values = readout(read_logits(lens, prompts))
        torch.autograd.grad(values.sum(), leaves)
    missed = [site.name for i, site in enumerate(lens.sites) if i not in tap.seen]
    if missed:
        raise ModelStateError(
            f"no gradient reached {missed[0]} ({len(missed)} sites in all): the readout does not "
            "depend on it, or a hook on the model detaches its output."
        )
    return values.detach()
