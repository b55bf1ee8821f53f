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
_Tangents = dict[int, Any]  # by site; of a function with several results, one of each


class Moving(Tensor):
    """A value, and its tangents by site."""

    value: Tensor
    tangents: _Tangents

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: _Args = (), kwargs: _Named | None = None
    ) -> Any:
        named, name = kwargs or {}, func.__name__
        if name == "__set__" or named.get("out") is not None:
            raise _refusal(name)
        is_in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if is_in_place or named.get("inplace"):
            return _in_place(func, args, named)
        result = func(*_mapped(args, value_of), **_mapped(named, value_of))
        if not any(map(_is_differentiable, _parts(result))):
            return result
        with torch.no_grad():
            tangents = _BY_SITE.get(name.strip("_"), _by_torch)(func, args, named)
        if isinstance(result, Tensor):
            return moving(result, tangents)
        columns = [{site: t[i] for site, t in tangents.items()} for i in range(len(result))]
        return type(result)([moving(*pair) for pair in zip(result, columns, strict=True)])


_LIVE = weakref.WeakValueDictionary[int, Moving]()


def moving(value: Any, tangents: Mapping[int, Tensor | None], held_by: Any = None) -> Any:
    """The value with those tangents that are there; itself, if none is."""
    held = {site: tangent for site, tangent in tangents.items() if tangent is not None}
    if not held and held_by is None:
        return value
    out = value.as_subclass(Moving) if held_by is None else held_by
    out.value, out.tangents = value, held
    _LIVE[id(out)] = out
    return out


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
    carriers: list[Moving] = []
    _mapped(operands, lambda x: carriers.append(x) if isinstance(x, Moving) else None)
    return carriers


# --- Rules: the tangents of a result, from torch's function and its arguments


def _by_site(
    func: Any, args: _Args, named: _Named, change: Callable[[int, Any], Any]
) -> Iterator[tuple[int, Any]]:
    """The function of what each site makes of its arguments."""
    for site in dict.fromkeys(site for x in _carriers(args, named) for site in x.tangents):
        of_site = functools.partial(change, site)
        yield site, func(*_mapped(args, of_site), **_mapped(named, of_site))


def _by_torch(func: Any, args: _Args, named: _Named) -> _Tangents:

    def dual(site: int, x: Any) -> Any:
        tangent = tangents_of(x).get(site)
        return value_of(x) if tangent is None else fwad.make_dual(x.value.detach(), tangent)

    def moved(part: Any) -> Tensor | None:
        return fwad.unpack_dual(part).tangent if _is_differentiable(part) else None

    is_attention = func is functional.scaled_dot_product_attention
    with sdpa_kernel(SDPBackend.MATH) if is_attention else contextlib.nullcontext():
        results = dict(_by_site(func, args, named, dual))
    return {
        site: moved(result) if isinstance(result, Tensor) else [*map(moved, result)]
        for site, result in results.items()
    }


def _in_place(func: Any, args: _Args, named: _Named) -> Any:
    """As `_by_torch`, of copies; what is changed has other tangents from then on."""
    target, memory = args[0], value_of(args[0]).untyped_storage().data_ptr()
    others = (x.value for x in list(_LIVE.values()) if x is not target)
    is_made = not isinstance(target, Moving) and (compat.is_view(target) or target.requires_grad)
    if is_made or any(other.untyped_storage().data_ptr() == memory for other in others):
        raise _refusal(func.__name__)

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
        moving(value, tangents, target)
    return target if isinstance(result, Tensor) else result


def _refusal(name: str) -> ModelStateError:
    return ModelStateError(
        f"{name}: this model, or a hook of yours, writes into a tensor whose memory another tensor "
        "shares, and derivatives are not followed there. Take such hooks off, or use "
        "ll.first_order."
    )


def _linear(func: Any, args: _Args, named: _Named) -> _Tangents:
    """The function of each tangent; zero in place of constants, but not of indices and sizes."""
    name = func.__name__.strip("_")
    if named and name in _OF_NUMBERS:
        return _by_torch(func, args, named)

    def moved(site: int, x: Any) -> Any:
        value, tangent = value_of(x), tangents_of(x).get(site)
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
    carriers, tangents = _carriers(args), _Tangents()
    if named or len(set(map(id, carriers))) < len(carriers):
        return _by_torch(func, args, named)
    for factor in carriers:
        for site, tangent in factor.tangents.items():
            term = func(*_mapped(args, functools.partial(_replaced, factor, tangent)))
            tangents[site] = tangents[site] + term if site in tangents else term
    return tangents


def _replaced(factor: Moving, tangent: Tensor, x: Any) -> Any:
    return tangent if x is factor else value_of(x)


def _weighed(func: Any, args: _Args, named: _Named) -> _Tangents:
    """ẊW of all sites at once, where it is X that moves."""
    x, *weights = rows_and_weight(func, args, named) or (None,)
    if not isinstance(x, Moving) or _carriers(weights):
        rule = _by_factor if func in MATMULS else _by_torch
        return rule(func, args, named)
    moved = torch.stack([*x.tangents.values()]) @ weights[0]
    return dict(zip(x.tangents, moved.unbind(), strict=True))


_INDEXED, _CHOOSING = {"getitem", "repeat_interleave"}, {"where", "masked_fill"}
_OF_NUMBERS = _CHOOSING | {"add", "radd", "sub", "rsub"}
_BY_SITE: dict[str, Callable[[Any, _Args, _Named], _Tangents]] = {
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), _linear),
    **dict.fromkeys(("transpose", "permute", "expand", "contiguous", "clone", "to"), _linear),
    **dict.fromkeys(("chunk", "split", "unbind", "cat", "stack", "neg", "repeat"), _linear),
    **dict.fromkeys((*_INDEXED, *_OF_NUMBERS), _linear),
    **dict.fromkeys(("mul", "rmul", "bmm", "einsum"), _by_factor),
    **dict.fromkeys(("linear", "addmm", "matmul"), _weighed),
}
