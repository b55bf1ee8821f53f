"""Values that carry the tangents of several sites; only few sites have one at a time.

    y = f(x₁, x₂, …),    ẏ_l = Σ_i ∂f/∂x_i ẋ_{i,l}     for each site l that one of the x_i carries

1. A product with a weight takes all tangents together. A linear function is applied to each
   tangent. In any other product each factor is replaced by its tangent in turn. A function without
   a rule is left to torch, which gets a dual number for each tangent. Values keep their graph, and
   tangents have none.
2. A function that changes a value in place is left to torch as well. It is refused if another
   tensor in use shares the value's memory, because the tangents of that tensor would not change.
3. A kernel that reads a tensor without torch's functions would silently lose its tangents. So the
   results have to be checked, as edges are checked against first order.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lens_lora import compat
from lens_lora.errors import ModelStateError

_Args = tuple[Any, ...]
_Named = dict[str, Any]
# The tangents by site: a tensor, or a list of them for a function with several results.
_Tangents = dict[int, Any]
# From torch's function and its arguments to the tangents of its result.
_Rule = Callable[[Any, _Args, _Named], _Tangents]


class Moving(Tensor):
    """A value, and its tangents by site.

    Attributes:
        value: the value, with its graph.
        tangents: ẏ_l by site, without a graph; sites that do not move the value have none.
    """

    value: Tensor
    tangents: _Tangents

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: _Args = (), kwargs: _Named | None = None
    ) -> Any:
        named = kwargs or {}
        name = func.__name__
        if name == "__set__" or named.get("out") is not None:
            raise _refusal(name)
        if _is_in_place(name, named):
            return _in_place(func, args, named)

        result = func(*_mapped(args, value_of), **_mapped(named, value_of))
        if not any(_is_differentiable(part) for part in _parts(result)):
            return result
        rule = _RULES.get(name.strip("_"), _by_torch)
        with torch.no_grad():
            tangents = rule(func, args, named)

        if isinstance(result, Tensor):
            return moving(result, tangents)
        parts: list[Any] = []
        for index, value in enumerate(result):
            of_part = {site: of_site[index] for site, of_site in tangents.items()}
            parts.append(moving(value, of_part))
        return type(result)(parts)


# Every value that has tangents and is in use, by its id.
_LIVE = weakref.WeakValueDictionary[int, Moving]()


def _is_in_place(name: str, named: _Named) -> bool:
    """Whether a call of torch's function of this name changes its first argument."""
    has_trailing_underscore = name.endswith("_") and not name.endswith("__")
    return name == "__setitem__" or has_trailing_underscore or bool(named.get("inplace"))


def moving(value: Any, tangents: Mapping[int, Tensor | None]) -> Any:
    """The value with its tangents; the value itself, if it depends on no site.

    Args:
        value: a tensor; anything else has no tangents.
        tangents: the tangent by site; None if the value does not depend on the site.
    """
    known = _without_none(tangents)
    if not known:
        return value
    return _hold(value.as_subclass(Moving), value, known)


def _without_none(tangents: Mapping[int, Tensor | None]) -> dict[int, Tensor]:
    return {site: tangent for site, tangent in tangents.items() if tangent is not None}


def _hold(holder: Moving, value: Tensor, tangents: _Tangents) -> Moving:
    holder.value = value
    holder.tangents = tangents
    _LIVE[id(holder)] = holder
    return holder


def value_of(x: Any) -> Any:
    """The value without its tangents; the argument itself, if it has none."""
    return x.value if isinstance(x, Moving) else x


def tangents_of(x: Any) -> dict[int, Tensor]:
    """The tangents by site; a constant has none."""
    return x.tangents if isinstance(x, Moving) else {}


