"""The results of analyses: frozen numbers with labels, as tables, files, figures and pages.

Each class stands beside the function that returns it, or here where several do. All of them are
attributes of this package, each imported from its module at its first use; `__init__.pyi` says
where they live.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOMES = {
    alias.name: f"lens_lora.{node.module}"
    for node in _STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    """The class, imported from its module at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lens_lora.results' has no attribute {name!r}.")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
