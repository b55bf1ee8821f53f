"""The results of analyses: frozen numbers with labels, as tables, files, figures and pages.

Each class is defined beside the function that returns it. All of them are attributes of this
module, and each is imported from its own module at its first use; `results.pyi` says where they
are defined.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))


def _modules_by_class() -> dict[str, str]:
    """The module of each class, as the stub file imports them."""
    modules: dict[str, str] = {}
    for node in _STUB.body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                modules[alias.name] = f"lens_lora.{node.module}"
    return modules


_HOMES = _modules_by_class()
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    """The class, imported from its module at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lens_lora.results' has no attribute {name!r}.")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
