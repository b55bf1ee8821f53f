"""Modules that compute otherwise for the span of a lens's hooks: experts, routers, quantised ones.

**Experts.** A layer of experts holds one tensor for all of them, W [expert, out, in], and the
router sends each token to k of them. What expert e computes for a token in its slot j is W_e x, so
an update is a site like any other, with

    z = (x, e)  [row, pos, slot, in + 2],     δ(z) = s·B_e A_e x  [row, pos, slot · out].

transformers computes W_e x within one call that has no hook points. So for the span of a lens's
hooks the module computes the same, W_e x for every token and slot at once, by the flags that its
class states (`transformers.integrations.moe`): gated or not, transposed or not, with biases or
without. That is exact in every dtype, with derivatives in both modes, whatever
`experts_implementation` says.

A router is one linear map, W [expert, in], within a module of its own. It is computed by the
module's own code, in which what `F.linear` makes of W is the place to write.

**Quantised linears** of bitsandbytes, in 4 and 8 bit. A LoRA's δ = s·B·A·z needs no W, so only the
base's own products need care. With Ŵ the dequantised weight:

    4 bit    y = x Ŵᵀ + b, in every run. bitsandbytes computes the same, but for a kernel on CPUs
             with AVX512-BF16, which rounds to bfloat16, repacks the weight and has no derivative.
    8 bit    y is the kernel's, which rounds x to 8 bit as well and so has steps for slopes.
             Derivatives are straight through: those of x Ŵᵀ + b. What adds up exactly elsewhere
             (first order of a linear model, the path integral) does so up to that rounding.

bitsandbytes' own products have first derivatives in reverse mode only.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from lens_lora import compat
from lens_lora.errors import ModelStateError

# What an expert's number is stored in, beside x: float types are exact up to 256.
_DIGIT = 256
ID_COLUMNS = 2
Writer = Callable[[tuple[Tensor, ...], Tensor], Tensor | None]
_CASTS = (Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.type_as)
_FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def is_experts(module: object) -> bool:
    """Whether it holds a stack of experts, in the form that transformers has for all families."""
    if not isinstance(module, nn.Module) or not all(hasattr(module, flag) for flag in _FLAGS):
        return False
    return "down_proj" in dict(module.named_parameters(recurse=False))


def is_router(module: object) -> bool:
    """Whether it holds the weight of a linear map, and is no linear module."""
    if not isinstance(module, nn.Module) or isinstance(module, nn.Linear | nn.Embedding):
        return False
    weight = getattr(module, "weight", None)
    is_matrix = isinstance(weight, nn.Parameter) and weight.ndim == 2
    return is_matrix and type(module).__name__ != "Conv1D"


def refuse_without_float64(model: nn.Module) -> None:
    """Check that no stack of experts in float64 is computed by a kernel that lacks it."""
    for experts in filter(is_experts, model.modules()):
        kernel = compat.experts_implementation(experts)
        if kernel == "grouped_mm" and next(experts.parameters()).dtype == torch.float64:
            raise ModelStateError(
                f"the experts of {type(experts).__name__} are in float64 and computed by "
                f"{kernel!r}, which has no float64.",
                remedy="Load the Hugging Face model with experts_implementation='eager', or call "
                "hf_model.set_experts_implementation('eager').",
                in_shell="Take --dtype float32.",
            )


def stacks_of(experts: Any) -> tuple[str, str]:
    """The names of its stacks of weights, in the order of a forward pass."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def as_one_map(owner: Any, weight: Tensor) -> Float[Tensor, "out in"]:
    """[W_1 … W_E] of a stack, [out, expert · in], as a copy; a router's weight as it is."""
    weights = weight.detach()
    if weights.ndim == 2:
        return weights
    weights = weights.mT if owner.is_transposed else weights
    return weights.transpose(0, 1).flatten(1)


def each_shape(owner: Any, weight: Tensor) -> tuple[int, int]:
    """(out, in) of each expert's map, or of a router's."""
    out, width = weight.shape[-2:]
    return (width, out) if weight.ndim == 3 and owner.is_transposed else (out, width)


