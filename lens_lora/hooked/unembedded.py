"""What reaches the unembedding: only the positions that are read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lens_lora.errors import ModelStateError
from lens_lora.hooked.attaching import add_pre_hook
from lens_lora.temporary import Temporary

__all__ = ["unembedded_only", "unrounded"]


def unembedded_only(model: Any, select: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    """Within the block, only what `select` takes of the final residual stream is unembedded.

    Args:
        model: the hooked model.
        select: [batch, pos, d_model] → [batch, slot, d_model].
    """

    def selected(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        return (select(unrounded(args[0])), *args[1:])

    return Temporary(functools.partial(add_pre_hook, model.unembed, selected))


def unrounded(residual: Tensor) -> Tensor:
    """The same, unless the model's own forward pass turned autocast on.

    Args:
        residual: within a forward pass.

    Raises:
        ModelStateError: autocast is on.
    """
    if torch.is_autocast_enabled(residual.device.type):
        raise ModelStateError(
            "the model turns autocast on in its forward pass (a model prepared by accelerate for "
            "mixed precision does), which rounds to half precision. Take the wrapper off: "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False)."
        )
    return residual
