"""Attention of dual numbers: products of two of them, and the softmax between.

    (A + Ȧd)(B + Ḃd) = AB + (ȦB + AḂ)d          P = softmax(S),  Ṗ = P ∘ (Ṡ − Σ_k P ∘ Ṡ)

The scores are the largest of what a long prompt computes, and torch goes over them once for every
term. Here terms are added where they lie, and where all rows have the same primal AB and P are
computed once.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

from lens_lora.calculus.dual_parts import common, over, parts_of, spread

__all__ = ["batched_product", "softmax"]


def batched_product(rows: int, left: Tensor, right: Tensor) -> Tensor | None:
    """AB of two batches of matrices; None where torch has to do it."""
    (a, da), (b, db) = parts_of(left), parts_of(right)
    alike = a.ndim == b.ndim > 2 and a.shape[:-2] == b.shape[:-2]
    if not alike or (da is None and db is None):
        return None
    return fwad.make_dual(spread(common(a, rows) @ common(b, rows), a), _moved(a, da, b, db))


def _moved(a: Tensor, da: Tensor | None, b: Tensor, db: Tensor | None) -> Tensor:
    """ȦB + AḂ."""
    if da is None:
        return a @ cast("Tensor", db)
    if db is None:
        return da @ b
    moved = (da @ b).flatten(0, -3)
    moved.baddbmm_(a.flatten(0, -3), db.flatten(0, -3))
    return moved.view(*da.shape[:-1], db.shape[-1])


def softmax(
    rows: int,
    input: Tensor,
    dim: int | None = None,
    *rest: Any,
    dtype: torch.dtype | None = None,
    _stacklevel: int = 3,
    **other: Any,
) -> Tensor | None:
    """P along `dim`; None where torch has to do it."""
    del _stacklevel
    x, dx = parts_of(input)
    if rest or other or dx is None or dim is None or dim % x.ndim == 0:
        return None
    P = torch.softmax(common(x, rows), dim, dtype)
    moved = over(P, x) * dx.to(P.dtype)
    moved.addcmul_(over(P, x), moved.sum(dim, keepdim=True), value=-1)
    return fwad.make_dual(spread(P, x), moved)
