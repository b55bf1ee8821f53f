"""What reaches the unembedding, and its logits where they are read: in float32 or better.

In half precision each logit would be rounded to 8 or 11 bits at the end, and what is read is a
difference of two that are nearly equal. Slopes have no such difference: theirs are the model's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lens_lora.errors import ModelStateError
from lens_lora.hooked.attaching import add_pre_hook
from lens_lora.temporary import Temporary

__all__ = ["unembed", "unembedded_only", "unrounded"]

_AT_ONCE = 4096  # Rows of W_U that are cast, so that no copy of all of it is held.


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


def unembed(residual: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """residual · W_Uᵀ + b_U, summed in `dtype`, with the derivative of the model's own product.

    Args:
        residual: [..., d_model], the unembedding's input.
        weight: W_U, [vocab, d_model].
        bias: b_U, or None.
        dtype: of the logits, no narrower than the weight's.
    """
    if weight.dtype == residual.dtype == dtype:
        return linear(residual, weight, bias)
    own = _own(residual, weight, bias).to(dtype) if _is_graphed(residual) else None
    wide = (residual if own is None else residual.detach()).to(dtype)
    logits = torch.cat([linear(wide, some.to(dtype)) for some in weight.split(_AT_ONCE)], -1)
    logits = logits if bias is None else logits + bias.to(dtype)
    return logits if own is None else own + (logits - own.detach())


def _own(residual: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(residual.to(weight.dtype), weight, bias)


def _is_graphed(residual: Tensor) -> bool:
    return torch.is_grad_enabled() and residual.requires_grad
