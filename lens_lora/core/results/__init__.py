"""Results: frozen dataclasses that know their labels, and so make tables, pictures and files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules=["drawing", "storage", "tables"]
)
