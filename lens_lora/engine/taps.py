"""Taps: what a backward pass brings to each site's output, shown to a visitor.

1. What the first adapted block reads, or the embedding's output where that is adapted, becomes the
   leaf of the graph; every site lies between it and g (a position embedding does not, so it has a
   leaf of its own).
2. Each site's output gets a gradient hook. During the backward pass it hands G = ∂g/∂(output) and z
   to a visitor, and keeps nothing.
3. The gradient that reaches the leaf is discarded; parameters never receive one.
4. Where the graph is too large for `max_memory`, blocks run twice (`engine/rerun.py`).

Cost: one forward and one backward pass, and one more forward pass where blocks run twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor

from lens_lora.engine.memory import Run, must_rerun
from lens_lora.engine.read import read_for_slopes
from lens_lora.engine.rerun import blocks_rerun
from lens_lora.errors import ModelStateError
from lens_lora.hooked.gates import Inject, ScaleInject
from lens_lora.hooked.plan import Injection
from lens_lora.lens import LoraLens
from lens_lora.readouts.rows import Reading

__all__ = ["Taps", "Visit", "gradients_of_each", "site_gradients", "tapped"]

Visit = Callable[[Injection, Tensor | None, Tensor, Tensor], None]


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
    with tapped(lens, reading, gates) as (tap, leaves):
        values = read_for_slopes(lens, reading)
        tap.visit = visit
        torch.autograd.grad(values, leaves, torch.ones_like(values))
    tap.require_all_seen()
    return values.detach()


def gradients_of_each(
    lens: LoraLens,
    run: Run,
    gates: Float[Tensor, "*row site"],
    read: Callable[[], Float[Tensor, "batch token"]],
    visit_of: Callable[[int], Visit],
) -> None:
    """As `site_gradients`, for each token of a response in turn.

    One forward pass, and a backward pass for each token.

    Args:
        lens: the adapter over the model.
        run: what `read` runs.
        gates: one for all rows, or each row's own.
        read: runs the rows under the hooks that are then on the model, and reads each token.
        visit_of: the visitor of a token, by its index.

    Raises:
        ModelStateError: a gradient did not reach some site.
    """
    with tapped(lens, run, gates) as (tap, leaves):
        values = read()
        for token in range(values.shape[1]):
            tap.visit = visit_of(token)
            only = torch.zeros_like(values)
            only[:, token] = 1
            torch.autograd.grad(values, leaves, only, retain_graph=token + 1 < values.shape[1])
    tap.require_all_seen()


@contextlib.contextmanager
def tapped(
    lens: LoraLens,
    run: Run,
    gates: Float[Tensor, "*row site"],
    inject: Inject | None = None,
) -> Generator[tuple[Taps, list[Tensor]]]:
    """The taps, and the leaves of the graph of what is read within the block.

    Args:
        lens: the adapter over the model.
        run: what is run within the block.
        gates: one for all rows, or each row's own.
        inject: what the sites add, at these gates; None for ε_l ΔW_l z_l. Blocks run again with
            that alone.
    """
    start = _Start()
    tap = Taps(lens, gates, inject or ScaleInject(lens.plan, gates), start.leaves)
    runs_again = inject is None and must_rerun(lens, run)
    again = blocks_rerun(lens) if runs_again else contextlib.nullcontext()
    hooks = lens.injected(tap, before=[(_leaf(lens), start)])
    with torch.enable_grad(), again, hooks:
        yield tap, start.leaves


def _leaf(lens: LoraLens) -> str:
    """The last hook point before every site."""
    first = min(site.layer for site in lens.sites)
    return lens.embedding_output if first < 0 else lens.plan.host.block_input(first)


class _Start:
    """The hook that begins the graph. A block that runs again begins it again, for nothing."""

    def __init__(self) -> None:
        self.leaves: list[Tensor] = []
        self._has_begun = False

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor:
        del hook
        leaf = tensor.detach().requires_grad_()
        if not self._has_begun:
            self.leaves.append(leaf)
            self._has_begun = True
        return leaf


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
        moved = self._inject(index, out, z)
        moved = out.view_as(out) if moved is None else moved
        if self._kinds[self._injections[index].site] == "pos_embed":
            self._leaves.append(moved.new_zeros(moved.shape).requires_grad_())
            moved = moved + self._leaves[-1]
        held = fwad.unpack_dual(z).primal.detach()
        kept: Any = _Kept.apply(held.new_zeros((), dtype=out.dtype).requires_grad_(), held)
        node = kept.grad_fn

        def on_gradient(gradient: Tensor) -> None:
            self._show(index, gradient, *node.saved_tensors)

        moved.register_hook(on_gradient)
        return moved

    def _show(self, index: int, gradient: Tensor, z: Tensor) -> None:
        injection = self._injections[index]
        partner = None if injection.partner is None else self._gates[..., injection.partner]
        self._seen.add(injection.site)
        self.visit(injection, partner, gradient.flatten(2), z)

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


class _Kept(torch.autograd.Function):
    """A node beside the graph, which saves z as any node does: a second run restores it."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return one.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        del ctx, gradients
        return None, None
