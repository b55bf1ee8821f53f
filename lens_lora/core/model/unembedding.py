"""The unembedding: the positions that are read alone, in float32 or better.

In half precision each logit would be rounded to 8 or 11 bits at the end, and what is read is a
difference of two that are nearly equal. Slopes have no such difference: theirs are the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from lens_lora.compat import add_pre_hook
from lens_lora.errors import ModelStateError
from lens_lora.spans import Temporary, temporary

# Rows of W_U that are cast at a time, so that no copy of all of it is held.
_CAST_ROWS = 4096


class Unembedding(NamedTuple):
    """The map from the final residual stream x to the logits, W_U x + b_U.

    Attributes:
        weight: W_U.
        bias: b_U; None for 0.
    """

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None

    def logits(
        self, residual: Float[Tensor, "*row d_model"], dtype: torch.dtype
    ) -> Float[Tensor, "*row vocab"]:
        """Compute the logits in `dtype`, on the device of W_U."""
        return unembed(residual.to(self.weight.device), self.weight, self.bias, dtype)


@temporary
def unembedded_only(span: Temporary, model: Any, select: Callable[[Tensor], Tensor]) -> None:
    """Within the block, only what `select` takes of the final residual stream is unembedded."""

    def selected(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        return (select(unrounded(args[0])), *args[1:])

    add_pre_hook(span, model.unembed, selected)


def unrounded(residual: Tensor) -> Tensor:
    """Return the residual stream as it is, once it is seen that autocast is off.

    Raises:
        ModelStateError: the model's own forward pass turned autocast on.
    """
    if torch.is_autocast_enabled(residual.device.type):
        raise ModelStateError(
            "the model turns autocast on in its forward pass (a model prepared by accelerate for "
            "mixed precision does), which rounds to half precision. Take the wrapper off: "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False)."
        )
    return residual


def unembed(residual: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Compute residual · W_Uᵀ + b_U in `dtype`, with the derivative of the model's own product."""
    if weight.dtype == residual.dtype == dtype:
        return linear(residual, weight, bias)
    keeps_graph = torch.is_grad_enabled() and residual.requires_grad
    wide = residual.detach() if keeps_graph else residual
    wide = wide.to(dtype)
    logits = torch.cat([linear(wide, rows.to(dtype)) for rows in weight.split(_CAST_ROWS)], -1)
    if bias is not None:
        logits = logits + bias.to(dtype)
    if not keeps_graph:
        return logits
    native = linear(residual.to(weight.dtype), weight, bias).to(dtype)
    # The value of the wide product, and the derivative of the model's own.
    return native + (logits - native.detach())
