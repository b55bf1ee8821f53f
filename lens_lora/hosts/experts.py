"""Stacks of experts, and routers: how an adapter writes at their parameters.

A layer of experts holds one tensor for all of them, W [expert, out, in], and the router sends each
token to k of them. In slot j of a token, its expert e computes W_e x. So an update is a site like
any other, with

    z = (x, e)  [row, pos, slot, in + 2],     δ(z) = s·B_e A_e x  [row, pos, slot · out].

transformers computes W_e x inside one call that has no hook points. So while a lens's hooks are on,
the module computes W_e x for all tokens and slots by the code of this file, which follows the flags
that the module's class states (`transformers.integrations.moe`): gated or not, transposed or not,
with biases or without. That is exact in every dtype, and has derivatives in both modes, whatever
`experts_implementation` says.

A router is one linear map, W [expert, in], in a module of its own. The module's own code computes
it, and the site writes where `F.linear` has multiplied by W.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from lens_lora import compat
from lens_lora.compat import in_float64
from lens_lora.core import SiteMap, Update
from lens_lora.core.model import Input, extensions, norm_of_product
from lens_lora.errors import ModelStateError
from lens_lora.spans import Temporary

# The number of an expert is written beside x as two digits in this base: every float dtype holds
# the whole numbers below it exactly.
_DIGIT = 256
ID_COLUMNS = 2
# What a router may do to its weight before the product.
_CASTS = (Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.type_as)
# The attributes by which transformers' modules of experts describe themselves.
_FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def is_experts(module: object) -> bool:
    """Whether a module holds a stack of experts, in the form that transformers has for all."""
    # Few modules have such a parameter, and missing attributes are slow to look up.
    if not isinstance(module, nn.Module) or "down_proj" not in compat.own_parameters(module):
        return False
    return all(hasattr(module, flag) for flag in _FLAGS)


def is_router(module: object) -> bool:
    """Whether a module holds the weight of a linear map without being a linear module."""
    if not isinstance(module, nn.Module) or isinstance(module, nn.Linear | nn.Embedding):
        return False
    weight = getattr(module, "weight", None)
    is_matrix = isinstance(weight, nn.Parameter) and weight.ndim == 2
    return is_matrix and type(module).__name__ != "Conv1D"


@extensions.refuse_without_float64.provide
def refuse_without_float64(modules: Iterable[nn.Module]) -> None:
    """Refuse experts in float64 if their kernel has no float64."""
    for experts in filter(is_experts, modules):
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
    """The names of the stacks of weights, in the order of a forward pass."""
    into = "gate_up_proj" if experts.has_gate else "up_proj"
    return into, "down_proj"


@extensions.as_one_map.provide
def as_one_map(owner: Any, weight: Tensor) -> Float[Tensor, "out in"]:
    """The weights of all experts side by side, [W_1 … W_E], as a copy; a router's as it is."""
    weights = weight.detach()
    if weights.ndim == 2:
        return weights
    if owner.is_transposed:
        weights = weights.mT
    return weights.transpose(0, 1).flatten(1)


@extensions.expert_shape.provide
def expert_shape(owner: Any, weight: Tensor) -> tuple[int, int]:
    """(out, in) of each expert's map, or of a router's."""
    rows, columns = weight.shape[-2:]
    if weight.ndim == 3 and owner.is_transposed:
        return columns, rows
    return rows, columns


