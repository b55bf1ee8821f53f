"""One matrix product for a linear map of dual numbers, instead of three.

    (x + ẋd) W + b = (xW + b) + (ẋW) d

Torch gives a constant weight a tangent of zeros, and multiplies by that too. Within `OneProduct`
primal and tangent go through the weight together; and where every row of a batch has the same
primal (tangents of many parts of one prompt), the primal goes through once, for all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["OneProduct"]

_Args = tuple[Any, ...]
_Linear = tuple[Tensor, Tensor, Tensor | None]
_APART = 4


class OneProduct(TorchFunctionMode):
    """Within the block, constant weights are multiplied by what is needed and nothing else.

    Attributes:
        rows: how many rows of the batch have one and the same primal: 1, or all that it has now.
            To be kept up to date by whoever lets the batch grow, and left at 1 for a model that
            takes tokens out of their rows (a mixture of experts).
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows = 1

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: _Args = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        read, kwargs = _READ.get(func), kwargs or {}
        linear = None if read is None else read(*args, **kwargs)
        found = None if linear is None else self._product(*linear)
        return func(*args, **kwargs) if found is None else found

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """None where this is no dual number times a constant."""
        primal, tangent = fwad.unpack_dual(x)
        if tangent is None or _is_dual(weight) or (bias is not None and _is_dual(bias)):
            return None
        share = self.rows if len(primal) % self.rows == 0 else 1
        own = len(primal) // share
        if share > _APART:
            value, moved = primal[:own] @ weight, tangent @ weight
        else:
            both = torch.cat([primal[:own], tangent]) @ weight
            value, moved = both[:own], both[own:]
        value = value if bias is None else value + bias
        return fwad.make_dual(value.repeat(share, *[1] * (value.ndim - 1)), moved)


def _is_dual(tensor: Tensor) -> bool:
    return fwad.unpack_dual(tensor).tangent is not None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Linear | None:
    return (input, weight.T, bias) if weight.ndim == 2 and input.ndim > 1 else None


def _matmul(input: Tensor, other: Tensor) -> _Linear | None:
    return (input, other, None) if other.ndim == 2 and input.ndim > 1 else None


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **factors: float) -> _Linear | None:
    return None if factors or input.ndim != 1 else (mat1, mat2, input)


_READ: dict[Callable[..., Any], Callable[..., _Linear | None]] = {
    functional.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
}
