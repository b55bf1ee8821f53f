"""Products of torch: which functions compute them, and the order of their operands."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


def rows_and_weight(
    func: Any, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, ...] | None:
    """The operands x, W and b of a product xW + b of rows with a matrix; None for other products.

    Args:
        func: torch's function.
        args: its arguments.
        named: its named arguments.
    """
    first, second, third = cast("tuple[Any, Any, Any]", (*args, None, None)[:3])
    if func is torch.addmm:
        # addmm(b, x, W)
        bias = first
        x = second
        weight = third
    elif func is functional.linear:
        # linear(x, Wᵀ, b)
        x = first
        weight = second.transpose(0, -1)
        bias = third
    else:
        # matmul(x, W)
        x = first
        weight = second
        bias = third
    if named or x.ndim < 2 or weight.ndim != 2:
        return None
    if bias is not None and bias.ndim != 1:
        return None
    return x, weight, bias
