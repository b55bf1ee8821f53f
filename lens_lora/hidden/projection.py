"""Activations at one hook point, and their projections onto directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.arguments import is_whole, one_entry
from lens_lora.core import Inject, LoraLens, Prompts, attached, require_finite
from lens_lora.core.function.forward import run_without_logits
from lens_lora.core.function.memory import rows_of_duals, rows_of_pass
from lens_lora.errors import ArgumentError, ModelStateError
from lens_lora.formats.directions import Directions

_Activation = Float[Tensor, "batch pos *d"]
_Projected = Float[Tensor, "batch feature *pos"]


class FeatureProjection:
    """A function from activations h to d·h, [batch, feature] or [batch, feature, position]."""

    def __init__(
        self, prompts: Prompts, features: Directions, positions: int | Literal["each"]
    ) -> None:
        self._real = prompts.real
        self._features = features
        self._index = None if positions == "each" else _indices(prompts, positions)

    def __call__(self, h: _Activation) -> _Projected:
        """Project h in float32 or better; by position, padding is NaN."""
        directions = self._features.rows
        read = self._at_positions(h.flatten(2))
        wide = torch.promote_types(h.dtype, directions.dtype)
        wide = torch.promote_types(wide, torch.float32)
        return self._laid_out(read.to(wide) @ directions.to(h.device, wide).T)

    def encoded(self, h: _Activation) -> _Projected:
        """The autoencoder's activations, in its own dtype and computed on its own device."""
        encode = self._features.encode
        assert encode is not None, "directions have no autoencoder"
        if not self._features.by_head:
            h = h.flatten(2)
        read = self._at_positions(h)
        return self._laid_out(encode(read.to(self._features.rows)).to(h.device))

    def _at_positions(self, h: Tensor) -> Tensor:
        """Take h at one position of each prompt; by position, all of it."""
        if self._index is None:
            return h
        prompts = torch.arange(len(h), device=h.device)
        return h[prompts, self._index.to(h.device)]

    def _laid_out(self, values: Tensor) -> Tensor:
        """Make positions the last axis, with NaN at padding."""
        if self._index is not None:
            return values
        padding = ~self._real.to(values.device)[:, None]
        return values.transpose(1, 2).masked_fill(padding, float("nan"))


def _indices(prompts: Prompts, index: object) -> Int[Tensor, " batch"]:
    """The position in each prompt, counted from its start."""
    index = one_entry(index)
    if not is_whole(index):
        raise ArgumentError(f"positions={index!r}: expected an index, such as -1, or 'each'.")
    lengths = prompts.lengths
    outside = ((index >= lengths) | (index < -lengths)).nonzero().flatten().tolist()
    if outside:
        prompt = outside[0]
        raise ArgumentError(
            f"positions={index}: prompt {prompt} has {int(lengths[prompt])} tokens."
        )
    return index % lengths


def activation_at(
    lens: LoraLens, prompts: Prompts, name: str, inject: Inject
) -> Float[Tensor, "batch pos *d"]:
    """The activation at one hook point. One forward pass, without the unembedding.

    Prompts are run in groups where all of them are beyond the bound of the lens.

    Args:
        lens: the adapter over the model.
        prompts: the rows.
        name: the hook point.
        inject: what each site writes in this pass.

    Raises:
        ModelStateError: a point that does not fire, or holds no activation by position.
        NumericsError: an activation that is not finite.
    """
    rows = rows_of_pass(lens, prompts)
    return _in_groups(prompts, rows, lambda group: _run(lens, group, name, inject, _copied))


def tangent_at(
    lens: LoraLens,
    prompts: Prompts,
    name: str,
    inject: Inject,
    tangent: Callable[[Tensor], Tensor],
) -> Float[Tensor, "batch pos *d"]:
    """The tangent of the activation at one hook point. One dual forward pass.

    Args:
        lens, prompts, name: as for `activation_at`.
        inject: what each site writes, in dual numbers.
        tangent: a dual activation's tangent.

    Raises:
        ModelStateError, NumericsError: as for `activation_at`.
    """
    rows = rows_of_duals(lens, prompts)
    return _in_groups(prompts, rows, lambda group: _run(lens, group, name, inject, tangent))


def _in_groups(
    prompts: Prompts, rows: int | None, run: Callable[[Prompts], _Activation]
) -> _Activation:
    """Run so many prompts at a time, or all at once where `rows` is None."""
    step = rows or prompts.batch
    groups: list[Tensor] = []
    for first in range(0, prompts.batch, step):
        end = min(first + step, prompts.batch)
        groups.append(run(prompts.cut(first, end)))
    return torch.cat(groups)


def _copied(activation: Tensor) -> Tensor:
    return activation.clone()


def _run(
    lens: LoraLens,
    prompts: Prompts,
    name: str,
    inject: Inject,
    keep: Callable[[Tensor], Tensor],
) -> _Activation:
    """Run one pass, and return what `keep` makes of the activation at a point's last firing."""
    kept: list[Tensor] = []

    def hook_fn(tensor: Any, hook: Any) -> None:
        del hook
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            kept.append(keep(tensor))

    with lens.injected(inject), attached(lens.model, [(name, hook_fn)]):
        run_without_logits(lens, prompts)
    if not kept:
        raise ModelStateError(
            f"{name}: the hook point exists but no activation passes it in a forward pass; a flag "
            "of the model or its class bypasses it. Name another point."
        )
    activation = kept[-1]
    if activation.ndim < 3 or activation.shape[:2] != prompts.tokens.shape:
        raise ModelStateError(
            f"{name} holds a tensor {tuple(activation.shape)} for {tuple(prompts.tokens.shape)} "
            "tokens: no activation by prompt and position."
        )
    require_finite(activation[prompts.real], f"the activation at {name}, or its tangent,")
    return activation
