"""A graph whose sites are tapped: on the way back each shows its gradient and its input.

1. What the first adapted block reads, or the embedding's output where that is adapted, becomes the
   leaf of the graph; every site lies between it and g (a position embedding does not, so it has a
   leaf of its own).
2. Each site's output gets a gradient hook. During the backward pass it hands G = ∂g/∂(output) and z
   to a visitor; nothing else is kept.

Cost: one forward pass; a backward pass is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor

from lens_lora.errors import ModelStateError
from lens_lora.hooked.gates import Inject
from lens_lora.hooked.plan import Injection
from lens_lora.lens import LoraLens

__all__ = ["Taps", "Visit", "tapped"]

Visit = Callable[[Injection, Tensor | None, Tensor, Tensor], None]
Read = TypeVar("Read")


class Taps:
    """Adds what another inject adds, and shows the visitor each injection on the way back.

    Args:
        lens: the adapter over the model.
        gates: one for all rows, or each row's own.
        inject: what is added.
        leaves: of the graph; a position embedding's is put to them.
    """

    def __init__(
        self,
        lens: LoraLens,
        gates: Float[Tensor, "*row site"],
        inject: Inject,
        leaves: list[Tensor],
    ) -> None:
        self._inject = inject
        self._injections = lens.plan.injections
        self._kinds = [site.kind for site in lens.sites]
        self._gates = gates
        self._names = [site.name for site in lens.sites]
        self._leaves = leaves
        self._seen: set[int] = set()
        self.visit: Visit = _nothing

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor:
        """What the inject makes of it, with a hook that shows its gradient to `visit`.

        Args:
            index: of the injection.
            out: the running output.
            z: the site's input.
        """
        injection = self._injections[index]
        partner = None if injection.partner is None else self._gates[..., injection.partner]
        moved = self._inject(index, out, z)
        moved = out.view_as(out) if moved is None else moved
        if self._kinds[injection.site] == "pos_embed":
            self._leaves.append(moved.new_zeros(moved.shape).requires_grad_())
            moved = moved + self._leaves[-1]
        kept = fwad.unpack_dual(z).primal.detach()

        def on_gradient(gradient: Tensor) -> None:
            self._seen.add(injection.site)
            self.visit(injection, partner, gradient.flatten(2), kept)

        moved.register_hook(on_gradient)
        return moved

    def require_all_seen(self) -> None:
        """Raise ModelStateError where a gradient did not reach some site."""
        missed = [name for i, name in enumerate(self._names) if i not in self._seen]
        if missed:
            raise ModelStateError(
                f"no gradient reached {missed[0]} ({len(missed)} sites in all): the readout does "
                "not depend on it, or a hook on the model detaches its output."
            )


def _nothing(*given: object) -> None:
    """The visitor before there is one."""


def _leaf(lens: LoraLens) -> str:
    """The last hook point before every site."""
    first = min(site.layer for site in lens.sites)
    return lens.embedding_output if first < 0 else lens.plan.host.block_input(first)


def tapped(
    lens: LoraLens, gates: Float[Tensor, "*row site"], inject: Inject, read: Callable[[], Read]
) -> tuple[Read, list[Tensor], Taps]:
    """What was read, the leaves of its graph, and the taps in between. One forward pass.

    Args:
        lens: the adapter over the model.
        gates: one for all rows, or each row's own.
        inject: what the sites add, at these gates.
        read: runs the rows under the hooks that are then on the model, and reads.
    """
    leaves: list[Tensor] = []

    def start(tensor: Tensor, hook: Any) -> Tensor:
        del hook
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    tap = Taps(lens, gates, inject, leaves)
    with torch.enable_grad(), lens.injected(tap, before=[(_leaf(lens), start)]):
        return read(), leaves, tap