def with_expert(
    x: Float[Tensor, "*token slot in"], expert: Int[Tensor, "*token slot"]
) -> Float[Tensor, "*token slot in_and_expert"]:
    """z = (x, e)."""
    digits = torch.stack([expert // _DIGIT, expert % _DIGIT], -1)
    return torch.cat([x, digits.to(x.dtype)], -1)


def expert_of(z: Float[Tensor, "... in_and_expert"]) -> Int[Tensor, "..."]:
    """e of z = (x, e)."""
    high, low = z.detach()[..., -ID_COLUMNS:].long().unbind(-1)
    return high * _DIGIT + low


class _Written(compat.SharedForward):
    def written(self, name: str, z: Tensor, out: Tensor) -> Tensor:
        """The output of the map, after all writers at this parameter."""
        for parameter, writer in self.asked:
            moved = writer((z,), out) if parameter == name else None
            out = out if moved is None else moved
        return out


class _Experts(_Written):
    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        experts: Any = self.module
        into, out_of = stacks_of(experts)
        with compat.brought_in(experts):
            x = hidden_states[:, None].expand(*top_k_index.shape, -1)
            hidden = self._mapped(into, x, top_k_index)
            inner = compat.gated(experts, hidden) if experts.has_gate else experts.act_fn(hidden)
            outs = self._mapped(out_of, inner, top_k_index)
        if experts.has_post_expert_norm:
            outs = experts.post_expert_norm(outs)
        return (outs * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)

    def _mapped(self, name: str, x: Tensor, index: Int[Tensor, "token slot"]) -> Tensor:
        """W_e x of every token and slot, one product for each expert."""
        experts: Any = self.module
        stack, biases = getattr(experts, name), getattr(experts, f"{name}_bias", None)
        order = index.flatten().argsort(stable=True)
        counts = torch.bincount(index.flatten(), minlength=experts.num_experts).tolist()
        outs = [
            linear(rows, stack[e].T if experts.is_transposed else stack[e], _row(biases, e))
            for e, rows in enumerate(x.flatten(0, 1)[order].split(counts))
            if len(rows)
        ]
        out = torch.cat(outs)[order.argsort()].unflatten(0, index.shape)
        if not any(parameter == name for parameter, _ in self.asked):
            return out
        return self.written(name, with_expert(x, index), out)


def _row(biases: Tensor | None, expert: int) -> Tensor | None:
    return None if biases is None else biases[expert]


class _Router(_Written):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        with compat.brought_in(module), _AtWeight(module.get_parameter("weight"), self.written):
            return self.before(*args, **kwargs)


class _AtWeight(TorchFunctionMode):
    """Within the block, what `F.linear` makes of a weight, in any dtype, goes through `write`."""

    def __init__(self, weight: Tensor, write: Callable[[str, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._forms, self._write = [weight], write

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        result = func(*args, **named)
        if func in _CASTS and self._is_weight(args[0]):
            self._forms.append(result)
        if func is linear:
            operands = [*args, *(named[key] for key in ("input", "weight") if key in named)]
            inputs, weight = operands[:2]
            return self._write("weight", inputs, result) if self._is_weight(weight) else result
        return result

    def _is_weight(self, tensor: object) -> bool:
        return any(tensor is form for form in self._forms)


def is_weight(model: nn.Module, owner: str, name: str) -> bool:
    """Whether a module of this path holds a parameter of this name."""
    return isinstance(getattr(model.get_submodule(owner), name, None), nn.Parameter)


def write_at(span: compat.Temporary, module: nn.Module, name: str, writer: Writer) -> None:
    """The writer sees z and changes the output of this parameter's map, until the span ends."""
    if compat.is_split_over_processes(module):
        raise ModelStateError(
            f"{name}: the experts of {type(module).__name__} are spread over processes, so no "
            "process has all of them. Load the model without expert parallelism."
        )
    (_Experts if is_experts(module) else _Router).until(span, module, (name, writer))


def experts_by_layer(model: nn.Module) -> dict[int, nn.Module]:
    """{layer: its stack of experts}; a layer's number is the first in the module's name."""
    stacks = ((name, module) for name, module in model.named_modules() if is_experts(module))
    numbered = ((re.search(r"\.(\d+)\.", name), module) for name, module in stacks)
    return {int(match[1]): module for match, module in numbered if match}


_NAMES = {"Linear4bit": "4 bit", "Linear8bitLt": "8 bit"}


def quantised_name(module: nn.Module) -> str | None:
    """'4 bit' or '8 bit' for a linear module of bitsandbytes, None for any other."""
    for cls in type(module).__mro__:
        if cls.__name__ in _NAMES and cls.__module__.startswith("bitsandbytes."):
            return _NAMES[cls.__name__]
    return None


def quantised_linears(model: nn.Module) -> tuple[nn.Module, ...]:
    """Every linear module of bitsandbytes."""
    return tuple(module for module in model.modules() if quantised_name(module) is not None)


def dequantised(module: nn.Module, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
    """Ŵ, made anew at each call."""
    of = _of_4bit if quantised_name(module) == "4 bit" else _of_8bit
    return of(module, dtype)


@compat.temporary
def differentiable_products(span: compat.Temporary, modules: tuple[nn.Module, ...]) -> None:
    """Within the block these modules have derivatives of every order, and values as above."""
    for module in modules:
        product = _Product if quantised_name(module) == "4 bit" else _StraightThrough
        product.until(span, module, object(), compat.computing_attribute(module))


class _Product(compat.SharedForward):
    def __call__(self, x: Tensor) -> Tensor:
        """x Ŵᵀ + b in the module's compute dtype, as bitsandbytes chooses it."""
        module: Any = self.module
        dtype = module.compute_dtype if module.compute_type_is_set else None
        if dtype is None and x.dtype in (torch.float32, torch.bfloat16):
            dtype = x.dtype
        dtype = dtype or x.dtype
        bias = None if module.bias is None else module.bias.to(dtype)
        return linear(x.to(dtype), _of_4bit(module, dtype), bias).to(x.dtype)


class _StraightThrough(compat.SharedForward):
    def __call__(self, x: Tensor) -> Tensor:
        """The kernel's value; where a derivative is asked for, with that of x Ŵᵀ + b."""
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

    held = getattr(module.weight, "quant_state", None) or module.quant_state
    packed, state = module.weight.data, copy.copy(held)
    if getattr(state, "packing_format_for_cpu", False):
        # The scales of blocks stay as they were packed: transposed, in bfloat16, and not nested.
        state.original_nested = False
        packed, state = compat.unpacked_4bit(packed, state)
        state.absmax = held.absmax.T.reshape(-1).float()
    target = dtype or state.dtype
    state.dtype = torch.float32 if target == torch.float64 else target
    return functional.dequantize_4bit(packed, state).to(target)


def _of_8bit(module: Any, dtype: torch.dtype | None) -> Float[Tensor, "out in"]:
    state = module.weight if module.state.CB is None else module.state
    return state.CB.to(dtype or torch.float32) * (state.SCB.unsqueeze(1) / 127.0)
