"""The imports of a package, read from its syntax trees: every kind of import, wherever it stands.

Imports inside functions and under TYPE_CHECKING count like those at the top of a file. That
importing a.b runs the `__init__` of a does not count: the edge is to the module that is named.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

COMPUTED = "a name that is computed"


@dataclass(frozen=True)
class Package:
    """The modules of one package, and who imports whom."""

    folder: Path

    @cached_property
    def files(self) -> dict[str, Path]:
        """Module → file; a package is its `__init__`."""
        return {self._module(path): path for path in sorted(self.folder.rglob("*.py"))}

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """Module → the modules of this package that it imports; COMPUTED where none can be read."""
        return {name: set(self._imported(name)) for name in self.files}

    def circles(self, but: Callable[[str, str], bool] = lambda a, b: False) -> list[set[str]]:
        """Modules that import one another, directly or not: the strongly connected components.

        `but` says of an import (from a, of b) that it does not count.
        """
        names = list(self.files)
        edges = np.array([[b in self.imports[a] and not but(a, b) for b in names] for a in names])
        _, labels = connected_components(csr_array(edges), connection="strong")
        found = [{n for n, k in zip(names, labels, strict=True) if k == i} for i in set(labels)]
        return [c for c in found if len(c) > 1 or edges[names.index(*c), names.index(*c)]]

    def _module(self, path: Path) -> str:
        parts = path.relative_to(self.folder.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def _imported(self, name: str) -> Iterator[str]:
        path = self.files[name]
        here = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for target in _targets(node, here):
                if target == COMPUTED:
                    yield target
                elif (target + ".").startswith(self.folder.name + "."):
                    yield self._nearest(target)

    def _nearest(self, target: str) -> str:
        """The module that holds the name: `a.b.name` is `a.b` where `name` is no module of it."""
        while target not in self.files and "." in target:
            target = target.rpartition(".")[0]
        return target


def named_in(source: str, here: str) -> set[str]:
    """The dotted names that a file in the package `here` imports, as `a.b.name`.

    Names that are computed cannot be read, and are left out.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        found.update(_targets(node, here))
    return found - {COMPUTED}


def _targets(node: ast.AST, here: str) -> Iterator[str]:
    """The dotted names that one node imports, in a module of the package `here`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        start = _absolute("." * node.level + (node.module or ""), here)
        yield from (start if alias.name == "*" else f"{start}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
        (first, *_) = [*node.args, *(k.value for k in node.keywords if k.arg == "name")]
        literal = isinstance(first, ast.Constant) and isinstance(first.value, str)
        yield _absolute(first.value, here) if literal else COMPUTED


def _called(node: ast.Call) -> str:
    """The last part of what is called: `import_module` of `importlib.import_module(…)`."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _absolute(name: str, here: str) -> str:
    """`..x` in the package a.b is a.x."""
    level = len(name) - len(name.lstrip("."))
    if not level:
        return name
    parts = here.split(".")
    return ".".join([*parts[: len(parts) - level + 1], *filter(None, [name[level:]])])
