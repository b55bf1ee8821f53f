"""Values that carry the tangents of several sites, in a pass over rows that stand there once.

    y = f(x₁, x₂, …),    ẏ_l = Σ_i ∂f/∂x_i ẋ_{i,l}     for each site l that one of the x_i carries

1. A `Moving` is a value with a table of tangents beside it, by site. The value is computed once,
   and nothing for a site that has written nothing to it.
2. A product with a weight takes the value and its tangents together. What is linear is done to each
   tangent; in any other product each factor is replaced by its tangent in turn.
3. Whatever has no rule is left to torch, as a dual number of each tangent, so `dual_level` must be
   open. So is what changes a value in place.
4. Tangents are never changed in place, as values share them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

_Args = tuple[Any, ...]
_Named = dict[str, Any]
_Tangents = dict[int, Any]  # by site; of a function with several results, one of each

# Tokens up to which reading a weight once is worth a copy of what it multiplies.
_TOGETHER = 64


class Moving(Tensor):
    """A value with tangents.

    Attributes:
        value: the same without them.
        tangents: by site, in the value's shape.
    """

    value: Tensor
    tangents: _Tangents

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: _Args = (), kwargs: _Named | None = None
    ) -> Any:
        """What the function returns, with the tangents of it."""
        named, name = kwargs or {}, func.__name__
        if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
            return _in_place(func, args, named)
        if name in _WEIGHED and (product := _WEIGHED[name](*args, **named)) is not None:
            return product
        result = func(*_mapped(args, value_of), **_mapped(named, value_of))
        if not any(map(_is_differentiable, _parts(result))):
            return result
        tangents = _RULES.get(name.strip("_"), _by_torch)(func, args, named, result)
        if isinstance(result, Tensor):
            return moving(result, tangents)
        by_site = {site: _parts(tangent) for site, tangent in tangents.items()}
        columns = [{site: t[i] for site, t in by_site.items()} for i in range(len(result))]
        return type(result)([moving(*pair) for pair in zip(result, columns, strict=True)])


def moving(value: Any, tangents: dict[int, Tensor | None]) -> Any:
    """The value with those tangents that are there; itself, if none is."""
    held = {site: tangent for site, tangent in tangents.items() if tangent is not None}
    if not held:
        return value
    out = value.as_subclass(Moving)
    out.value, out.tangents = value, held
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
    """Those with tangents, in their order."""
    carriers: list[Moving] = []
    _mapped(operands, lambda x: carriers.append(x) if isinstance(x, Moving) else None)
    return carriers


def _sites(*operands: Any) -> dict[int, None]:
    return dict.fromkeys(site for x in _carriers(*operands) for site in x.tangents)


# --- Rules: the tangents of a result, from torch's function and its arguments


def _by_torch(func: Any, args: _Args, named: _Named, result: Any) -> _Tangents:
    """One dual number after another."""
    return {
        site: _mapped(func(*_duals(args, site), **_duals(named, site)), _unpacked)
        for site in _sites(args, named)
    }


def _duals(operands: Any, site: int) -> Any:
    def dual(x: Any) -> Any:
        tangent = tangents_of(x).get(site)
        return value_of(x) if tangent is None else fwad.make_dual(x.value, tangent)

    return _mapped(operands, dual)


def _unpacked(part: Any) -> Tensor | None:
    return fwad.unpack_dual(part).tangent if _is_differentiable(part) else None


def _in_place(func: Any, args: _Args, named: _Named) -> Any:
    """As `_by_torch`, of copies; what is changed has other tangents from then on."""
    target, tangents = args[0], _Tangents()
    for site in _sites(args, named):
        first, *rest = _duals(args, site)
        first = first.clone()
        func(first, *rest, **_duals(named, site))
        tangents[site] = _unpacked(first)
    result = func(*_mapped(args, value_of), **_mapped(named, value_of))
    if not isinstance(target, Moving):
        target.value, target.__class__ = target.detach(), Moving
    target.tangents = tangents
    return target if isinstance(result, Tensor) else result


def _linear(func: Any, args: _Args, named: _Named, result: Any) -> _Tangents:
    """The function of each tangent; zero in place of constants, but not of indices and sizes."""
    name = func.__name__
    if "alpha" in named:
        return _by_torch(func, args, named, result)
    # A tangent need not lie in memory as its value does.
    func = Tensor.reshape if name == "view" else func

    def of_site(site: int) -> Any:
        def change(x: Any) -> Any:
            value, tangent = value_of(x), tangents_of(x).get(site)
            if _is_differentiable(value):
                return value.new_zeros(()).expand(value.shape) if tangent is None else tangent
            return 0 if name.strip("_") in _OF_NUMBERS and isinstance(x, int | float) else x

        return func(*_mapped(args, change), **_mapped(named, change))

    return {site: of_site(site) for site in _sites(args, named)}


def _product(func: Any, args: _Args, named: _Named, result: Tensor) -> _Tangents:
    """ȦB + AḂ."""
    tangents = _Tangents()
    for place, factor in enumerate(_carriers(args)):
        for site, tangent in factor.tangents.items():
            term = func(*_replaced(args, place, tangent), **named)
            tangents[site] = tangents[site] + term if site in tangents else term
    return tangents


def _replaced(args: _Args, place: int, tangent: Tensor) -> _Args:
    places = itertools.count()

    def change(x: Any) -> Any:
        if not isinstance(x, Moving):
            return x
        return tangent if next(places) == place else x.value

    return _mapped(args, change)


def _softmax(func: Any, args: _Args, named: _Named, result: Tensor) -> _Tangents:
    """Ṗ = P ∘ (Ṡ − Σ P ∘ Ṡ)."""
    dim = named.get("dim", args[1] if len(args) > 1 else None)
    if dim is None:
        return _by_torch(func, args, named, result)
    tangents = _Tangents()
    for site, tangent in args[0].tangents.items():
        moved = result * tangent
        tangents[site] = moved.addcmul_(result, moved.sum(dim, keepdim=True), value=-1)
    return tangents


def _weighed(x: Any, weight: Any, bias: Any = None) -> Any:
    """xW + b; None where this is another product than of a moving x with constants."""
    if not isinstance(x, Moving) or weight.ndim != 2 or x.value.ndim < 2 or _carriers(weight, bias):
        return None
    parts = [x.value, *x.tangents.values()]
    if x.value.numel() <= _TOGETHER * x.value.shape[-1]:
        value, *moved = (torch.cat(parts) @ weight).split(len(x.value))
    else:
        value, *moved = [part @ weight for part in parts]
    value = value if bias is None else value + bias
    return moving(value, dict(zip(x.tangents, moved, strict=True)))


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **factors: float) -> Any:
    return None if factors or input.ndim != 1 else _weighed(mat1, mat2, input)


_IN_PLACE = frozenset({"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"})
_OF_NUMBERS = frozenset({"where", "masked_fill", "add", "radd", "sub", "rsub"})
_WEIGHED: dict[str, Callable[..., Any]] = {
    "linear": lambda input, weight, bias=None: _weighed(input, weight.mT, bias),
    "addmm": _addmm,
    **dict.fromkeys(("matmul", "__matmul__"), _weighed),
}
_RULES: dict[str, Callable[[Any, _Args, _Named, Any], _Tangents]] = {
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), _linear),
    **dict.fromkeys(("transpose", "permute", "expand", "contiguous", "clone", "to"), _linear),
    **dict.fromkeys(("getitem", "chunk", "split", "unbind", "cat", "stack", "neg"), _linear),
    **dict.fromkeys(("repeat", "repeat_interleave", *_OF_NUMBERS), _linear),
    **dict.fromkeys(("mul", "rmul", "matmul", "bmm", "einsum"), _product),
    "softmax": _softmax,
}
