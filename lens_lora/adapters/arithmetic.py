"""Several updates of one module as one, and what does not add up.

    a + b                   both at once; the parts stay apart, as 'path@name'
    a − b, a.mixed(b, w)    one adapter: ΔW_a − ΔW_b,  (1 − w) ΔW_a + w ΔW_b

In one adapter the factors of a module that both adapt are stacked along the rank, which is exact
(PEFT's `add_weighted_adapter` calls that "cat"); changes of bias are summed. DoRA rescales whatever
W it finds, and a trained module or bias replaces the base's: these do not add up.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lens_lora.adapters.factors import LoRAFactors, ModuleUpdate, base_part, expert_factors
from lens_lora.errors import AdapterError


def tagged(modules: Mapping[str, ModuleUpdate], name: str) -> dict[str, ModuleUpdate]:
    """The modules under 'path@name', those of a sum under the names they have."""
    return {key if "@" in key else f"{key}@{name}": update for key, update in modules.items()}


def module_path(key: str) -> str:
    """The module's path, without the name of its part in a sum."""
    return key.partition("@")[0]


def refuse_dora_twice(modules: Mapping[str, ModuleUpdate]) -> None:
    """Refuse DoRA on a module that has another update too.

    Raises:
        AdapterError: naming the module.
    """
    counts = Counter(map(module_path, modules))
    for key, update in modules.items():
        path = module_path(key)
        if isinstance(update, LoRAFactors) and update.magnitude is not None and counts[path] > 1:
            raise AdapterError(
                f"{path} is adapted twice, once by DoRA, which rescales whatever W it finds: the "
                "two updates do not add up. Merge one of them into the base model first."
            )


def stacked(
    weighted: Sequence[tuple[Mapping[str, ModuleUpdate], float]],
) -> dict[str, ModuleUpdate]:
    """Σ weight · update of each module as one update; factors are stacked along the rank.

    Parts of a sum, 'path@name', are updates of one module too.

    Raises:
        AdapterError: a module with several updates that do not add up.
    """
    updates: dict[str, list[ModuleUpdate]] = {}
    for modules, weight in weighted:
        for key, update in modules.items():
            updates.setdefault(module_path(key), []).append(update.scaled(weight))
    return {
        path: parts[0] if len(parts) == 1 else _stack(path, [_additive(path, p) for p in parts])
        for path, parts in updates.items()
    }


def _stack(path: str, parts: Sequence[LoRAFactors]) -> LoRAFactors:
    experts = {part.experts for part in parts}
    if len(experts) > 1:
        raise AdapterError(f"{path}: the adapters have {experts} experts; the base has one number.")
    if max(experts) > 1:
        each = zip(*(part.by_expert() for part in parts), strict=True)
        return expert_factors([_stack(path, expert) for expert in each])
    dtypes = (tensor.dtype for part in parts for tensor in (part.A, part.B))
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    shapes = sorted({(len(part.B), part.A.shape[1]) for part in parts})
    if len(shapes) > 1:
        first, second = (f"{inputs}→{out}" for out, inputs in shapes[:2])
        raise AdapterError(
            f"{path}: one adapter maps {first}, the other {second}; were they trained on one base?"
        )
    A = torch.cat([part.A.to(dtype) for part in parts])
    B = torch.cat([part.scale * part.strength * part.B.to(dtype) for part in parts], 1)
    biases = [
        part.scale * part.strength * part.lora_bias.to(dtype)
        for part in parts
        if part.lora_bias is not None
    ]
    bias = torch.stack(biases).sum(0) if biases else None
    return LoRAFactors(A, B, lora_bias=bias, experts=max(experts))


def _additive(path: str, update: ModuleUpdate) -> LoRAFactors:
    """The update, if it is sBA and a change of bias that the file holds."""
    part = base_part(update)
    if isinstance(update, LoRAFactors) and part is None and update.base_weight is None:
        return update
    raise AdapterError(
        f"{path} is adapted more than once, and one of its updates holds "
        f"{part or 'a weight of the base'}, which does not add up without the base model. Make "
        "that change plain first: Adapter.between(base, peft_model.merge_and_unload())."
    )


def natural(item: tuple[str, Any]) -> list[tuple[int, int, str]]:
    """Sort key: 'layers.2' before 'layers.10'."""
    return [(0, len(p), p) if p.isdigit() else (1, 0, p) for p in item[0].split(".")]
