"""Every public call that runs a model under a lens, and the numbers that come back.

Each folder of tests has the calls of its question in its own `made_public.py` (`by_folder.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import by_folder
import torch
from shared_questions import directions
from torch import Tensor

import lens_lora as ll

Call = Callable[[ll.LoraLens, Tensor], Any]


def _applied(lens: ll.LoraLens, tokens: Tensor) -> Tensor:
    with torch.no_grad(), lens.applied() as model:
        return model(tokens)


def _without(lens: ll.LoraLens, tokens: Tensor) -> Tensor:
    with torch.no_grad(), lens.ablate_directions(directions(lens)) as model:
        return model(tokens)


def _listed(lens: ll.LoraLens, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return lens.model.run_with_hooks(tokens, fwd_hooks=lens.fwd_hooks())


CALLS: dict[str, Call] = by_folder.named("CALLS")
# A person's own run of the model: settings around it are theirs.
OWN: dict[str, Call] = {"applied": _applied, "fwd_hooks": _listed, "without": _without}


def numbers(result: Any) -> list[Tensor]:
    """The tensors of numbers that a result holds, in order."""
    if isinstance(result, Tensor):
        return [result]
    if hasattr(result, "cache_dict"):
        return list(result.cache_dict.values())
    held = (getattr(result, field.name) for field in dataclasses.fields(result))
    return [value for value in held if isinstance(value, Tensor) and value.is_floating_point()]


def same(found: Any, expected: Any, tolerance: float) -> bool:
    """Whether two results have equal numbers, up to this share of the largest."""
    pairs = zip(numbers(found), numbers(expected), strict=True)
    return all(_same(a, b, tolerance) for a, b in pairs)


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    size = b.nan_to_num().abs().max().item() if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=tolerance * size, equal_nan=True)
