"""Products and attention of dual numbers x + ẋd, without the products that torch wastes on zeros.

    (x + ẋd) W + b = (xW + b) + (ẋW) d              c(x + ẋd) + b = (cx + b) + (cẋ) d
    (A + Ȧd)(B + Ḃd) = AB + (ȦB + AḂ) d             P = softmax(S),  Ṗ = P ∘ (Ṡ − Σ_k P ∘ Ṡ)

1. Constant weights and factors. Torch multiplies a weight by the primal, by the tangent, and once
   more for the weight's own tangent, which is zero. Within `OneProduct` there is one product, of
   primal and tangent together.
2. Attention. The scores are the largest tensors of a long prompt, and torch passes over them once
   for every term; here terms are added in place.
3. Where every row of a batch has the same primal (tangents of many parts of one prompt), what
   depends on the primal only is computed once for all rows.
4. Operations without a rule here are left to torch.
5. Where the value keeps a graph, tangents are detached from it: nothing goes back through them.

Cost: a dual forward pass takes about 2.5 forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["OneProduct"]

_Args = tuple[Any, ...]
_Linear = tuple[Tensor, Tensor, Tensor | None]
_Moved = tuple[Tensor, Any]
_Rule = Callable[..., "_Moved | None"]
_APART = 4


class OneProduct(TorchFunctionMode):
    """Within the block, products of dual numbers follow the rules above.

    Attributes:
        rows: how many rows of the batch have the same primal: 1, or all rows that it has now. Code
            that adds rows must set it. It stays 1 for a mixture of experts, which takes tokens out
            of their rows.
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
        kwargs = kwargs or {}
        found = self._found(func, args, kwargs)
        return func(*args, **kwargs) if found is None else found

    def _found(self, func: Callable[..., Any], args: _Args, kwargs: dict[str, Any]) -> Any:
        """By a rule of ours; None where torch has to do it."""
        if func in _READ:
            linear = _READ[func](*args, **kwargs)
            if linear is not None:
                return self._product(*linear)
            return _batched_product(self.rows, *args) if func in _MATMUL and not kwargs else None
        if func in _SOFTMAX:
            return _softmax(self.rows, *args, **kwargs)
        if func is torch.where and len(args) == 3 and not kwargs:
            return _where(*args)
        if func in _POINTWISE and not kwargs:
            return _pointwise(_POINTWISE[func], *args)
        return None

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """None where this is no dual number times a constant."""
        primal, tangent = fwad.unpack_dual(x)
        if tangent is None or _is_dual(weight) or (bias is not None and _is_dual(bias)):
            return None
        first = _common(primal, self.rows)
        if len(primal) > _APART * len(first):
            value, moved = first @ weight, _alone(tangent) @ _alone(weight)
        else:
            both = torch.cat([_alone(first), _alone(tangent)]) @ _alone(weight)
            value, moved = both[: len(first)], both[len(first) :]
            if first.requires_grad:
                value = cast("Tensor", _Known.apply(first, _alone(weight), value))
        value = value if bias is None else value + bias
        return fwad.make_dual(_spread(value, primal), moved)


