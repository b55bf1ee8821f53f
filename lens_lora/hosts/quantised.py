"""Quantised linear modules: the products that a lens differentiates.

The modules are those of bitsandbytes, in 4 and 8 bit. A LoRA's δ = s·B·A·z needs no W, so only the
base's own products need care. With Ŵ the dequantised weight:

    4 bit    y = x Ŵᵀ + b, in every run. bitsandbytes computes the same, except for a kernel on
             CPUs with AVX512-BF16, which rounds to bfloat16, repacks the weight and has no
             derivative.
    8 bit    y is computed by the kernel, which also rounds x to 8 bit, so y is a step function.
             Its derivatives are straight-through: those of x Ŵᵀ + b. Sums that are exact elsewhere
             (first order of a linear model, the path integral) are exact up to that rounding.

bitsandbytes' own products have first derivatives in reverse mode only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from lens_lora import compat
from lens_lora.core.model import extensions
from lens_lora.spans import Temporary, temporary

# The classes of bitsandbytes, as people call them.
_NAMES = {"Linear4bit": "4 bit", "Linear8bitLt": "8 bit"}


@extensions.quantised_name.provide
def quantised_name(module: nn.Module) -> str | None:
    """'4 bit' or '8 bit' for a linear module of bitsandbytes, None for any other."""
    for cls in type(module).__mro__:
        if cls.__name__ in _NAMES and cls.__module__.startswith("bitsandbytes."):
            return _NAMES[cls.__name__]
    return None


@extensions.quantised_linears.provide
def quantised_linears(modules: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    """Every linear module of bitsandbytes among these."""
    return tuple(module for module in modules if quantised_name(module) is not None)


@extensions.dequantised.provide
def dequantised(module: nn.Module, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
    """Ŵ, made anew at each call."""
    if quantised_name(module) == "4 bit":
        return _of_4bit(module, dtype)
    return _of_8bit(module, dtype)


@extensions.differentiable_products.provide
@temporary
def differentiable_products(span: Temporary, modules: tuple[nn.Module, ...]) -> None:
    """Within the block these modules have derivatives of every order, and values as above."""
    for module in modules:
        product = _Product if quantised_name(module) == "4 bit" else _StraightThrough
        product.until(span, module, object(), compat.computing_attribute(module))


class _Product(compat.SharedForward):
    """The product of a module in 4 bit."""

    def __call__(self, x: Tensor) -> Tensor:
        """Compute x Ŵᵀ + b in the module's compute dtype, as bitsandbytes chooses it."""
        module: Any = self.module
        dtype = module.compute_dtype if module.compute_type_is_set else None
        if dtype is None and x.dtype in (torch.float32, torch.bfloat16):
            dtype = x.dtype
        dtype = dtype or x.dtype
        bias = None if module.bias is None else module.bias.to(dtype)
        return linear(x.to(dtype), _of_4bit(module, dtype), bias).to(x.dtype)


class _StraightThrough(compat.SharedForward):
    """The product of a module in 8 bit."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the kernel's value, with the derivative of x Ŵᵀ + b where one is asked for."""
        module: Any = self.module
        primal, tangent = fwad.unpack_dual(x)
        value = self.before(primal.detach())
        if tangent is None and not (torch.is_grad_enabled() and x.requires_grad):
            return value
        bias = None if module.bias is None else module.bias.to(x.dtype)
        smooth = linear(x, _of_8bit(module, x.dtype), bias)
        return value + (smooth - fwad.unpack_dual(smooth).primal.detach())


def _of_4bit(module: Any, dtype: torch.dtype | None) -> Float[Tensor, "out in"]:
    from bitsandbytes import functional

    quant_state = getattr(module.weight, "quant_state", None) or module.quant_state
    packed = module.weight.data
    state = copy.copy(quant_state)
    if getattr(state, "packing_format_for_cpu", False):
        # The inverse leaves the scales of blocks as they were packed: transposed, in bfloat16, and
        # not nested.
        state.original_nested = False
        packed, state = compat.unpacked_4bit(packed, state)
        state.absmax = quant_state.absmax.T.reshape(-1).float()
    target = dtype or state.dtype
    state.dtype = torch.float32 if target == torch.float64 else target
    return functional.dequantize_4bit(packed, state).to(target)


def _of_8bit(module: Any, dtype: torch.dtype | None) -> Float[Tensor, "out in"]:
    state = module.weight if module.state.CB is None else module.state
    return state.CB.to(dtype or torch.float32) * (state.SCB.unsqueeze(1) / 127.0)