def with_expert(
    x: Float[Tensor, "*token slot in"], expert: Int[Tensor, "*token slot"]
) -> Float[Tensor, "*token slot in_and_expert"]:
    """Join x and the number of the expert: z = (x, e)."""
    digits = torch.stack([expert // _DIGIT, expert % _DIGIT], -1)
    return torch.cat([x, digits.to(x.dtype)], -1)


def expert_of(z: Float[Tensor, "... in_and_expert"]) -> Int[Tensor, "..."]:
    """Read the number of the expert from z = (x, e)."""
    high, low = z.detach()[..., -ID_COLUMNS:].long().unbind(-1)
    return high * _DIGIT + low


class _Written(compat.SharedForward):
    """The forward of a module that has writers at its parameters."""

    def written(self, name: str, z: Tensor, out: Tensor) -> Tensor:
        """The output of the map, after all writers at this parameter."""
        for parameter, writer in self.asked:
            if parameter != name:
                continue
            changed = writer((z,), out)
            if changed is not None:
                out = changed
        return out


class _Experts(_Written):
    """The forward of a stack of experts, computed map by map."""

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
        """Compute W_e x for every token and slot, with one product for each expert."""
        experts: Any = self.module
        stack = getattr(experts, name)
        biases = getattr(experts, f"{name}_bias", None)
        # Sort the rows by their expert, so that the rows of one expert follow one another.
        expert_of_row = index.flatten()
        order = expert_of_row.argsort(stable=True)
        counts = torch.bincount(expert_of_row, minlength=experts.num_experts).tolist()
        rows_by_expert = x.flatten(0, 1)[order].split(counts)
        outs: list[Tensor] = []
        for expert, rows in enumerate(rows_by_expert):
            if not len(rows):
                continue
            weight = stack[expert].T if experts.is_transposed else stack[expert]
            bias = None if biases is None else biases[expert]
            outs.append(linear(rows, weight, bias))
        in_own_order = torch.cat(outs)[order.argsort()]
        out = in_own_order.unflatten(0, index.shape)
        if not any(parameter == name for parameter, _ in self.asked):
            return out
        return self.written(name, with_expert(x, index), out)


class _Router(_Written):
    """The forward of a router: its own code, with writers where its weight was multiplied."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        with compat.brought_in(module), _AtWeight(module.get_parameter("weight"), self.written):
            return self.before(*args, **kwargs)


class _AtWeight(TorchFunctionMode):
    """Within the block, the result of `F.linear` with this weight goes through `write`.

    The weight may have been cast to another dtype before.
    """

    def __init__(self, weight: Tensor, write: Callable[[str, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._forms = [weight]
        self._write = write

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        result = func(*args, **named)
        if func in _CASTS and self._is_weight(args[0]):
            self._forms.append(result)
        if func is linear:
            by_keyword = [named[key] for key in ("input", "weight") if key in named]
            inputs, weight, *_ = [*args, *by_keyword]
            if self._is_weight(weight):
                return self._write("weight", inputs, result)
        return result

    def _is_weight(self, tensor: object) -> bool:
        """Whether a tensor is the weight, or a cast of it."""
        return any(tensor is form for form in self._forms)


@extensions.write_at.provide
def write_at(span: Temporary, module: nn.Module, name: str, writer: extensions.Writer) -> None:
    """Let a writer change the output of a parameter's map, until the span ends."""
    if compat.is_split_over_processes(module):
        raise ModelStateError(
            f"{name}: the experts of {type(module).__name__} are spread over processes, so no "
            "process has all of them. Load the model without expert parallelism."
        )
    kind = _Experts if is_experts(module) else _Router
    kind.until(span, module, (name, writer))


@extensions.experts_by_layer.provide
def experts_by_layer(model: nn.Module) -> dict[int, nn.Module]:
    """The stack of experts of each layer; the first number in a module's name is its layer."""
    stacks: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if not is_experts(module):
            continue
        number = re.search(r"\.(\d+)\.", name)
        if number:
            stacks[int(number[1])] = module
    return stacks


# --- The map of a stack


@dataclasses.dataclass(frozen=True)
class ExpertMap(SiteMap):
    """The map δ(x, e) = s·B_e A_e x of a stack of experts.

    The ranks of all experts follow one another; for expert e, u is zero outside its own ranks.
    """

    def inputs(self, z: Input) -> Float[Tensor, "... _read"] | Int[Tensor, "..."]:
        """The input x of z = (x, e)."""
        return z[..., :-ID_COLUMNS]

    def by_token(self, u: Float[Tensor, "batch pos *slot rank"]) -> Float[Tensor, "batch pos rank"]:
        """Sum u over slots; each of a token's experts has ranks of its own, so nothing mixes."""
        return u.sum(2)

    def norm(self) -> float:
        """√Σ_e ‖B_e A_e‖_F²."""
        return float(self.weight_norm())

    def weight_norm(self) -> Float[Tensor, ""]:
        """√Σ_e ‖B_e A_e‖_F²."""
        pairs = zip(self.sB.chunk(self.experts, 1), self.A.chunk(self.experts), strict=True)
        return torch.stack([norm_of_product(*pair) for pair in pairs]).norm()

    def of_weight(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """The factors (sB, A) of the change of [W_1 … W_E], [out, expert · in]."""
        return self.sB, torch.block_diag(*self.A.chunk(self.experts))

    def coordinates(self, z: Input) -> Float[Tensor, "... rank"]:
        """Compute Ax at the ranks of expert e, and 0 at all other ranks."""
        owners = torch.arange(self.rank, device=z.device) // (self.rank // self.experts)
        is_own = owners == expert_of(z)[..., None]
        return (self.inputs(z).to(self.dtype) @ self.A.T) * is_own

    def write(self, u: Float[Tensor, "... rank"]) -> Float[Tensor, "... out"]:
        """Compute δ = sB·u of each slot; the features of the slots follow one another."""
        delta = u @ self.sB.T
        return delta.flatten(2) if u.ndim == 4 else delta

    def own_by_head(
        self,
        gradient: Float[Tensor, "batch pos slot_and_out"],
        z: Float[Tensor, "batch pos slot in"],
        heads: int,
    ) -> Float[Tensor, "batch pos 1 rank"]:
        """Split ⟨G, δ⟩ by coordinate, summed over slots; experts have no heads."""
        gradient = gradient.unflatten(-1, (z.shape[2], -1))
        return (self.back(gradient) * self.coordinates(z)).sum(2, keepdim=True)


@extensions.expert_map.provide
def expert_map(update: Update, dtype: torch.dtype, device: torch.device) -> ExpertMap:
    """The map of a stack of experts, on the device where the model lies."""
    reads = in_float64(update.A)
    writes = in_float64(update.B) * update.scale
    return ExpertMap(
        A=reads.to(dtype).to(device),
        sB=writes.to(dtype).to(device),
        a0=None,
        experts=update.experts,
    )