class _Known(torch.autograd.Function):
    """xW, computed already: only the way back to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, value: Tensor) -> Tensor:
        del x
        ctx.save_for_backward(weight)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.mT, None, None


def _is_dual(tensor: Tensor) -> bool:
    return fwad.unpack_dual(tensor).tangent is not None


def _pointwise(rule: _Rule, left: Any, right: Any) -> Tensor | None:
    """The rule, of a dual number and a constant; None where neither or both are dual."""
    (a, da), (b, db) = _parts_of(left), _parts_of(right)
    if (da is None) == (db is None):
        return None
    found = rule(a, da, b, db)
    if found is None or found[0].shape != found[1].shape:
        return None
    return fwad.make_dual(*found)


def _where(mask: Tensor, left: Any, right: Any) -> Tensor | None:
    """What a mask chooses of a dual number and a constant; None where neither or both are dual."""
    (a, da), (b, db) = _parts_of(left), _parts_of(right)
    if (da is None) == (db is None):
        return None
    moved: Tensor = torch.where(mask, 0.0 if da is None else da, 0.0 if db is None else db)
    value = torch.where(mask, a, b)
    same = value.shape == moved.shape and value.dtype == moved.dtype
    return fwad.make_dual(value, moved) if same else None


def _add(a: Any, da: Any, b: Any, db: Any) -> _Moved:
    # A tangent of its own: what is later done in place to the sum is not done to the summand.
    return a + b, (db if da is None else da).clone()


def _subtract(a: Any, da: Any, b: Any, db: Any) -> _Moved:
    return a - b, -db if da is None else da.clone()


def _multiply(a: Any, da: Any, b: Any, db: Any) -> _Moved:
    return a * b, da * _alone(b) if da is not None else _alone(a) * db


def _divide(a: Any, da: Any, b: Any, db: Any) -> _Moved | None:
    return None if da is None else (a / b, da / _alone(b))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Linear | None:
    return (input, weight.T, bias) if weight.ndim == 2 and input.ndim > 1 else None


def _matmul(input: Tensor, other: Tensor) -> _Linear | None:
    return (input, other, None) if other.ndim == 2 and input.ndim > 1 else None


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **factors: float) -> _Linear | None:
    return None if factors or input.ndim != 1 else (mat1, mat2, input)


_MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
_SOFTMAX = (torch.softmax, Tensor.softmax, functional.softmax)
_READ: dict[Callable[..., Any], Callable[..., _Linear | None]] = {
    functional.linear: _linear,
    **dict.fromkeys(_MATMUL, _matmul),
    torch.addmm: _addmm,
}
_POINTWISE: dict[Callable[..., Any], _Rule] = {
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), _subtract),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _multiply),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), _divide),
}


def _batched_product(rows: int, left: Tensor, right: Tensor) -> Tensor | None:
    """AB of two batches of matrices; None where torch has to do it."""
    (a, da), (b, db) = _parts_of(left), _parts_of(right)
    alike = a.ndim == b.ndim > 2 and a.shape[:-2] == b.shape[:-2]
    if not alike or (da is None and db is None):
        return None
    return fwad.make_dual(_spread(_common(a, rows) @ _common(b, rows), a), _moved(a, da, b, db))


def _moved(a: Tensor, da: Tensor | None, b: Tensor, db: Tensor | None) -> Tensor:
    """ȦB + AḂ."""
    a, b = _alone(a), _alone(b)
    if da is None:
        return a @ cast("Tensor", db)
    if db is None:
        return da @ b
    moved = (da @ b).flatten(0, -3)
    moved.baddbmm_(a.flatten(0, -3), db.flatten(0, -3))
    return moved.view(*da.shape[:-1], db.shape[-1])


def _softmax(
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
    x, dx = _parts_of(input)
    if rest or other or dx is None or dim is None or dim % x.ndim == 0:
        return None
    P = torch.softmax(_common(x, rows), dim, dtype)
    spread = _over(_alone(P), x)
    moved = spread * dx.to(P.dtype)
    moved.addcmul_(spread, moved.sum(dim, keepdim=True), value=-1)
    return fwad.make_dual(_spread(P, x), moved)


def _parts_of(value: Any) -> tuple[Any, Tensor | None]:
    """x and ẋ; ẋ is None of a constant, which need not be a tensor."""
    if not isinstance(value, Tensor):
        return value, None
    primal, tangent = fwad.unpack_dual(value)
    return primal, None if tangent is None else _alone(tangent)


def _alone(value: Any) -> Any:
    """The same without its graph."""
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def _common(x: Tensor, rows: int) -> Tensor:
    """The first of `rows` equal rows; all of x, if it has no such rows."""
    if rows == 1 or x.ndim == 0 or len(x) % rows:
        return x
    return x[: len(x) // rows]


def _spread(value: Tensor, like: Tensor) -> Tensor:
    """What was computed of the first row, for as many rows as `like` has."""
    if value.ndim == 0 or len(value) == len(like):
        return value
    return value.repeat(len(like) // len(value), *[1] * (value.ndim - 1))


def _over(value: Tensor, like: Tensor) -> Tensor:
    """The same, where it may as well be broadcast."""
    return value if value.ndim and len(value) == 1 else _spread(value, like)
