"""Products whose factors are rounded, as devices round them that compute float32 by other units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PRODUCTS = {
    *(torch.matmul, torch.mm, torch.bmm, torch.einsum, torch.addmm, torch.baddbmm),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm),
    torch.nn.functional.linear,
}


def to_tf32(value: Tensor) -> Tensor:
    """The nearest number with 10 bits behind its leading one, half a unit away from zero."""
    bits = value.detach().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class TF32(TorchFunctionMode):
    """Factors of float32 products are rounded to 10 bits, forward; derivatives pass through it.

    As where a program has set `torch.set_float32_matmul_precision("high")` on a GPU.
    """

    def __enter__(self) -> TF32:
        torch.set_float32_matmul_precision("high")
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_float32_matmul_precision("highest")

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args = tuple(map(_rounded, args)) if func in _PRODUCTS else args
        return func(*args, **(kwargs or {}))


def _rounded(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    return value + (to_tf32(value) - value).detach()
