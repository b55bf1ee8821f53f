"""What a function's bytecode names, and which modules belong to installed packages."""

from __future__ import annotations

import dis
import functools
import site
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path

__all__ = ["attributes_named", "globals_named", "is_installed", "version_of"]

_GLOBALS = {"LOAD_GLOBAL", "LOAD_NAME"}
_ATTRIBUTES = {"LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM", "LOAD_SUPER_ATTR"}
_OWN = __name__.partition(".")[0]


def globals_named(fn: types.FunctionType) -> list[str]:
    """The globals that a function, or one within it, loads; builtins are left out.

    Args:
        fn: the function.
    """
    return [name for name in sorted(_names(fn.__code__, _GLOBALS)) if name in fn.__globals__]


def attributes_named(fn: types.FunctionType) -> list[str]:
    """The attributes, of whatever object, that a function or one within it loads.

    Args:
        fn: the function.
    """
    return sorted(_names(fn.__code__, _ATTRIBUTES))


def _names(code: types.CodeType, operations: set[str]) -> set[str]:
    return {
        str(step.argval)
        for inner in _codes(code)
        for step in dis.get_instructions(inner)
        if step.opname in operations
    }


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


@functools.cache
def is_installed(module: str | None) -> bool:
    """Whether a module is Python's own or a package's, and not a file of the user.

    Args:
        module: its full name.
    """
    top = (module or "").partition(".")[0]
    if top == _OWN or top in sys.builtin_module_names or top in sys.stdlib_module_names:
        return True
    spec = getattr(sys.modules.get(top), "__spec__", None)
    places = [*(getattr(spec, "submodule_search_locations", None) or ())]
    places.append(getattr(spec, "origin", None) or "")
    return any(Path(place).is_relative_to(root) for place in places if place for root in _roots())


@functools.cache
def _roots() -> tuple[Path, ...]:
    own = (sysconfig.get_path(name) for name in ("purelib", "platlib"))
    return tuple(map(Path, {*own, *site.getsitepackages(), site.getusersitepackages()}))


@functools.cache
def version_of(module: str) -> str:
    """The version of the package that a module belongs to; Python's own for its library.

    Args:
        module: its full name.
    """
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        return ".".join(map(str, sys.version_info[:2]))
    return str(getattr(sys.modules.get(top), "__version__", ""))
