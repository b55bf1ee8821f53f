"""Activations projected onto directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.arguments import is_whole, one_entry
from lens_lora.core import (
    Inject,
    LoraLens,
    Prompts,
    attached,
)
from lens_lora.core.function.asked import Asked
from lens_lora.core.function.forward import require_finite, run_without_logits
from lens_lora.core.function.memory import rows_of_duals, rows_of_pass
from lens_lora.errors import ArgumentError, ModelStateError
from lens_lora.formats.directions import Directions


class Projection:
    """d·h at the positions that are wanted: [batch, feature], or [batch, feature, position]."""

    def __init__(
        self, prompts: Prompts, features: Directions, positions: int | Literal["each"]
    ) -> None:
        self._real, self._features = prompts.real, features
        self._index = None if positions == "each" else _indices(prompts, positions)

    def __call__(self, h: Float[Tensor, "batch pos *d"]) -> Float[Tensor, "batch feature *pos"]:
        """d·h, at float32 or better; NaN at padding where every position is wanted."""
        rows, h = self._features.rows, h.flatten(2)
        dtype = torch.promote_types(torch.promote_types(h.dtype, rows.dtype), torch.float32)
        return self._laid_out(self._read(h).to(dtype) @ rows.to(h.device, dtype).T)

    def encoded(self, h: Float[Tensor, "batch pos *d"]) -> Float[Tensor, "batch feature *pos"]:
        """The autoencoder's activations, in its own dtype and computed on its own device."""
        rows, encode = self._features.rows, self._features.encode
        assert encode is not None
        read = self._read(h if self._features.by_head else h.flatten(2))
        return self._laid_out(encode(read.to(rows)).to(h.device))

    def _read(self, h: Tensor) -> Tensor:
        if self._index is None:
            return h
        return h[torch.arange(len(h), device=h.device), self._index.to(h.device)]

    def _laid_out(self, values: Tensor) -> Tensor:
        if self._index is not None:
            return values
        padding = ~self._real.to(values.device)[:, None]
        return values.transpose(1, 2).masked_fill(padding, float("nan"))


def _indices(prompts: Prompts, index: object) -> Int[Tensor, " batch"]:
    """The position in each prompt."""
    index = one_entry(index)
    if not is_whole(index):
        raise ArgumentError(f"positions={index!r}: expected an index, such as -1, or 'each'.")
    lengths = prompts.lengths
    outside = ((index >= lengths) | (index < -lengths)).nonzero().flatten().tolist()
    if outside:
        raise ArgumentError(
            f"positions={index}: prompt {outside[0]} has {int(lengths[outside[0]])} tokens."
        )
    return index % lengths


def labels_of(asked: Asked, features: Directions) -> dict[str, Any]:
    """The fields that features of prompts have: their kind, units, tokens and settings."""
    said = {"features": features.kind, "units": features.units}
    return {**said, "str_tokens": asked.str_tokens, "meta": asked.describe()}


def activation_at(
    lens: LoraLens,
    prompts: Prompts,
    name: str,
    inject: Inject,
    keep: Callable[[Tensor], Tensor] = torch.clone,
) -> Float[Tensor, "batch pos *d"]:
    """The activation at one hook point, or what `keep` makes of it: its tangent, in a dual pass.

    In groups of prompts, where all of them are beyond the bound of the lens.
    """
    rows = prompts.batch
    is_dual = keep is not torch.clone
    fitting = (rows_of_duals if is_dual else rows_of_pass)(lens, prompts) or rows
    groups = [prompts.cut(first, min(first + fitting, rows)) for first in range(0, rows, fitting)]
    return torch.cat([_activation_of(lens, group, name, inject, keep) for group in groups])


def _activation_of(
    lens: LoraLens,
    prompts: Prompts,
    name: str,
    inject: Inject,
    keep: Callable[[Tensor], Tensor],
) -> Float[Tensor, "batch pos *d"]:
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
    if kept[-1].ndim < 3 or kept[-1].shape[:2] != prompts.tokens.shape:
        raise ModelStateError(
            f"{name} holds a tensor {tuple(kept[-1].shape)} for {tuple(prompts.tokens.shape)} "
            "tokens: no activation by prompt and position."
        )
    require_finite(kept[-1][prompts.real], f"the activation at {name}, or its tangent,")
    return kept[-1]
