"""A dual number x + ẋd in its parts, and values that all rows of a batch have in common."""

from __future__ import annotations

from typing import Any

import torch.autograd.forward_ad as fwad
from torch import Tensor

__all__ = ["common", "over", "parts_of", "spread"]


def parts_of(value: Any) -> tuple[Any, Tensor | None]:
    """x and ẋ; ẋ is None of a constant, which need not be a tensor."""
    if not isinstance(value, Tensor):
        return value, None
    primal, tangent = fwad.unpack_dual(value)
    return primal, tangent


def common(x: Tensor, rows: int) -> Tensor:
    """The first of `rows` equal rows; all of x, if it has no such rows."""
    if rows == 1 or x.ndim == 0 or len(x) % rows:
        return x
    return x[: len(x) // rows]


def spread(value: Tensor, like: Tensor) -> Tensor:
    """What was computed of the first row, for as many rows as `like` has."""
    if value.ndim == 0 or len(value) == len(like):
        return value
    return value.repeat(len(like) // len(value), *[1] * (value.ndim - 1))


def over(value: Tensor, like: Tensor) -> Tensor:
    """The same, where it may as well be broadcast."""
    return value if value.ndim and len(value) == 1 else spread(value, like)
