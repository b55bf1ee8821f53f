"""The modules of a hooked model: by path, what a bridge's component wraps, what a norm computes.

A norm's n = (x − mean x) / s(x) is what the norm computes at γ = 1 less what it does at γ = 0,
whatever its formula.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lens_lora.core.model.bases import stored_weight

# The hook point at which a component of a bridge shows its input.
HOOK_IN = ".hook_in"


def module_at(model: Any, path: str) -> Any:
    """A module by its path; None where the model has none."""
    return functools.reduce(lambda owner, name: getattr(owner, name, None), path.split("."), model)


def modules_in(model: nn.Module, before: str = "") -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(Hugging Face path, module or the component in its place, what it is in)."""
    for name, module in unwrapped(model).named_children():
        yield f"{before}{name}", module, model
        yield from modules_in(module, f"{before}{name}.")


def unwrapped(module: Any) -> Any:
    """The Hugging Face module that a component wraps, or the module itself."""
    return getattr(module, "original_component", None) or module


def names_by_path(model: Any) -> dict[str, str]:
    """Hugging Face path → name in this model, which may be a bridge; of every module in it."""
    names = {id(module): name for name, module in model.named_modules()}
    within = getattr(model, "original_model", model)
    modules = ((path, id(unwrapped(module))) for path, module, _ in modules_in(within))
    return {path: names[module] for path, module in modules if module in names}


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear module or an embedding of Hugging Face's."""
    return isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module)


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(out, in)."""
    if isinstance(linear, nn.Linear):  # the weight of a quantised one is packed
        return linear.out_features, linear.in_features
    out, width = stored_weight(linear).shape
    return out, width


def is_norm(module: nn.Module) -> bool:
    """Whether it is a norm with a γ."""
    weight = getattr(module, "weight", None) if "Norm" in type(module).__name__ else None
    return isinstance(weight, Tensor) and weight.ndim == 1


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """n of a norm γ ⊙ n + β, or (1 + γ) ⊙ n: what it computes at γ = 1 less that at γ = 0."""
    computed = Shell(norm)
    zeros = {name: torch.zeros_like(p) for name, p in computed.named_parameters()}
    ones = {n: torch.ones_like(p) if n.endswith("weight") else p for n, p in zeros.items()}
    return functional_call(computed, ones, (x,)) - functional_call(computed, zeros, (x,))


class Shell(nn.Module):
    """What a module computes, past its hooks: a call with other parameters passes `forward` by."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._computes = module.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, as it was when this was made."""
        return self._computes(*args, **kwargs)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear module, which holds its weight as [in, out]."""
    return type(module).__name__ == "Conv1D"


def is_weight(model: nn.Module, owner: str, name: str) -> bool:
    """Whether a module of this path holds a parameter of this name."""
    return isinstance(getattr(model.get_submodule(owner), name, None), nn.Parameter)
