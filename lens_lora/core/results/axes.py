"""Whether the fields of a result agree: when it is made, and when it is read from a file.

1. Types, dtypes and shapes are as they are annotated. `Float[Tensor, "batch site"]` says how long
   the axes "batch" and "site" are.
2. Labels are as many as their axis is long. `Annotated[tuple[Site, ...], "site"]` are the labels of
   the axis "site". Other annotations of labels are:

       "batch position"   tuples of labels: one tuple a prompt, the longest as long as "position"
       "token?"           none where no tensor has that axis
       "group: site"      labels of "group", whose numbers are indices along "site"
"""

from __future__ import annotations

import dataclasses
import functools
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from jaxtyping import AbstractArray
from torch import Tensor

from lens_lora.core.model import Site
from lens_lora.errors import LensLoraError

_PLAIN = frozenset({str, int, float, bool})
Sizes = dict[str, tuple[int, str]]


def _is_flat(value: object) -> bool:
    """A dataclass of plain values alone, as a site is: it has no axis."""
    return dataclasses.is_dataclass(value) and all(
        hint in _PLAIN and type(getattr(value, name)) is hint
        for name, hint in _hints(type(value)).items()
    )


class Axes:
    """The sizes of a result's axes, if its fields are what they are annotated as, and agree.

    Arrays say how long an axis is before labels do. An axis that a part and the whole both have is
    the same one.

    Attributes:
        sizes: of each axis, with the field that says so.

    Raises:
        LensLoraError: a field of another type, or two that disagree.
    """

    def __init__(self, whole: object) -> None:
        self.sizes: Sizes = {}
        self._kind, self._by = type(whole).__name__, getattr(whole, "by", ())
        self._arrays: list[tuple[str, Tensor, str, str]] = []
        self._labels: list[tuple[str, Any, str]] = []
        self._parts: list[tuple[str, Sizes]] = []
        for name, hint in _hints(type(whole)).items():
            self._visit(name, getattr(whole, name), hint)
        for array in self._arrays:
            self._measure(*array)
        for labels in self._labels:
            self._count(*labels)
        for place, sizes in self._parts:
            for axis in self.sizes.keys() & sizes.keys():
                size, field = sizes[axis]
                self._bind(f"{place}.{field}", axis, size)

    def _visit(self, place: str, value: Any, hint: Any, key: str = "") -> None:
        """A field, or an item in it, under this key of a mapping."""
        if type(value) is hint and (hint in _PLAIN or _is_flat(value)):
            return
        if not _is_a(value, hint):
            self._refuse(f"{place} is {_told(value)}, expected {_named(hint)}")
        origin, args = get_origin(hint), get_args(hint)
        if origin is Annotated:
            self._labels.append((place, value, args[1]))
            self._visit(place, value, args[0], key)
        elif origin in (Union, types.UnionType):
            self._visit(place, value, next(arm for arm in args if _is_a(value, arm)), key)
        elif _is_array(hint):
            self._arrays.append((place, value, hint.dim_str, key))
        elif dataclasses.is_dataclass(hint):
            self._parts.append((place, vars(value).get("axes") or Axes(value).sizes))
        elif origin is tuple and not _is_all_plain(value, args):
            hints = args[:1] * len(value) if args[-1] is ... else args
            for i, (item, of_item) in enumerate(zip(value, hints, strict=True)):
                self._visit(f"{place}[{i}]", item, of_item, key)
            if get_origin(args[0]) is Literal:
                order = [name for name in get_args(args[0]) if name in value]
                if list(value) != order:
                    self._refuse(f"{place} is {_told(value)}, expected {_told(tuple(order))}")
        elif origin in (Mapping, dict):
            for name, item in value.items():
                self._visit(f"{place}[{name!r}]", item, args[1], name)

    def _measure(self, place: str, array: Tensor, dims: str, key: str) -> None:
        """The axes of an array: "*by" is those that `by` names, "*position" one or none."""
        axes, names = dims.split(), list[str]()
        for axis in axes:
            several = self._by if axis == "*by" else [axis[1:]][: array.ndim - len(axes) + 1]
            names += several if axis.startswith("*") else [axis]
        if len(names) != array.ndim:
            self._refuse(f"{place} is {_told(array)}, expected [{', '.join(names)}]")
        for axis, size in zip(names, array.shape, strict=True):
            self._bind(place, f"{key}{axis}" if axis.startswith("_") else axis, size)

    def _count(self, place: str, labels: Any, spec: str) -> None:
        """The axes that labels say the length of; see the head of this file."""
        axes, _, indexed = spec.partition(": ")
        outer, *inner = axes.rstrip("?").split()
        if axes.endswith("?") and [outer, *inner][-1] not in self.sizes:
            if labels:
                self._refuse(f"{place} has {len(labels)} labels of an axis that no array has")
            return
        self._bind(place, outer, _extent(labels))
        for axis in inner:
            self._bind(place, axis, max(map(_extent, labels), default=0))
        if indexed in self.sizes:
            size, field = self.sizes[indexed]
            highest = max(_indices(labels), default=-1)
            if highest >= size:
                self._refuse(f"{place} names {indexed} {highest}, and {field} has {size}")

    def _bind(self, place: str, axis: str, size: int) -> None:
        """An axis of this size: "site"; "step+1", one longer than "step"; "end=2", always 2."""
        name, _, more = axis.partition("+")
        fixed, size = name.rpartition("=")[2], size - int(more or 0)
        known = self.sizes.setdefault(name, (size, place))
        expected, field = (int(fixed), "its class") if fixed.isdigit() else known
        if size != expected:
            self._refuse(f"{place} has {size} along {name!r}, and {field} {expected}")

    def _refuse(self, fact: str) -> NoReturn:
        raise LensLoraError(f"{self._kind}: {fact}")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """The annotation of each field."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _is_a(value: Any, hint: Any) -> bool:
    """Whether this is of the outermost type of an annotation."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _is_a(value, args[0])
    if origin in (Union, types.UnionType):
        return any(_is_a(value, arm) for arm in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and (args[-1] is ... or len(value) == len(args))
    if hint in (int, float):  # an int passes for a float, a bool for neither
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if _is_array(hint):
        name = str(getattr(value, "dtype", "")).rpartition(".")[2]  # jaxtyping's names of dtypes
        return isinstance(value, hint.array_type) and name in hint.dtypes
    return isinstance(value, origin or hint)


def _is_all_plain(values: tuple[Any, ...], args: tuple[Any, ...]) -> bool:
    """Whether all are of one plain type, as tokens are: they may be as many as the vocabulary."""
    return args[1:] == (...,) and args[0] in _PLAIN and set(map(type, values)) <= {args[0]}


def _is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def _extent(label: Any) -> int:
    """The entries that labels, or one label, stand for: a number, a tuple's, or a site's ranks."""
    if isinstance(label, Site):
        return label.rank
    return label if isinstance(label, int) else len(label)


def _indices(labels: Any) -> Iterator[int]:
    if isinstance(labels, int):
        yield labels
    else:
        for item in labels.values() if isinstance(labels, Mapping) else labels:
            yield from _indices(item)


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return reprlib.repr(value)


def _named(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
