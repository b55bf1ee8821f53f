"""A forward pass of dual numbers: torch's forward mode, set up so that it computes what we need.

1. One thread of the process at a time, as torch has one dual level and one choice of kernels.
2. Attention from its formula, because fused kernels have no forward-mode derivative; products with
   constant weights by `engine/duals.py`.
3. An operation without a derivative is named.

Cost: nothing by itself; a dual forward pass takes about 2.5 forward passes.
"""

from __future__ import annotations

import functools
import sys
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch._C import _is_fwd_grad_enabled, _len_torch_function_stack
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, _sdpa_kernel
from torch.overrides import _pop_mode

from lens_lora.engine.duals import OneProduct
from lens_lora.errors import ModelStateError
from lens_lora.hooked.attaching import ONE_IN_A_PROCESS, hold
from lens_lora.temporary import Temporary

__all__ = ["attention_from_formula", "dual_forward", "tangent_of"]


def dual_forward() -> AbstractContextManager[OneProduct]:
    """Within the block, forward-mode derivatives are computed.

    Torch has one dual level, and one choice of attention kernels, in a process: a thread waits for
    another one that is within such a block.

    `as` gives the `OneProduct` that multiplies by the weights; set its `rows` where rows are added.

    Raises:
        ModelStateError: a dual level is open outside; the model uses an operation without a
            forward-mode derivative.
    """
    return Temporary(_begin_dual)


def _begin_dual(span: Temporary) -> OneProduct:
    hold(span, ONE_IN_A_PROCESS)
    if fwad._current_level >= 0:
        raise ModelStateError(
            "a level of forward-mode derivatives (forward_ad.dual_level, torch.func.jvp) is open "
            "around this call, and torch has no second one. Leave it first."
        )
    span.push(_name_the_operation)
    products = OneProduct()
    attention_from_formula(span)
    _use_plain_bloom_gelu(span)
    span.way_back(functools.partial(torch.set_grad_enabled, torch.is_grad_enabled()))
    torch.set_grad_enabled(False)
    span.way_back(functools.partial(torch._C._set_fwd_grad_enabled, _is_fwd_grad_enabled()))
    torch._C._set_fwd_grad_enabled(True)
    span.way_back(_leave_dual_level)
    fwad.enter_dual_level()
    span.way_back(functools.partial(_pop_modes, _len_torch_function_stack()))
    return products.__enter__()


def attention_from_formula(span: Temporary) -> None:
    """Scaled-dot-product attention from its formula until the span ends, by no fused kernel.

    A fused kernel has neither forward-mode nor second derivatives.
    """
    hold(span, ONE_IN_A_PROCESS)
    span.way_back(functools.partial(_sdpa_kernel, _cur_sdpa_kernel_backends()))
    _sdpa_kernel([SDPBackend.MATH])


def _leave_dual_level() -> None:
    while fwad._current_level >= 0:
        fwad.exit_dual_level()


def _pop_modes(depth: int) -> None:
    while _len_torch_function_stack() > depth:
        _pop_mode()


def _name_the_operation(kind: object, error: BaseException | None, trace: object) -> None:
    del kind, trace
    if isinstance(error, NotImplementedError):
        raise ModelStateError(
            f"this model has an operation without a forward-mode derivative ({error}). A fused "
            "kernel is one: load the model without it (attn_implementation='eager'). Reverse mode "
            "(first_order, mode='reverse') needs no such derivative."
        ) from error


def _use_plain_bloom_gelu(span: Temporary) -> None:
    """Bloom wraps its GELU in a Function without a forward-mode derivative; the formula has one."""
    bloom: Any = sys.modules.get("transformers.models.bloom.modeling_bloom")
    if bloom is not None:
        wrapped = bloom.BloomGelu.forward
        span.way_back(functools.partial(setattr, bloom.BloomGelu, "forward", wrapped))
        bloom.BloomGelu.forward = lambda self, x: bloom.bloom_gelu_forward(x)


def tangent_of(dual: Tensor) -> Tensor:
    """The derivative that a dual number carries; zeros where it has none."""
    primal, tangent = fwad.unpack_dual(dual)
    return torch.zeros_like(primal) if tangent is None else tangent.clone()
