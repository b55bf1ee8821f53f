"""A hash of a value by what it holds, and of a function by what it computes.

1. Plain values, tensors and arrays: type and every byte.
2. A function: its bytecode and constants, its defaults and closure, and the globals that it names,
   with their attributes that it names. So a change in a function that it calls is seen too.
3. What an installed package defines: its name and the package's version; of its closures, also
   what they hold.
4. Any other object: its class, and the parts from which `pickle` would build it again. Nothing is
   pickled or built.

Equal values give equal hashes in every process. What has no such parts (a generator, an open file)
is not hashed: `NotHashable` says where it stands.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import struct
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lens_lora.sweeps.code import attributes_named, globals_named, is_installed, version_of

__all__ = ["NotHashable", "digest", "tensor_digest"]

_LENGTH = 16
_GENERATED = frozenset(
    {
        "__dict__", "__weakref__", "__doc__", "__module__", "__firstlineno__", "__annotations__",
        "__static_attributes__", "__dataclass_fields__", "__dataclass_params__", "__match_args__",
        "__abstractmethods__", "_abc_impl", "__parameters__", "__orig_bases__", "__annotate_func__",
        "__annotate__", "__annotations_cache__", "__slotnames__",
    }
)  # fmt: skip


class NotHashable(Exception):
    """A value that has no hash; the message says what it is and where it stands."""


def digest(
    value: object,
    known: Mapping[int, str] | None = None,
    instead: Callable[[str], str] | None = None,
) -> str:
    """The hash of a value, as 32 hexadecimal digits.

    Args:
        value: a value, function or object.
        known: {id of an object: its name}, of objects that are told apart in another way.
        instead: what stands for a value without a hash, given the message about it.

    Raises:
        NotHashable: a value without a hash, and no `instead`.
    """
    return _Hasher(known or {}, instead).of(value, "").hex()


def tensor_digest(tensor: Tensor) -> bytes:
    """The hash of a tensor: dtype, shape and every byte.

    Args:
        tensor: dense, on any device.
    """
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if tensor.numel():
        flat = tensor.detach().cpu().contiguous().view(-1)
        found.update(flat.view(torch.uint8).numpy().data)
    return found.digest()[:_LENGTH]


class _Hasher:
    def __init__(self, known: Mapping[int, str], instead: Callable[[str], str] | None) -> None:
        self._known, self._instead = known, instead
        self._done: dict[int, tuple[object, bytes]] = {}
        self._path: list[int] = []

    def of(self, value: object, where: str) -> bytes:
        """The hash of a value, which stands at `where` in the one that was asked for."""
        plain = _plain(value)
        if plain is not None:
            return _hash(type(value).__name__, plain)
        if id(value) in self._known:
            return _hash("known", self._known[id(value)].encode())
        if id(value) in self._done:
            return self._done[id(value)][1]
        if id(value) in self._path:
            return _hash("circle", str(self._path[::-1].index(id(value))).encode())
        self._path.append(id(value))
        try:
            found = self._of_parts(value, where)
        except (TypeError, AttributeError, ValueError, RuntimeError, RecursionError) as error:
            place = f"{where}: " if where else ""
            message = f"{place}a {type(value).__name__} has no hash ({error})"
            if self._instead is None:
                raise NotHashable(message) from error
            found = _hash("instead", self._instead(message).encode())
        finally:
            self._path.pop()
        self._done[id(value)] = value, found  # kept, so that no other object has its id
        return found

    def _of_parts(self, value: Any, where: str) -> bytes:
        if isinstance(value, Tensor):
            return tensor_digest(value)
        if isinstance(value, np.ndarray) and value.dtype != object:
            array = np.ascontiguousarray(value)
            return _hash(f"array {array.dtype.str} {value.shape}", array.tobytes())
        if isinstance(value, set | frozenset):
            return _hash("set", *sorted(self.of(item, where) for item in value))
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return self._sequence(type(value).__name__, value, where)
        if isinstance(value, Mapping) and type(value) in (dict, types.MappingProxyType):
            return self._mapping(value, where)
        if isinstance(value, types.FunctionType):
            return self._function(value, where)
        if isinstance(value, types.ModuleType):
            return _hash("module", value.__name__.encode(), version_of(value.__name__).encode())
        if isinstance(value, type):
            return self._class(value, where)
        if isinstance(value, enum.Enum):
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            return _hash("enum", kind.encode(), value.name.encode(), self.of(value.value, where))
        if isinstance(value, types.CodeType):
            return self._code(value, where)
        return self._object(value, where)

    def _sequence(self, kind: str, items: Iterable[object], where: str) -> bytes:
        return _hash(kind, *(self.of(item, f"{where}[{i}]") for i, item in enumerate(items)))

    def _mapping(self, items: Mapping[Any, object], where: str) -> bytes:
        parts: list[bytes] = []
        for key, value in items.items():
            name = key if isinstance(key, str) else repr(type(key))
            parts += [self.of(key, where), self.of(value, f"{where}.{name}".lstrip("."))]
        return _hash("dict", *parts)

    def _function(self, fn: types.FunctionType, where: str) -> bytes:
        where = f"{where}.{fn.__name__}".lstrip(".")
        cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
        held = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
        parts = [self.of(held, where)]
        if is_installed(fn.__module__):
            return _hash("function", *parts, *_named(fn))
        outside = {name: fn.__globals__[name] for name in globals_named(fn)}
        parts.append(self.of(outside, where))
        for name, value in {**outside, **held}.items():
            parts.append(self._attributes(fn, value, f"{where}.{name}"))
        rest = (fn.__defaults__, fn.__kwdefaults__, vars(fn))
        parts += [self.of(fn.__code__, where), *(self.of(part, where) for part in rest)]
        return _hash("function", *parts)

    def _attributes(self, fn: types.FunctionType, value: object, where: str) -> bytes:
        """What the function names of a module that belongs to no installed package."""
        if not isinstance(value, types.ModuleType) or is_installed(value.__name__):
            return b""
        used = {name: vars(value)[name] for name in attributes_named(fn) if name in vars(value)}
        below = [self._attributes(fn, inner, f"{where}.{name}") for name, inner in used.items()]
        return _hash("attributes", self.of(used, where), *below)

    def _code(self, code: types.CodeType, where: str) -> bytes:
        numbers = (
            code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags,
            code.co_names, code.co_code, getattr(code, "co_exceptiontable", b""),
        )  # fmt: skip
        return _hash("code", self.of(numbers, where), self.of(code.co_consts, where))

    def _class(self, kind: type, where: str) -> bytes:
        if is_installed(kind.__module__):
            return _hash("class", *_named(kind))
        own = {name: part for name, part in vars(kind).items() if name not in _GENERATED}
        parts = {name: part for name, part in own.items() if not inspect.ismemberdescriptor(part)}
        name = kind.__qualname__.encode()
        return _hash("class", name, self.of(kind.__bases__, where), self.of(parts, where))

    def _object(self, value: Any, where: str) -> bytes:
        """By what it wraps, or by the parts from which pickle would build it again."""
        kind = type(value)
        if isinstance(value, types.MethodType | staticmethod | classmethod):
            parts = (value.__func__, getattr(value, "__self__", None))
            return _hash(kind.__name__, self.of(parts, where))
        if isinstance(value, property):
            return _hash("property", self.of((value.fget, value.fset, value.fdel), where))
        if isinstance(value, functools.cached_property):
            return _hash("cached_property", self.of(value.func, where))
        if isinstance(value, types.BuiltinFunctionType | types.WrapperDescriptorType):
            owner = getattr(value, "__self__", None)
            return _hash("builtin", *_named(value), self.of(owner, where))
        if hasattr(value, "__wrapped__"):
            return _hash(kind.__name__, self.of(value.__wrapped__, where))
        rebuilt = value.__reduce_ex__(4)
        if isinstance(rebuilt, str):
            if not is_installed(kind.__module__):
                raise TypeError(f"pickle knows it by the name {rebuilt!r} only")
            return _hash("named", *_named(kind), rebuilt.encode())
        made = self._sequence(kind.__qualname__, rebuilt[:3], where)
        items = [list(part) if part is not None else None for part in rebuilt[3:5]]
        return _hash("object", made, self.of(items, where))


def _plain(value: object) -> bytes | None:
    """The bytes of a value without parts; None for others."""
    kind = type(value)
    if kind is float:
        return struct.pack("<d", value)
    if kind is complex and isinstance(value, complex):
        return struct.pack("<dd", value.real, value.imag)
    if kind is str and isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if kind is bytes and isinstance(value, bytes):
        return value
    if value is None or value is ... or kind in (bool, int, torch.dtype, torch.device):
        return str(value).encode()
    if isinstance(value, np.generic):
        return f"{value.dtype.str} ".encode() + value.tobytes()
    return None


def _hash(kind: str, *parts: bytes) -> bytes:
    found = hashlib.sha256(kind.encode())
    for part in parts:
        found.update(struct.pack("<Q", len(part)))
        found.update(part)
    return found.digest()[:_LENGTH]


def _named(value: Any) -> list[bytes]:
    """The name of what a package defines, and the package's version."""
    module = getattr(value, "__module__", None) or ""
    name = getattr(value, "__qualname__", repr(type(value)))
    return [f"{module}.{name}".encode(), version_of(module).encode()]


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
