"""J δz by dual numbers x + ẋd, without the products that torch wastes on zeros.

    (x + ẋd) W + b = (xW + b) + (ẋW) d              c(x + ẋd) + b = (cx + b) + (cẋ) d
    (A + Ȧd)(B + Ḃd) = AB + (ȦB + AḂ) d             P = softmax(S),  Ṗ = P ∘ (Ṡ − Σ_k P ∘ Ṡ)

1. Constant weights and factors. Torch multiplies a weight by the primal, by the tangent, and once
   more for the weight's own tangent, which is zero. `OneProduct` makes a single product, of primal
   and tangent together.
2. Attention. The scores are the largest tensors of a long prompt, and torch passes over them once
   for every term. Here the terms are added in place.
3. Equal primals. If every row of a batch has the same primal, as for tangents of many parts of one
   prompt, what depends on the primal alone is computed once for all rows.
4. Values with a graph. Tangents are detached from the graph, as nothing goes back through them. But
   where torch saves an operand for the way back, it would save its tangent as well. So such
   functions run twice, once for the value and once for the tangent; and so does fused attention,
   whose value then saves no pattern.
5. Operations without a rule here are left to torch. If one has no derivative, the error names it.
6. One thread at a time. Torch has one dual level in a process, and one choice of attention kernels:
   here the formula, because fused kernels have no forward-mode derivative.

Cost: a dual forward pass takes about 2.5 forward passes.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lens_lora import compat
from lens_lora.core.model.locks import ONE_IN_A_PROCESS, hold
from lens_lora.errors import ModelStateError
from lens_lora.spans import Temporary

# --- Rules for products and attention


_Args = tuple[Any, ...]
_Named = dict[str, Any]
# A rule takes the number of rows that have the same primal, and torch's arguments.
_Rule = Callable[..., "Tensor | None"]

# With more tangents per primal, copying the primal beside them costs more than it saves.
_MOST_ROWS_BESIDE = 4


class OneProduct(TorchFunctionMode):
    """Within the block, products of dual numbers follow the rules above.

    Attention of values with a graph uses the kernels that are allowed when this object is made;
    attention of tangents uses those that are allowed within the block.

    Attributes:
        rows: the number of rows of the batch with the same primal: 1, or all rows. Code that adds
            rows must set it. It stays 1 for a mixture of experts, which takes tokens out of their
            rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: int = 1
        self._kernels: list[SDPBackend] = compat.attention_kernels()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        result = None
        if rule is not None:
            result = rule(self.rows, *args, **kwargs)
        if result is None and func in _OPERANDS_ARE_SAVED:
            result = _value_and_tangent_apart(func, args, kwargs, self._kernels)
        if result is None:
            result = func(*args, **kwargs)
        return result


