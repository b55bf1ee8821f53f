"""The package under test as the rules of this folder see it: its folders and its public names."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

from imports import Package

TESTS = Path(__file__).parents[1]
LENS_LORA = Package(TESTS.parent / "lens_lora")

# The folders that answer one question each.
QUESTIONS = {
    "audit",
    "banks",
    "curvature",
    "directions",
    "edge_attribution",
    "hidden",
    "interaction",
    "judging",
    "path",
    "relevance",
    "shifts",
    "ship",
    "sweeps",
    "two_adapters",
}
# Public modules whose every name is public.
WHOLE = ("lens_lora.errors", "lens_lora.spans", "lens_lora.compat", "lens_lora.families")
# Public modules whose names their stub lists.
STUBS = {
    "lens_lora": "__init__.pyi",
    "lens_lora.results": "results.pyi",
    "lens_lora.core": "core/__init__.pyi",
    "lens_lora.core.adapter": "core/adapter/__init__.pyi",
    "lens_lora.core.model": "core/model/__init__.pyi",
}


def folder_of(module: str) -> str:
    """The folder, or the file at the top of the package, to which a module belongs.

    That is `core` for `lens_lora.core.function.reverse`, and `__init__` for `lens_lora` itself.
    """
    _, *parts = module.split(".")
    return parts[0] if parts else "__init__"


def is_within(name: str, *modules: str) -> bool:
    """Whether a dotted name is one of these modules, or is found in one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def public_names() -> frozenset[str]:
    """All that a test may import from any folder: public names, and the command line."""
    names = {"lens_lora.cli", "lens_lora.cli.app", *STUBS, *WHOLE}
    for module, stub in STUBS.items():
        names.update(f"{module}.{name}" for name in _listed_in(LENS_LORA.folder / stub))
    return frozenset(names)


def _listed_in(stub: Path) -> set[str]:
    """The names that a stub gives to the module beside it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(stub.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def findings(of_module: Callable[[Package, str], list[str]]) -> dict[str, list[str]]:
    """What a rule finds in each module of lens_lora; modules without a finding are left out."""
    found: dict[str, list[str]] = {}
    for module in LENS_LORA.files:
        names = of_module(LENS_LORA, module)
        if names:
            found[module] = names
    return found


def planted(folder: Path, **sources: str) -> Package:
    """A package named lens_lora with these sources: `core__reverse` is core/reverse.py.

    It always has an empty show/text.py, which the planted sources may import.
    """
    package = folder / "lens_lora"
    for name, source in {"show__text": "", **sources}.items():
        path = package / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
        for parent in path.relative_to(package).parents:
            (package / parent / "__init__.py").touch()
    return Package(package)
