"""Adapters that name single experts, for a model that holds all experts in one tensor.

transformers 4 had a module for each map of each expert. transformers 5 has a stack of all experts,
[expert, out, in], in which gate and up are one parameter. So an adapter's factors of an expert's
gate and up become, as in PEFT,

    A = [A_gate; A_up],     B = diag(B_gate, B_up)

and an expert without factors gets zeros.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from lens_lora.core import Adapter, LoRAFactors, ModuleUpdate
from lens_lora.core.adapter import expert_factors
from lens_lora.core.model import extensions, names_by_path
from lens_lora.errors import AdapterError
from lens_lora.hosts.experts import expert_shape, is_experts, stacks_of

# For each name that transformers 4 gave to a map of an expert: the stack that holds it now, and
# which half of that stack it is.
_STACK_OF = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
}
_EXPERT = re.compile(rf"(.*\.\d+\.)(?:.*\.)?experts\.(\d+)\.({'|'.join(_STACK_OF)})(@.*)?")
# The factors of a stack by expert, then by half.
_Halves = dict[int, dict[int, LoRAFactors]]


class _OfExpert(NamedTuple):
    """The parts of an adapter's key that names a map of a single expert.

    Attributes:
        layer: the beginning of the path, up to the number of the layer.
        expert: the number of the expert.
        stack: the name of the parameter that holds the map now.
        half: which half of that parameter the map is.
        tag: '@' and the name of the part, in a sum of adapters; else ''.
    """

    layer: str
    expert: int
    stack: str
    half: int
    tag: str

    @classmethod
    def of(cls, key: str) -> _OfExpert | None:
        match = _EXPERT.fullmatch(key)
        if match is None:
            return None
        layer, expert, name, tag = match.groups()
        stack, half = _STACK_OF[name]
        return cls(layer, int(expert), stack, half, tag or "")


@extensions.named_as_model.provide
def on_stacks(adapter: Adapter, model: Any) -> Adapter:
    """The adapter with the factors of single experts joined into those of the model's stacks.

    If a layer has no such stack, or several, the adapter's names are not changed, and are refused
    later as unknown.

    Raises:
        AdapterError: an expert that the model lacks, or an update that is not a plain s·B·A.
    """
    named: dict[str, _OfExpert] = {}
    for key in adapter.modules:
        of_expert = _OfExpert.of(key)
        if of_expert is not None:
            named[key] = of_expert
    if not named:
        return adapter
    names = names_by_path(model)
    stacks: dict[str, Any] = {}
    for path, name in names.items():
        module = model.get_submodule(name)
        if is_experts(module):
            stacks[path] = module

    groups: dict[str, _Halves] = {}
    joined: set[str] = set()
    for key, of_expert in named.items():
        if key.partition("@")[0] in names:
            continue  # This model has the expert as a module of its own.
        paths = [path for path in stacks if path.startswith(of_expert.layer)]
        if len(paths) != 1 or of_expert.stack not in stacks_of(stacks[paths[0]]):
            continue
        halves = groups.setdefault(f"{paths[0]}.{of_expert.stack}{of_expert.tag}", {})
        factors = _plain_factors(key, adapter.modules[key])
        halves.setdefault(of_expert.expert, {})[of_expert.half] = factors
        joined.add(key)
    if not joined:
        return adapter

    modules = {key: update for key, update in adapter.modules.items() if key not in joined}
    for path, halves in groups.items():
        owner, _, stack = path.partition("@")[0].rpartition(".")
        modules[path] = _as_stack(path, halves, stacks[owner], stack)
    return dataclasses.replace(adapter, modules=modules)


def _plain_factors(key: str, update: ModuleUpdate) -> LoRAFactors:
    """Check that an update is a plain s·B·A, and return it."""
    if isinstance(update, LoRAFactors) and update.base_part is None and update.lora_bias is None:
        return update
    raise AdapterError(
        f"{key}: this model holds its experts as one tensor, which takes a plain s·B·A, and the "
        f"adapter has {update.base_part or 'a bias'} there."
    )


def _as_stack(path: str, halves: _Halves, experts: Any, stack: str) -> LoRAFactors:
    """The factors of a whole stack.

    Args:
        path: the path of the stack, for errors.
        halves: the adapter's factors of each expert.
        experts: the module that holds the stack.
        stack: the name of its parameter.
    """
    count = experts.num_experts
    if max(halves) >= count:
        raise AdapterError(
            f"{path}: the adapter has factors of expert {max(halves)}, and the model's "
            f"{type(experts).__name__} has {count} of them. Was it trained on "
            "another base model?"
        )
    out, width = expert_shape(experts, experts.get_parameter(stack))
    factors_of_one_expert = next(iter(halves.values()))
    like = next(iter(factors_of_one_expert.values()))
    # The output rows of each half of the parameter: the halves follow one another, or alternate.
    rows = torch.arange(out)[None]
    if stack == "gate_up_proj":
        rows = rows.view(2, -1) if experts.is_concatenated else rows.view(-1, 2).T
    no_change = LoRAFactors(like.A.new_zeros(1, width), like.B.new_zeros(out, 1))
    parts: list[LoRAFactors] = []
    for expert in range(count):
        if expert in halves:
            parts.append(_side_by_side(halves[expert], rows))
        else:
            parts.append(no_change)
    return expert_factors(parts)


def _side_by_side(
    factors_by_half: Mapping[int, LoRAFactors], rows: Int[Tensor, "half row"]
) -> LoRAFactors:
    """A = [A_gate; A_up] and B = diag(B_gate, B_up) of one expert.

    Args:
        factors_by_half: the adapter's factors of one half of the expert's map, or of both.
        rows: the output rows of each half.
    """
    As: list[Tensor] = []
    Bs: list[Tensor] = []
    for half, factors in factors_by_half.items():
        B = factors.B.new_zeros(rows.numel(), factors.rank)
        B[rows[half]] = factors.scale * factors.strength * factors.B
        As.append(factors.A)
        Bs.append(B)
    return LoRAFactors(torch.cat(As), torch.cat(Bs, 1))