class _KnownProduct(torch.autograd.Function):
    """The product xW, which is computed already, with its backward pass to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.mT, None, None


def _affine(func: Any, rows: int, *args: Any, **factors: Any) -> Tensor | None:
    """Multiply a dual number by a constant, or add one; None unless exactly one operand is dual."""
    if factors or len(args) != 2:
        return None
    a, da = _parts_of(args[0])
    b, db = _parts_of(args[1])
    if da is not None and db is None:
        tangent = da
        constant = b
    elif db is not None and da is None:
        tangent = db
        constant = a
    else:
        return None
    # A sum gets a copy of the tangent, so that a change in place does not reach the summand.
    value_tangent = tangent.clone() if func in _SUMS else tangent * _detached(constant)
    value = func(a, b)
    if value.shape != value_tangent.shape or value.dtype != value_tangent.dtype:
        return None
    return fwad.make_dual(value, value_tangent)


def _product(func: Any, rows: int, *args: Any, **named: Any) -> Tensor | None:
    """Compute xW + b for a dual x and constant W and b, or AB; None to leave it to torch."""
    operands = compat.rows_and_weight(func, args, named)
    if operands is None:
        is_of_batches = func in compat.MATMULS and not named
        return _batched_product(rows, *args) if is_of_batches else None
    x, weight, bias = operands
    primal, tangent = _parts_of(x)
    if tangent is None or _has_tangent(weight) or _has_tangent(bias):
        return None
    first_rows = _rows_of_one_primal(primal, rows)
    if len(primal) > _MOST_ROWS_BESIDE * len(first_rows):
        value = first_rows @ weight
        value_tangent = tangent @ _detached(weight)
    else:
        both = torch.cat([_detached(first_rows), tangent]) @ _detached(weight)
        value = both[: len(first_rows)]
        value_tangent = both[len(first_rows) :]
        if first_rows.requires_grad:
            value = cast("Tensor", _KnownProduct.apply(first_rows, _detached(weight), value))
    if bias is not None:
        value = value + bias
    return fwad.make_dual(_repeated_like(primal, value), value_tangent)


def _batched_product(rows: int, left: Tensor, right: Tensor) -> Tensor | None:
    """Compute (A + Ȧd)(B + Ḃd) of two batches of matrices; None to leave it to torch."""
    a, da = _parts_of(left)
    b, db = _parts_of(right)
    are_batches = a.ndim == b.ndim > 2 and a.shape[:-2] == b.shape[:-2]
    if not are_batches or (da is None and db is None):
        return None
    of_one_primal = _rows_of_one_primal(a, rows) @ _rows_of_one_primal(b, rows)
    value = _repeated_like(a, of_one_primal)
    a = _detached(a)
    b = _detached(b)
    if da is None:
        return fwad.make_dual(value, a @ db)
    if db is None:
        return fwad.make_dual(value, da @ b)
    value_tangent = (da @ b).flatten(0, -3)
    value_tangent.baddbmm_(a.flatten(0, -3), db.flatten(0, -3))
    return fwad.make_dual(value, value_tangent.view(value.shape))


def _softmax(
    rows: int,
    input: Tensor,
    dim: int | None = None,
    *rest: Any,
    dtype: torch.dtype | None = None,
    _stacklevel: int = 3,
    **other: Any,
) -> Tensor | None:
    """Compute P = softmax(S) along `dim`; None to leave it to torch."""
    x, dx = _parts_of(input)
    has_other_arguments = bool(rest or other)
    if has_other_arguments or dx is None or dim is None:
        return None
    is_along_rows = dim % x.ndim == 0
    if is_along_rows:
        return None
    P = torch.softmax(_rows_of_one_primal(x, rows), dim, dtype)
    P_of_rows = _detached(P)
    if len(P) > 1:  # A single row broadcasts.
        P_of_rows = _repeated_like(x, P_of_rows)
    value_tangent = P_of_rows * dx.to(P.dtype)
    value_tangent.addcmul_(P_of_rows, value_tangent.sum(dim, keepdim=True), value=-1)
    return fwad.make_dual(_repeated_like(x, P), value_tangent)


def _parts_of(value: Any) -> tuple[Any, Tensor | None]:
    """Split x + ẋd into x and ẋ; ẋ is None for a constant, which need not be a tensor."""
    if not isinstance(value, Tensor):
        return value, None
    primal, tangent = fwad.unpack_dual(value)
    if tangent is None:
        return primal, None
    return primal, _detached(tangent)


def _has_tangent(value: Any) -> bool:
    _, tangent = _parts_of(value)
    return tangent is not None


def _value_and_tangent_apart(
    func: Callable[..., Any], args: _Args, named: _Named, kernels: list[SDPBackend]
) -> Tensor | None:
    """Run a function once for the value, with its graph, and once for the tangent, without.

    None if no operand is a dual number whose value has a graph.
    """
    operands = [_parts_of(arg) for arg in (*args, *named.values())]
    is_graphed = [tangent is not None and value.requires_grad for value, tangent in operands]
    if not any(is_graphed):
        return None

    def run(given: Sequence[Any]) -> Tensor:
        given_by_name = dict(zip(named, given[len(args) :], strict=True))
        return func(*given[: len(args)], **given_by_name)

    duals: list[Any] = []
    for value, tangent in operands:
        operand = _detached(value)
        if tangent is not None:
            operand = fwad.make_dual(operand, tangent)
        duals.append(operand)
    with torch.no_grad():
        value_tangent = fwad.unpack_dual(run(duals)).tangent
    values = [value for value, _ in operands]
    if func is not functional.scaled_dot_product_attention:
        return fwad.make_dual(run(values), value_tangent)
    with sdpa_kernel(kernels):
        return fwad.make_dual(run(values), value_tangent)


def _detached(value: Any) -> Any:
    """The same value without its graph."""
    has_graph = isinstance(value, Tensor) and value.requires_grad
    return value.detach() if has_graph else value


def _rows_of_one_primal(x: Tensor, rows: int) -> Tensor:
    """The first of each `rows` equal rows; all of x if it has no such rows."""
    if rows == 1 or x.ndim == 0 or len(x) % rows:
        return x
    return x[: len(x) // rows]


def _repeated_like(like: Tensor, value: Tensor) -> Tensor:
    """Repeat what was computed for the first rows, up to the number of rows of `like`."""
    if value.ndim == 0 or len(value) == len(like):
        return value
    return value.repeat(len(like) // len(value), *[1] * (value.ndim - 1))


# Functions whose operands torch saves for the backward pass. If an operand is a dual number whose
# value has a graph, value and tangent are computed apart, so that the graph holds no tangent.
_TIMES = (torch.mul, Tensor.mul, Tensor.__mul__)
_OVER = (torch.div, Tensor.div, Tensor.__truediv__)
_POWERS = (torch.pow, Tensor.pow, Tensor.__pow__, torch.square, Tensor.square)
_ROOTS = (torch.sqrt, Tensor.sqrt, torch.rsqrt, Tensor.rsqrt)
_ACTIVATIONS = (torch.tanh, Tensor.tanh, functional.tanh, functional.relu, functional.gelu)
_BATCHED = (torch.bmm, Tensor.bmm, torch.baddbmm, Tensor.baddbmm)
_LAYERS = (functional.silu, functional.layer_norm, functional.scaled_dot_product_attention)
_SELECTIONS = (torch.gather, Tensor.gather)
_OPERANDS_ARE_SAVED = frozenset(
    (*_TIMES, *_OVER, *_POWERS, *_ROOTS, *_ACTIVATIONS, *_BATCHED, *_LAYERS, *_SELECTIONS)
)
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_MULTIPLES = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
_PRODUCTS = (functional.linear, torch.addmm, *compat.MATMULS)
_RULES: dict[Callable[..., Any], _Rule] = {
    **{func: functools.partial(_product, func) for func in _PRODUCTS},
    **dict.fromkeys((torch.softmax, Tensor.softmax, functional.softmax), _softmax),
    **{func: functools.partial(_affine, func) for func in (*_SUMS, *_MULTIPLES)},
}


# --- Torch's forward mode


def dual_forward() -> AbstractContextManager[OneProduct]:
    """Within the block, forward-mode derivatives are computed.

    Torch has one dual level and one choice of attention kernels in a process, so a thread waits for
    any other thread that is within such a block.

    The block yields the `OneProduct` that multiplies by the weights; set its `rows` when rows are
    added.

    Raises:
        ModelStateError: a dual level is open outside; or the model uses an operation without a
            forward-mode derivative.
    """
    return Temporary(_begin_dual)


def dual_level() -> AbstractContextManager[None]:
    """Within the block, forward-mode derivatives are computed by torch's own products.

    Attention kernels stay as they are. `dual_forward` follows the rules of this file instead.
    """
    return Temporary(_begin_level)


def _begin_dual(span: Temporary) -> OneProduct:
    products = OneProduct()
    _begin_level(span)
    attention_from_formula(span)
    compat.enter_mode(span, products)
    return products


def _begin_level(span: Temporary) -> None:
    hold(span, ONE_IN_A_PROCESS)
    if _is_dual_level_open():
        raise ModelStateError(
            "a level of forward-mode derivatives (forward_ad.dual_level, torch.func.jvp) is open "
            "around this call, and torch has no second one. Leave it first."
        )
    span.push(_name_the_operation)
    compat.plain_bloom_gelu(span)
    span.way_back(functools.partial(torch.set_grad_enabled, torch.is_grad_enabled()))
    torch.set_grad_enabled(False)
    compat.allow_forward_mode(span)
    span.way_back(_leave_dual_level)
    fwad.enter_dual_level()


def attention_from_formula(span: Temporary) -> None:
    """Compute scaled-dot-product attention from its formula, until the span ends.

    Fused kernels have neither forward-mode nor second derivatives.
    """
    hold(span, ONE_IN_A_PROCESS)
    compat.use_attention_kernels(span, [SDPBackend.MATH])


def _leave_dual_level() -> None:
    while _is_dual_level_open():
        fwad.exit_dual_level()


def _is_dual_level_open() -> bool:
    """Whether torch makes a dual number, which it refuses without a level."""
    try:
        fwad.make_dual(torch.zeros(()), torch.zeros(()))
    except RuntimeError:
        return False
    return True


def _name_the_operation(kind: object, error: BaseException | None, trace: object) -> None:
    if isinstance(error, NotImplementedError):
        frames = traceback.extract_tb(error.__traceback__)
        last = [frame for frame in frames if "/torch/" not in frame.filename][-1]
        raise ModelStateError(
            "this model has an operation without a forward-mode derivative "
            f"({last.line} in {last.name}: {error}). A fused kernel is one.",
            remedy="Load the model without it (attn_implementation='eager', and of a mixture of "
            "experts experts_implementation='eager'). Reverse mode (first_order, mode='reverse') "
            "needs no such derivative.",
            in_shell="Load the model without it (--attn eager).",
        ) from error


def tangent_of(dual: Tensor) -> Tensor:
    """The derivative that a dual number carries; zeros if it carries none."""
    primal, tangent = fwad.unpack_dual(dual)
    return torch.zeros_like(primal) if tangent is None else tangent.clone()
