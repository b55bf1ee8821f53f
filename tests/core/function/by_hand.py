"""Prop. 1 by hand, from Hugging Face and PEFT alone: every factor of a first-order shift.

    a_l = ⟨Jᵀu, δz_l⟩ = Σ_t Σ_r  s · (BᵀG_t)_r · (A x_t)_r        G_t = ∂g/∂(what the module makes)

x_t is what the module reads at token t. PEFT's layer is hooked for x and G, its own A, B and s are
multiplied, and nothing of this package is used. A bias b_B of `lora_bias` is one rank more, whose
coordinate is 1. The kinds of a fused module are rows of its output; heads are blocks of the output
of q, k and v, and blocks of the input of o. An embedding reads token ids, each of which picks a
column of A.

Derivatives of g by the gates themselves are autograd's: PEFT's s may be a tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import reference
import torch
from peft import PeftModel
from torch import Tensor

D_HEAD = 4  # of every tiny model
AXES = ("position", "head", "rank")


@dataclasses.dataclass(frozen=True)
class Local:
    """What one module reads and what its output does, at one strength of the adapter.

    Attributes:
        x: [batch, pos, in].
        gradient: [batch, pos, out], of the number that is read.
    """

    x: Tensor
    gradient: Tensor


def local(
    peft: PeftModel,
    tokens: Tensor,
    read: Callable[[Tensor], Tensor],
    modules: Sequence[str],
    at: float,
) -> dict[str, Local]:
    """x and G of each module, with every s multiplied by `at`.

    Args:
        peft: the PeftModel that is run.
        tokens: the prompts.
        read: the number that is read of logits [batch, pos, vocab].
        modules: their paths.
        at: the strength.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for module in modules:

        def keep(layer: Any, args: Any, out: Tensor, module: str = module) -> None:
            inputs[module] = args[0].detach()
            outputs[module] = out

        handles.append(reference.lora_layer(peft, module).register_forward_hook(keep))
    try:
        with torch.enable_grad(), reference.peft_scales(peft, dict.fromkeys(modules, at)):
            value = read(peft(tokens).logits).sum()
            gradients = torch.autograd.grad(value, [outputs[module] for module in modules])
    finally:
        for handle in handles:
            handle.remove()
    return {
        module: Local(inputs[module], gradient)
        for module, gradient in zip(modules, gradients, strict=True)
    }


def rows_of(family: str, module: str, kind: str, heads: int) -> list[int] | slice:
    """The rows of a fused module's output that are of this kind; all rows of any other module."""
    width = heads * D_HEAD
    if module.endswith("c_attn"):  # q | k | v
        start = "qkv".index(kind) * width
        return slice(start, start + width)
    if module.endswith("query_key_value"):  # q, k, v of one head after another
        each = range(heads)
        starts = [(3 * head + "qkv".index(kind)) * D_HEAD for head in each]
        return [row for start in starts for row in range(start, start + D_HEAD)]
    return slice(None)


def factors(layer: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """A, B and b_B of a layer of PEFT."""
    if "default" in layer.lora_embedding_A:
        A = layer.lora_embedding_A["default"]
        B = layer.lora_embedding_B["default"]
        return A.detach(), B.detach(), None
    bias = layer.lora_B["default"].bias
    return (
        layer.lora_A["default"].weight.detach(),
        layer.lora_B["default"].weight.detach(),
        None if bias is None else bias.detach(),
    )


def parts(
    peft: PeftModel,
    module: str,
    at_module: Local,
    kind: str,
    rows: list[int] | slice,
    heads: int,
    slots: int,
    ranks: int,
) -> Tensor:
    """Of one site: [batch, pos, slot, rank]; the last slot is what belongs to no head.

    Args:
        peft: the PeftModel whose factors are multiplied.
        module: its path.
        at_module: what it reads, and the gradient of what it makes.
        kind: of the site, such as 'q'.
        rows: the site's rows of the module's output.
        heads: of this kind; 0 outside attention.
        slots: how many slots of heads the model has, without the last one.
        ranks: how many ranks the largest site has.
    """
    layer = reference.lora_layer(peft, module)
    scale = layer.scaling["default"]
    A, B, bias = factors(layer)
    B = B[rows]
    x = at_module.x
    gradient = at_module.gradient[..., rows]
    if not x.is_floating_point():
        x = torch.nn.functional.one_hot(x, A.shape[1]).to(A)
    batch, length, _ = x.shape
    found = torch.zeros(batch, length, slots + 1, ranks, dtype=x.dtype)
    rank = len(A)
    for r in range(rank):
        if kind in ("q", "k", "v"):
            coordinate = x @ A[r]
            for head in range(heads):
                of_head = slice(head * D_HEAD, (head + 1) * D_HEAD)
                back = gradient[..., of_head] @ B[of_head, r]
                found[:, :, head, r] = scale * back * coordinate
        elif kind == "o":
            back = gradient @ B[:, r]
            for head in range(heads):
                of_head = slice(head * D_HEAD, (head + 1) * D_HEAD)
                coordinate = x[..., of_head] @ A[r, of_head]
                found[:, :, head, r] = scale * back * coordinate
        else:
            found[:, :, -1, r] = scale * (gradient @ B[:, r]) * (x @ A[r])
    if bias is None:
        return found
    of_bias = bias[rows]
    if kind in ("q", "k", "v"):
        for head in range(heads):
            of_head = slice(head * D_HEAD, (head + 1) * D_HEAD)
            found[:, :, head, rank] = scale * gradient[..., of_head] @ of_bias[of_head]
    else:
        found[:, :, -1, rank] = scale * gradient @ of_bias
    return found


def summed(values: Tensor, by: Sequence[str]) -> Tensor:
    """[batch, site, pos, slot, rank] with only these axes kept."""
    gone = [2 + axis for axis, name in enumerate(AXES) if name not in by]
    return values.sum(gone) if gone else values


# --- Derivatives by the gates, through PEFT's s


def as_function(
    peft: PeftModel, tokens: Tensor, read: Callable[[Tensor], Tensor], modules: Sequence[str]
) -> Callable[[Tensor], Tensor]:
    """What is read of the logits [batch, pos, vocab], as a function of one gate a module."""

    def of_gates(gates: Tensor) -> Tensor:
        with reference.peft_scales(peft, dict(zip(modules, gates, strict=True))):
            return read(peft(tokens).logits)

    return of_gates
