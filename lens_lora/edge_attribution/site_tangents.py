"""Values that carry the tangents of several sites, where few modules at a time have any.

    y = f(x₁, x₂, …),    ẏ_l = Σ_i ∂f/∂x_i ẋ_{i,l}     for each site l that one of the x_i carries

1. A product with a weight takes all tangents together. What is linear is done to each tangent; in
   any other product each factor is replaced by its tangent in turn. Whatever has no rule is left to
   torch, as a dual number of each tangent. Values keep their graph, and tangents have none.
2. So is what changes a value in place, but it is refused where another tensor in use shares its
   memory, as that one's tangents would not follow.
3. A kernel that reads a tensor past torch's functions would lose its tangents without a word, so
   what is made of them has to be checked, as edges are against first order.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lens_lora import compat
from lens_lora.core.function.duals import MATMULS, rows_and_weight
from lens_lora.errors import ModelStateError

_Args = tuple[Any, ...]
_Named = dict[str, Any]
# From torch's function and its arguments to the tangents of its result.
_Rule = Callable[[Any, _Args, _Named], "_Tangents"]
_Tangents = dict[int, Any]  # by site; of a function with several results, one of each


class Moving(Tensor):
    """A value, and its tangents by site.

    Attributes:
        value: the value, with its graph.
        tangents: ẏ_l of each site that it has one of, without a graph.
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
        is_by_name = name.endswith("_") and not name.endswith("__")
        if name == "__setitem__" or is_by_name or named.get("inplace"):
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


# Every value that has tangents and is in use.
_LIVE = weakref.WeakValueDictionary[int, Moving]()


def moving(value: Any, tangents: Mapping[int, Tensor | None]) -> Any:
    """The value with those tangents that are there; itself, if none is.

    Args:
        value: a tensor; anything else has no tangents.
        tangents: by site; None where the value does not depend on the site.
    """
    known = {site: tangent for site, tangent in tangents.items() if tangent is not None}
    return _hold(value.as_subclass(Moving), value, known) if known else value


def _hold(holder: Moving, value: Tensor, tangents: _Tangents) -> Moving:
    holder.value = value
    holder.tangents = tangents
    _LIVE[id(holder)] = holder
    return holder


def value_of(x: Any) -> Any:
    """The value without its tangents; whatever has none, itself."""
    return x.value if isinstance(x, Moving) else x


def tangents_of(x: Any) -> dict[int, Tensor]:
    """The tangents by site; none of a constant."""
    return x.tangents if isinstance(x, Moving) else {}


def _mapped(operand: Any, change: Callable[[Any], Any]) -> Any:
    """The operand, or what is within a list, tuple or dict of operands, changed."""
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
) -> Iterator[tuple[int, Any]]:
    """The function of what each site makes of its arguments."""
    sites = [site for carrier in _carriers(args, named) for site in carrier.tangents]
    for site in dict.fromkeys(sites):
        of_site = functools.partial(change, site)
        yield site, func(*_mapped(args, of_site), **_mapped(named, of_site))


def _by_torch(func: Any, args: _Args, named: _Named) -> _Tangents:
    """Torch's own rule, of a dual number for each site."""

    def dual(site: int, x: Any) -> Any:
        tangent = tangents_of(x).get(site)
        return value_of(x) if tangent is None else fwad.make_dual(x.value.detach(), tangent)

    def moved(part: Any) -> Tensor | None:
        return fwad.unpack_dual(part).tangent if _is_differentiable(part) else None

    # A fused attention kernel has no forward-mode derivative.
    is_attention = func is functional.scaled_dot_product_attention
    kernels = sdpa_kernel(SDPBackend.MATH) if is_attention else contextlib.nullcontext()
    with kernels:
        results = dict(_by_site(func, args, named, dual))
    tangents: _Tangents = {}
    for site, result in results.items():
        if isinstance(result, Tensor):
            tangents[site] = moved(result)
        else:
            tangents[site] = [moved(part) for part in result]
    return tangents


def _in_place(func: Any, args: _Args, named: _Named) -> Any:
    """Torch's own rule, of copies: what is changed has other tangents from then on."""
    target = args[0]
    _require_alone(func.__name__, target)

    def changed(first: Tensor, *args: Any, **named: Any) -> Tensor:
        first = first.clone()
        func(first, *args, **named)
        return first

    with torch.no_grad():
        tangents = _by_torch(changed, args, named)
    value = target.value if isinstance(target, Moving) else target.detach()
    result = func(value, *_mapped(args[1:], value_of), **_mapped(named, value_of))
    if _is_differentiable(value):
        target.__class__ = Moving
        known = {site: tangent for site, tangent in tangents.items() if tangent is not None}
        _hold(target, value, known)
    return target if isinstance(result, Tensor) else result


def _require_alone(name: str, target: Tensor) -> None:
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
        remedy="Take such hooks off, or use ll.first_order.",
    )


def _linear(func: Any, args: _Args, named: _Named) -> _Tangents:
    """The function of each tangent; zero in place of constants, but not of indices and sizes."""
    name = func.__name__.strip("_")
    if named and name in _OF_NUMBERS:
        return _by_torch(func, args, named)

    def moved(site: int, x: Any) -> Any:
        value = value_of(x)
        tangent = tangents_of(x).get(site)
        if tangent is not None:
            return tangent
        if isinstance(value, Tensor):
            is_mask = name in _CHOOSING and value.dtype == torch.bool
            is_kept = is_mask or name in _INDEXED
            return value if is_kept else value.new_zeros(()).expand(value.shape)
        return 0 if name in _OF_NUMBERS and isinstance(x, int | float) else x

    # A tangent need not lie in memory as its value does.
    return dict(_by_site(Tensor.reshape if name == "view" else func, args, named, moved))


def _by_factor(func: Any, args: _Args, named: _Named) -> _Tangents:
    """ȦB + AḂ."""
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
    """ẊW of all sites at once, where it is X that moves."""
    product = rows_and_weight(func, args, named)
    if product is None:
        return _of_other_product(func, args, named)
    x, *constants = product
    if not isinstance(x, Moving) or _carriers(constants):
        return _of_other_product(func, args, named)
    weight = constants[0]
    moved = torch.stack([*x.tangents.values()]) @ weight
    return dict(zip(x.tangents, moved.unbind(), strict=True))


def _of_other_product(func: Any, args: _Args, named: _Named) -> _Tangents:
    """Of a product in which something else than the rows of X moves."""
    rule = _by_factor if func in MATMULS else _by_torch
    return rule(func, args, named)


# Functions that take indices, which stay as they are; that choose by a mask; and that take numbers.
_INDEXED = {"getitem", "repeat_interleave"}
_CHOOSING = {"where", "masked_fill"}
_OF_NUMBERS = _CHOOSING | {"add", "radd", "sub", "rsub"}
_OF_SHAPE = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
_OF_LAYOUT = ("transpose", "permute", "expand", "contiguous", "clone", "to")
_OF_PARTS = ("chunk", "split", "unbind", "cat", "stack", "neg", "repeat")
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_OF_SHAPE, _linear),
    **dict.fromkeys(_OF_LAYOUT, _linear),
    **dict.fromkeys(_OF_PARTS, _linear),
    **dict.fromkeys(_INDEXED | _OF_NUMBERS, _linear),
    **dict.fromkeys(("mul", "rmul", "bmm", "einsum"), _by_factor),
    **dict.fromkeys(("linear", "addmm", "matmul"), _weighed),
}
