"""Results: frozen dataclasses that know their labels, and so make tables, pictures and files."""

from collections.abc import Callable

import lazy_loader

__getattr__: Callable[[str], object]
__dir__: Callable[[], list[str]]
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules=["drawing", "storage", "tables"]
)
