"""Forward mode: the tangent J δz of the whole vocabulary, by dual numbers through the hooks.

A site's tangent is injected at its write hook: output ← output + ε·δ(z), with ε a dual number of
value `at` and derivative 1. Tangents kept apart by site or part: `calculus/part_tangents.py`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lens_lora.calculus.dual_linear import OneProduct
from lens_lora.calculus.function import read_logits
from lens_lora.errors import ModelStateError
from lens_lora.hooked.gates import add, weight_of
from lens_lora.lens import LoraLens
from lens_lora.prompts import Prompts

__all__ = ["dual_forward", "joint_tangent", "tangent_of"]


class JointInject:
    """Every site's gate is the dual number at_l + direction_l · d."""

    def __init__(
        self, lens: LoraLens, at: Float[Tensor, "site"], direction: Float[Tensor, "*batch site"]
    ) -> None:
        self._injections, self._at, self._direction = lens.plan.injections, at, direction

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor:
        at = self._at.expand_as(self._direction).clone()
        gates = fwad.make_dual(at, self._direction.clone())
        injection = self._injections[index]
        return add(out, injection.map, z, weight_of(injection, gates))


@contextlib.contextmanager
def dual_forward() -> Generator[OneProduct]:
    """Forward-mode derivatives within the block, and a clear word where an operation has none.

    Yields what multiplies by the weights there, to be told of rows that share their primal.

    Raises:
        ModelStateError: the model uses an operation without a forward-mode derivative.
    """
    try:
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            _plain_bloom_gelu(),
            fwad.dual_level(),
            OneProduct() as products,
        ):
            yield products
    except NotImplementedError as error:
        raise ModelStateError(
            f"this model has an operation without a forward-mode derivative ({error}). A fused "
            "kernel is one: load the model without it (attn_implementation='eager'). Reverse mode "
            "(first_order, mode='reverse') does without."
        ) from error


@contextlib.contextmanager
def _plain_bloom_gelu() -> Generator[None]:
    """Bloom wraps its GELU in a Function without a forward-mode derivative; the formula has one."""
    bloom: Any = sys.modules.get("transformers.models.bloom.modeling_bloom")
    if bloom is None:
        yield
        return
    wrapped = bloom.BloomGelu.forward
    bloom.BloomGelu.forward = lambda self, x: bloom.bloom_gelu_forward(x)
    try:
        yield
    finally:
        bloom.BloomGelu.forward = wrapped


def joint_tangent(
    lens: LoraLens, prompts: Prompts, at: Float[Tensor, "site"], direction: Float[Tensor, "site"]
) -> Float[Tensor, "batch vocab"]:
    """Σ_l direction_l ∂f/∂ε_l: the tangent of all sites together. One dual forward pass."""
    with dual_forward(), lens.injected(JointInject(lens, at, direction)):
        return tangent_of(read_logits(lens, prompts))


def tangent_of(dual: Tensor) -> Tensor:
    """The derivative that a dual number carries; zeros where it has none."""
    primal, tangent = fwad.unpack_dual(dual)
    return torch.zeros_like(primal) if tangent is None else tangent.clone()
