"""All that a model holds (hooks, weights, gradients, flags), and models of merged weights."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import cases
import models
import torch


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a model.

    Attributes:
        name: its name.
        value: a copy of its value.
        grad: its gradient, the tensor itself.
        requires_grad: whether a gradient is asked for.
        version: how often it was written to in place.
    """

    name: str
    value: torch.Tensor
    grad: torch.Tensor | None
    requires_grad: bool
    version: int

    @classmethod
    def of(cls, name: str, parameter: torch.nn.Parameter) -> Parameter:
        value = parameter.detach().clone()
        return cls(name, value, parameter.grad, parameter.requires_grad, parameter._version)

    def is_same_as(self, other: Parameter) -> bool:
        return (
            self.name == other.name
            and torch.equal(self.value, other.value)
            and self.grad is other.grad
            and self.requires_grad == other.requires_grad
            and self.version == other.version
        )


@dataclasses.dataclass(frozen=True)
class State:
    """What a model holds that a call could leave changed.

    Attributes:
        hook_counts: torch's own forward, forward-pre and backward hooks of each module, by name.
        listed_hook_counts: the hooks that each hook point of TransformerLens lists, by name.
        parameters: every parameter.
    """

    hook_counts: dict[str, tuple[int, int, int]]
    listed_hook_counts: dict[str, tuple[int, int]]
    parameters: tuple[Parameter, ...]


def state(model: Any) -> State:
    """What the model holds after a plain forward pass.

    Without the pass a Bridge would seem changed: it registers hooks of its own on its first one.
    """
    with torch.no_grad():
        model(models.tokens())
    hook_counts: dict[str, tuple[int, int, int]] = {}
    for name, module in model.named_modules():
        hook_counts[name] = (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
        )
    listed: dict[str, tuple[int, int]] = {}
    for name, point in model.hook_dict.items():
        listed[name] = (len(point.fwd_hooks), len(point.bwd_hooks))
    parameters = [Parameter.of(name, parameter) for name, parameter in model.named_parameters()]
    return State(hook_counts, listed, tuple(parameters))


def same(before: State, after: State) -> bool:
    """Whether nothing has changed: no hook, no weight, no gradient and no flag."""
    if before.hook_counts != after.hook_counts:
        return False
    if before.listed_hook_counts != after.listed_hook_counts:
        return False
    pairs = zip(before.parameters, after.parameters, strict=True)
    return all(one.is_same_as(other) for one, other in pairs)


@functools.cache
def merged_model(family: str, cls: str, flags: str):
    """The hooked model of the merged Hugging Face weights, processed alike."""
    case = cases.case(family, cls, flags)
    merged = copy.deepcopy(case.peft).merge_and_unload()
    merged.config.architectures = case.base.config.architectures
    return models.MAKERS[cls](merged, **cases.FLAGS[flags])
