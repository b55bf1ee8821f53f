"""Sums and multiples of adapters: keys of parts, finite factors, and what does not add up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lens_lora.adapters.factors import LoRAFactors
from lens_lora.adapters.trained import ModuleUpdate
from lens_lora.errors import AdapterError, ArgumentError

__all__ = ["finite", "natural", "refuse_dora_twice", "tagged"]


def finite(factor: Any) -> float:
    """The factor of `Adapter.scaled` as a number.

    Args:
        factor: what was given.

    Raises:
        ArgumentError: no finite number.
    """
    try:
        number = float("nan") if isinstance(factor, str | bool) else float(factor)
    except (TypeError, ValueError, RuntimeError):
        number = float("nan")
    if not math.isfinite(number):
        raise ArgumentError(f"scaled({factor!r}); expected a finite number.")
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


def natural(item: tuple[str, Any]) -> list[tuple[int, int, str]]:
    """Sort key: 'layers.2' before 'layers.10'.

    Args:
        item: (path, anything).
    """
    return [(0, len(p), p) if p.isdigit() else (1, 0, p) for p in item[0].split(".")]
