"""Names of the modules that extend the core. Each module registers something with it.

    registry.DRAWERS["lens_lora.audit"] = ("lens_lora.audit.figures", "lens_lora.audit.words")

1. `lens_lora/registered.py` is the package's own list. `lens_lora/__init__.py`, which Python runs
   before any module of the package, hands it over; nothing of it is imported then.
2. Where something registered is first looked for, `import_each` imports the modules that may have
   registered it. So the core names nothing above itself, and what is never asked is never loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

# Folder of results → the modules that draw them and say what they say.
DRAWERS: dict[str, tuple[str, ...]] = {}

# A function that the core declares (`core/provided.py`) → the module that provides it.
PROVIDERS: dict[str, str] = {}

# Modules of which classes of results are attributes, each imported at its first use; files name
# these classes.
RESULTS: list[str] = []

# Modules that register a format of adapters with `adapter_format`; PEFT's is built in.
FORMATS: list[str] = []


def import_each(modules: Iterable[str]) -> list[Any]:
    """Import modules by their names; one that is loaded already is not run again."""
    return [importlib.import_module(module) for module in modules]


def folders_of(module: str) -> list[str]:
    """List a module and the packages that it is in: 'a', 'a.b' and 'a.b.c' for 'a.b.c'."""
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
