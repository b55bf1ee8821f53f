"""Sums and multiples of adapters: keys of parts, finite factors, and what does not add up."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lens_lora.adapters.factors import LoRAFactors
from lens_lora.adapters.trained import ModuleUpdate
from lens_lora.errors import AdapterError, ArgumentError

__all__ = ["finite", "natural", "refuse_dora_twice", "stacked", "tagged"]


def finite(factor: Any, call: str = "scaled") -> float:
    """The factor of `Adapter.scaled`, or of another such call, as a number.

    Args:
        factor: what was given.
        call: the method's name, for the error.

    Raises:
        ArgumentError: no finite number.
    """
    try:
        number = float("nan") if isinstance(factor, str | bool) else float(factor)
    except (TypeError, ValueError, RuntimeError):
        number = float("nan")
    if not math.isfinite(number):
        raise ArgumentError(f"{call}({factor!r}); expected a finite number.")
    return number


def tagged(modules: Mapping[str, ModuleUpdate], name: str) -> dict[str, ModuleUpdate]:
    """The modules under 'path@name', those of a sum under the names they have.

    Args:
        modules: updates by path.
        name: the adapter's.
    """
    return {key if "@" in key else f"{key}@{name}": update for key, update in modules.items()}


def refuse_dora_twice(modules: Mapping[str, ModuleUpdate]) -> None:
    """Refuse DoRA on a module that has another update too.

    Args:
        modules: updates by 'path@name'.

    Raises:
        AdapterError: naming the module.
    """
    paths = [key.partition("@")[0] for key in modules]
    for key, update in modules.items():
        path = key.partition("@")[0]
        is_dora = isinstance(update, LoRAFactors) and update.magnitude is not None
        if is_dora and paths.count(path) > 1:
            raise AdapterError(
                f"{path} is adapted twice, once by DoRA, which rescales whatever W it finds: the "
                "two updates do not add up. Merge one of them into the base model first."
            )


def stacked(
    weighted: Sequence[tuple[Mapping[str, ModuleUpdate], float]],
) -> dict[str, ModuleUpdate]:
    """Σ weight · update of each module as one update; factors are stacked along the rank.

    Parts of a sum, 'path@name', are updates of one module too.

    Args:
        weighted: modules with the weight of each of their updates.

    Raises:
        AdapterError: a module with several updates that do not add up.
    """
    found: dict[str, list[ModuleUpdate]] = {}
    for modules, weight in weighted:
        for key, update in modules.items():
            path = key.partition("@")[0]
            found.setdefault(path, []).append(update.scaled(weight))
    return {path: _one(path, updates) for path, updates in found.items()}


def _one(path: str, updates: Sequence[ModuleUpdate]) -> ModuleUpdate:
    if len(updates) == 1:
        return updates[0]
    factors = [_additive(path, update) for update in updates]
    dtype = functools.reduce(torch.promote_types, (t.dtype for f in factors for t in (f.A, f.B)))
    dtype = torch.promote_types(dtype, torch.float32)
    shapes = {(len(f.B), f.A.shape[1]) for f in factors}
    if len(shapes) > 1:
        one, other = (f"{inputs}→{out}" for out, inputs in sorted(shapes)[:2])
        raise AdapterError(
            f"{path}: one adapter maps {one}, the other {other}; were they trained on one base?"
        )
    B = torch.cat([f.scale * f.strength * f.B.to(dtype) for f in factors], 1)
    biases = [
        f.scale * f.strength * f.lora_bias.to(dtype) for f in factors if f.lora_bias is not None
    ]
    bias = torch.stack(biases).sum(0) if biases else None
    return LoRAFactors(torch.cat([f.A.to(dtype) for f in factors]), B, lora_bias=bias)


def _additive(path: str, update: ModuleUpdate) -> LoRAFactors:
    """The update, if it is sBA and a change of bias that the file holds."""
    if not isinstance(update, LoRAFactors):
        what = "is trained whole"
    elif update.magnitude is not None:
        what = "has DoRA"
    elif update.trained_bias is not None or update.base_weight is not None:
        what = "has a bias or a weight of the base's own"
    else:
        return update
    raise AdapterError(
        f"{path} is adapted more than once, and one time it {what}, which does not add up without "
        "the base model. Make that change plain first: Adapter.between(base, peft_model."
        "merge_and_unload())."
    )


def natural(item: tuple[str, Any]) -> list[tuple[int, int, str]]:
    """Sort key: 'layers.2' before 'layers.10'.

    Args:
        item: (path, anything).
    """
    return [(0, len(p), p) if p.isdigit() else (1, 0, p) for p in item[0].split(".")]
