"""Find the modules of a hooked model, by their names here or by their Hugging Face paths.

A TransformerBridge puts components in the place of the modules of its base, and each component
wraps the module that it replaces. So a module has a name in the hooked model, and a path in the
base.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lens_lora.compat import unwrapped
from lens_lora.core.model.bases import stored_weight

# The hook point at which a component of a bridge shows its input.
HOOK_IN = ".hook_in"


def modules_of(model: nn.Module) -> dict[nn.Module, str]:
    """The name of each module of a hooked model; of a bridge also the modules of its base."""
    base = getattr(model, "original_model", model)
    names: dict[nn.Module, str] = {}
    for name, module in (*base.named_modules(), *model.named_modules()):
        names[module] = name
    return names


def module_at(model: Any, path: str) -> Any:
    """A module by its path; None where the model has none."""
    module = model
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def modules_in(model: nn.Module, before: str = "") -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Every module within another one.

    Yields:
        Its Hugging Face path; the module, or the component that stands in its place; and the module
        that holds it.
    """
    for name, module in unwrapped(model).named_children():
        yield f"{before}{name}", module, model
        yield from modules_in(module, f"{before}{name}.")


def names_by_path(model: Any) -> dict[str, str]:
    """The name of every module in this model, which may be a bridge, by its Hugging Face path."""
    names = {id(module): name for name, module in model.named_modules()}
    by_path: dict[str, str] = {}
    for path, module, _ in modules_in(getattr(model, "original_model", model)):
        wrapped = unwrapped(module)
        if id(wrapped) in names:
            by_path[path] = names[id(wrapped)]
    return by_path


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear module's weight."""
    if isinstance(linear, nn.Linear):  # the weight of a quantised one is packed
        return linear.out_features, linear.in_features
    out, width = stored_weight(linear).shape
    return out, width


def is_norm(module: nn.Module) -> bool:
    """Whether it is a norm with a γ."""
    if "Norm" not in type(module).__name__:
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """Compute n = (x − mean x) / s(x) of a norm γ ⊙ n + β, or (1 + γ) ⊙ n, whatever its formula.

    It is what the norm computes at γ = 1 less what it computes at γ = 0.
    """
    computed = Shell(norm)
    at_zero: dict[str, Tensor] = {}
    at_one: dict[str, Tensor] = {}
    for name, parameter in computed.named_parameters():
        at_zero[name] = torch.zeros_like(parameter)
        at_one[name] = at_zero[name]
        is_gamma = name.endswith("weight")
        if is_gamma:
            at_one[name] = torch.ones_like(parameter)
    with_gamma = functional_call(computed, at_one, (x,))
    without_gamma = functional_call(computed, at_zero, (x,))
    return with_gamma - without_gamma


class Shell(nn.Module):
    """A module without its hooks, to be run with other parameters.

    `functional_call` of the module itself would run its hooks.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._computes = module.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, as it was when this was made."""
        return self._computes(*args, **kwargs)


def holds_parameter(model: nn.Module, owner: str, name: str) -> bool:
    """Whether the module at the path `owner` holds a parameter of this name."""
    return isinstance(getattr(model.get_submodule(owner), name, None), nn.Parameter)
