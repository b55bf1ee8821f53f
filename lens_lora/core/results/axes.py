"""Check that the fields of a result agree, when it is made and when it is read from a file.

1. Types, dtypes and shapes must be as annotated. A tensor `Float[Tensor, "batch site"]` tells how
   long the axes "batch" and "site" are.
2. There must be as many labels as their axis is long. `Annotated[tuple[Site, ...], "site"]` holds
   labels of the axis "site". Labels may also be annotated with:

       "batch position"   a tuple of labels for each prompt, the longest as long as "position"
       "token?"           no labels if no tensor has that axis
       "group: site"      labels of "group", whose numbers are indices along "site"
"""

from __future__ import annotations

import dataclasses
import functools
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin

from jaxtyping import AbstractArray
from torch import Tensor

from lens_lora.core.model import Site
from lens_lora.errors import LensLoraError

_PLAIN = frozenset({str, int, float, bool})
# The size of each axis, and the field that says so.
Sizes = dict[str, tuple[int, str]]


class _Array(NamedTuple):
    """An array of a result.

    Attributes:
        place: where it is, for errors, such as 'curve.values'.
        tensor: the array.
        dims: its axes as annotated, such as "batch site *by".
        key: its key, if it is in a mapping.
    """

    place: str
    tensor: Tensor
    dims: str
    key: str


class _Labels(NamedTuple):
    """The labels of an axis of a result.

    Attributes:
        place: where they are, for errors.
        labels: the labels.
        axes: the axis that they belong to, or the axes, the outermost first.
        is_optional: whether there may be none of them, because no array has the axis.
        indexed: the axis along which their numbers are indices; "" where they are no indices.
    """

    place: str
    labels: Any
    axes: tuple[str, ...]
    is_optional: bool
    indexed: str

    @classmethod
    def annotated(cls, place: str, labels: Any, spec: str) -> _Labels:
        """Labels with the annotation "batch position", "token?" or "group: site"."""
        axes, _, indexed = spec.partition(": ")
        names = tuple(axes.rstrip("?").split())
        return cls(place, labels, names, is_optional=axes.endswith("?"), indexed=indexed)