def _mapped(operand: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to the operand, or to each operand within a list, tuple or dict."""
    if type(operand) in (list, tuple):
        return type(operand)([_mapped(part, change) for part in operand])
    if type(operand) is dict:
        return {name: _mapped(part, change) for name, part in operand.items()}
    return change(operand)


def _parts(result: Any) -> _Args:
    return tuple(result) if isinstance(result, list | tuple) else (result,)


def _is_differentiable(part: Any) -> bool:
    return isinstance(part, Tensor) and (part.is_floating_point() or part.is_complex())


def _carriers(*operands: Any) -> list[Moving]:
    """The operands, and those within lists and dicts, that have tangents."""
    carriers: list[Moving] = []

    def collect(operand: Any) -> None:
        if isinstance(operand, Moving):
            carriers.append(operand)

    _mapped(operands, collect)
    return carriers


# --- Rules: the tangents of a result, from torch's function and its arguments


def _by_site(
    func: Any, args: _Args, named: _Named, change: Callable[[int, Any], Any]
) -> dict[int, Any]:
    """The function's result for each site, on arguments that `change` makes for the site."""
    sites: dict[int, None] = {}
    for carrier in _carriers(args, named):
        sites |= dict.fromkeys(carrier.tangents)
    results: dict[int, Any] = {}
    for site in sites:
        of_site = functools.partial(change, site)
        results[site] = func(*_mapped(args, of_site), **_mapped(named, of_site))
    return results


def _by_torch(func: Any, args: _Args, named: _Named) -> _Tangents:
    """Apply torch's own rule, to a dual number for each site."""

    def dual(site: int, x: Any) -> Any:
        tangent = tangents_of(x).get(site)
        if tangent is None:
            return value_of(x)
        return fwad.make_dual(x.value.detach(), tangent)

    def tangent_of(part: Any) -> Tensor | None:
        return fwad.unpack_dual(part).tangent if _is_differentiable(part) else None

    kernels = contextlib.nullcontext()
    if func is functional.scaled_dot_product_attention:
        # A fused attention kernel has no forward-mode derivative.
        kernels = sdpa_kernel(SDPBackend.MATH)
    with kernels:
        results = _by_site(func, args, named, dual)
    tangents: _Tangents = {}
    for site, result in results.items():
        if isinstance(result, Tensor):
            tangents[site] = tangent_of(result)
        else:
            tangents[site] = [tangent_of(part) for part in result]
    return tangents


def _in_place(func: Any, args: _Args, named: _Named) -> Any:
    """Change a value in place, and give it the tangents that it then has.

    Torch's own rule computes these tangents, on copies.
    """
    target = args[0]
    _require_own_memory(func.__name__, target)

    def changed_copy(x: Tensor, *others: Any, **options: Any) -> Tensor:
        copy = x.clone()
        func(copy, *others, **options)
        return copy

    with torch.no_grad():
        tangents = _by_torch(changed_copy, args, named)
    value = target.value if isinstance(target, Moving) else target.detach()
    result = func(value, *_mapped(args[1:], value_of), **_mapped(named, value_of))
    if _is_differentiable(value):
        target.__class__ = Moving
        _hold(target, value, _without_none(tangents))
    return target if isinstance(result, Tensor) else result


def _require_own_memory(name: str, target: Tensor) -> None:
    """Refuse to write into memory that another tensor in use shares."""
    memory = value_of(target).untyped_storage().data_ptr()
    others = [x.value for x in list(_LIVE.values()) if x is not target]
    is_shared = any(other.untyped_storage().data_ptr() == memory for other in others)
    is_made_of_others = not isinstance(target, Moving) and (
        compat.is_view(target) or target.requires_grad
    )
    if is_shared or is_made_of_others:
        raise _refusal(name)


def _refusal(name: str) -> ModelStateError:
    return ModelStateError(
        f"{name}: this model, or a hook of yours, writes into a tensor whose memory another tensor "
        "shares, and derivatives are not followed there",
        remedy="remove such hooks, or use ll.first_order.",
    )


def _linear(func: Any, args: _Args, named: _Named) -> _Tangents:
    """Apply a linear function to each tangent.

    Constants become zero; masks, indices and sizes stay as they are.
    """
    name = func.__name__.strip("_")
    if named and name in _OF_NUMBERS:
        return _by_torch(func, args, named)

    def linear_part(site: int, x: Any) -> Any:
        value = value_of(x)
        tangent = tangents_of(x).get(site)
        if tangent is not None:
            return tangent
        if isinstance(value, Tensor):
            is_mask = name in _CHOOSING and value.dtype == torch.bool
            if is_mask or name in _INDEXED:
                return value
            return value.new_zeros(()).expand(value.shape)
        is_constant = name in _OF_NUMBERS and isinstance(x, int | float)
        return 0 if is_constant else x

    if name == "view":
        # A tangent need not have the same memory layout as its value.
        func = Tensor.reshape
    return _by_site(func, args, named, linear_part)


def _sum(func: Any, args: _Args, named: _Named) -> _Tangents:
    """The tangents of x + y; if only x moves with a site, its tangent is that of the sum.

    It is not copied then, because every site's tangent passes several sums within a block.
    """
    if named or len(args) != 2:
        return _linear(func, args, named)
    x, y = args
    shape = torch.broadcast_shapes(_shape_of(x), _shape_of(y))
    dtype = torch.result_type(value_of(x), value_of(y))
    tangents: _Tangents = {}
    for own, other in ((x, y), (y, x)):
        alone = [site for site in tangents_of(own) if site not in tangents_of(other)]
        for site in alone:
            tangent = tangents_of(own)[site]
            is_of_sum = tangent.shape == shape and tangent.dtype == dtype
            tangents[site] = tangent if is_of_sum else tangent.to(dtype).expand(shape)
    for site in tangents_of(x).keys() & tangents_of(y).keys():
        tangents[site] = tangents_of(x)[site] + tangents_of(y)[site]
    return tangents


def _shape_of(operand: Any) -> tuple[int, ...]:
    """The shape of a tensor; a number has none."""
    value = value_of(operand)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _by_factor(func: Any, args: _Args, named: _Named) -> _Tangents:
    """The product rule: the tangents of AB are ȦB + AḂ."""
    carriers = _carriers(args)
    is_repeated = len({id(carrier) for carrier in carriers}) < len(carriers)
    if named or is_repeated:
        return _by_torch(func, args, named)
    tangents: _Tangents = {}
    for factor in carriers:
        for site, tangent in factor.tangents.items():
            term = func(*_mapped(args, functools.partial(_replaced, factor, tangent)))
            tangents[site] = tangents[site] + term if site in tangents else term
    return tangents


def _replaced(factor: Moving, tangent: Tensor, x: Any) -> Any:
    return tangent if x is factor else value_of(x)


def _weighed(func: Any, args: _Args, named: _Named) -> _Tangents:
    """The tangents ẊW of all sites at once, for a product XW with a weight W, which has none."""
    product = compat.rows_and_weight(func, args, named)
    if product is None:
        return _of_other_product(func, args, named)
    x, *constants = product
    if not isinstance(x, Moving) or _carriers(constants):
        return _of_other_product(func, args, named)
    weight = constants[0]
    products = torch.stack(list(x.tangents.values())) @ weight
    return dict(zip(x.tangents, products.unbind(), strict=True))


def _of_other_product(func: Any, args: _Args, named: _Named) -> _Tangents:
    """The tangents of a product in which something other than the rows X has tangents."""
    rule = _by_factor if func in compat.MATMULS else _by_torch
    return rule(func, args, named)


# Functions that take indices, which stay as they are.
_INDEXED = {"getitem", "repeat_interleave"}
# Functions that choose by a mask, which stays as it is.
_CHOOSING = {"where", "masked_fill"}
# Functions that take a number in place of a tensor. It is a constant, whose tangent is zero.
_OF_NUMBERS = _CHOOSING | {"add", "radd", "sub", "rsub"}
_OF_SHAPE = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
_OF_LAYOUT = ("transpose", "permute", "expand", "contiguous", "clone", "to")
_OF_PARTS = ("chunk", "split", "unbind", "cat", "stack", "neg", "repeat")
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_OF_SHAPE, _linear),
    **dict.fromkeys(_OF_LAYOUT, _linear),
    **dict.fromkeys(_OF_PARTS, _linear),
    **dict.fromkeys(_INDEXED | _OF_NUMBERS, _linear),
    **dict.fromkeys(("add", "radd"), _sum),
    **dict.fromkeys(("mul", "rmul", "bmm", "einsum"), _by_factor),
    **dict.fromkeys(("linear", "addmm", "matmul"), _weighed),
}