class Axes:
    """The sizes of a result's axes; its fields must be as annotated, and agree with each other.

    Arrays are asked for the size of an axis before labels are. If a part of a result has an axis of
    the same name as the whole, it must have the same size.

    Attributes:
        sizes: the size of each axis, with the field that says so.

    Raises:
        LensLoraError: a field has another type, or two fields disagree.
    """

    def __init__(self, whole: object) -> None:
        self.sizes: Sizes = {}
        self._class_name = type(whole).__name__
        # Not by `getattr`, for which a result without the field would look for what was meant.
        self._by = vars(whole).get("by", ())
        self._arrays: list[_Array] = []
        self._labels: list[_Labels] = []
        self._sizes_of_parts: list[tuple[str, Sizes]] = []
        for name, hint in annotations_of(type(whole)).items():
            self._visit(name, getattr(whole, name), hint)
        for array in self._arrays:
            self._measure(array)
        for labels in self._labels:
            self._count(labels)
        for place, sizes in self._sizes_of_parts:
            for axis in self.sizes.keys() & sizes.keys():
                size, field = sizes[axis]
                self._bind(f"{place}.{field}", axis, size)

    # --- Collecting what is in a result: its arrays, its labels, and results that are parts of it

    def _visit(self, place: str, value: Any, hint: Any, key: str = "") -> None:
        """Check the type of a field, or of an item in it, and collect its arrays and labels.

        Args:
            place: where it is, for errors.
            value: the value there.
            hint: its annotation.
            key: its key, if it is in a mapping.
        """
        if type(value) is hint and (hint in _PLAIN or _is_flat(value)):
            return
        if not _is_a(value, hint):
            self._refuse(f"{place} is {_shown(value)}, expected {_name_of(hint)}")
        origin = get_origin(hint)
        arguments = get_args(hint)
        if origin is Annotated:
            plain, spec = arguments
            self._labels.append(_Labels.annotated(place, value, spec))
            self._visit(place, value, plain, key)
        elif origin in (Union, types.UnionType):
            fitting = next(arm for arm in arguments if _is_a(value, arm))
            self._visit(place, value, fitting, key)
        elif _is_array(hint):
            self._arrays.append(_Array(place, value, hint.dim_str, key))
        elif dataclasses.is_dataclass(hint):
            sizes = vars(value).get("axes") or Axes(value).sizes
            self._sizes_of_parts.append((place, sizes))
        elif origin is tuple:
            self._visit_tuple(place, value, arguments, key)
        elif origin in (Mapping, dict):
            for name, item in value.items():
                self._visit(f"{place}[{name!r}]", item, arguments[1], name)

    def _visit_tuple(
        self, place: str, values: tuple[Any, ...], arguments: tuple[Any, ...], key: str
    ) -> None:
        if _is_all_plain(values, arguments):
            return
        hints = arguments
        if arguments[-1] is ...:
            hints = arguments[:1] * len(values)
        for i, (item, hint) in enumerate(zip(values, hints, strict=True)):
            self._visit(f"{place}[{i}]", item, hint, key)
        if get_origin(arguments[0]) is Literal:
            in_order = tuple(name for name in get_args(arguments[0]) if name in values)
            if values != in_order:
                self._refuse(f"{place} is {_shown(values)}, expected {_shown(in_order)}")

    # --- The sizes of axes

    def _measure(self, array: _Array) -> None:
        """Take the sizes of an array's axes.

        "*by" stands for the axes that the field `by` names, and "*position" for one axis or none.
        """
        axes = array.dims.split()
        names: list[str] = []
        for axis in axes:
            if axis == "*by":
                names += self._by
            elif axis.startswith("*"):
                is_there = array.tensor.ndim >= len(axes)
                if is_there:
                    names.append(axis.removeprefix("*"))
            else:
                names.append(axis)
        if len(names) != array.tensor.ndim:
            self._refuse(f"{array.place} is {_shown(array.tensor)}, expected [{', '.join(names)}]")
        for axis, size in zip(names, array.tensor.shape, strict=True):
            # An axis such as "_token" has its own size under each key of a mapping.
            own = f"{array.key}{axis}" if axis.startswith("_") else axis
            self._bind(array.place, own, size)

    def _count(self, labels: _Labels) -> None:
        """Take the sizes of the axes that labels belong to."""
        outer, *inner = labels.axes
        if labels.is_optional and labels.axes[-1] not in self.sizes:
            if labels.labels:
                count = len(labels.labels)
                self._refuse(f"{labels.place} has {count} labels of an axis that no array has")
            return
        self._bind(labels.place, outer, _extent(labels.labels))
        for axis in inner:
            longest = max((_extent(label) for label in labels.labels), default=0)
            self._bind(labels.place, axis, longest)
        if labels.indexed in self.sizes:
            self._require_indices(labels)

    def _require_indices(self, labels: _Labels) -> None:
        """Check that no index is beyond the end of the axis that it refers to."""
        size, field = self.sizes[labels.indexed]
        highest = max(_indices(labels.labels), default=-1)
        if highest >= size:
            self._refuse(f"{labels.place} names {labels.indexed} {highest}, and {field} has {size}")

    def _bind(self, place: str, axis: str, size: int) -> None:
        """Take the size of an axis, or check it against the size that is known.

        Args:
            place: the field that says so, for errors.
            axis: such as "site"; "step+1" is one longer than "step", and "end=2" is always 2.
            size: its size.
        """
        name, _, longer = axis.partition("+")
        _, _, fixed = name.rpartition("=")
        own_size = size - int(longer or 0)
        expected, field = self.sizes.setdefault(name, (own_size, place))
        if fixed.isdigit():
            expected = int(fixed)
            field = "its class"
        if own_size != expected:
            self._refuse(f"{place} has {own_size} along {name!r}, and {field} {expected}")

    def _refuse(self, fact: str) -> NoReturn:
        raise LensLoraError(f"{self._class_name}: {fact}")


def _is_flat(value: object) -> bool:
    """Whether this is a dataclass of plain values alone, such as a site, which has no axis."""
    if not dataclasses.is_dataclass(value):
        return False
    for name, hint in annotations_of(type(value)).items():
        if hint not in _PLAIN or type(getattr(value, name)) is not hint:
            return False
    return True


@functools.cache
def annotations_of(kind: type) -> dict[str, Any]:
    """The annotation of each field of a dataclass, by its name."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value has the outermost type of an annotation."""
    origin = get_origin(hint)
    args = get_args(hint)
    if origin is Annotated:
        return _is_a(value, args[0])
    if origin in (Union, types.UnionType):
        return any(_is_a(value, arm) for arm in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and (args[-1] is ... or len(value) == len(args))
    if hint in (int, float):  # An int counts as a float, but a bool counts as neither.
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if _is_array(hint):
        # The dtype as jaxtyping names it: 'float32' of 'torch.float32'.
        _, _, name = str(getattr(value, "dtype", "")).rpartition(".")
        return isinstance(value, hint.array_type) and name in hint.dtypes
    return isinstance(value, origin or hint)


def _is_all_plain(values: tuple[Any, ...], args: tuple[Any, ...]) -> bool:
    """Whether all have the same plain type, as tokens do, of which there may be very many."""
    return args[1:] == (...,) and args[0] in _PLAIN and set(map(type, values)) <= {args[0]}


def _is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def _extent(label: Any) -> int:
    """How many entries some labels stand for: their number, a number itself, or a site's ranks."""
    if isinstance(label, Site):
        return label.rank
    return label if isinstance(label, int) else len(label)


def _indices(labels: Any) -> Iterator[int]:
    """Every index in labels that are indices, however they are nested."""
    if isinstance(labels, int):
        yield labels
        return
    items = labels.values() if isinstance(labels, Mapping) else labels
    for item in items:
        yield from _indices(item)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return reprlib.repr(value)


def _name_of(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
