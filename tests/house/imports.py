"""The imports of a package, read from its syntax trees: every kind of import, wherever it stands.

Imports inside functions and under TYPE_CHECKING count like those at the top of a file. That
importing a.b runs the `__init__` of a does not count: the edge is to the module that is named.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
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
        """Module → the modules of this package that it imports.

        COMPUTED stands for an import whose target cannot be read.
        """
        return {name: set(self._imported(name)) for name in self.files}

    def circles(self) -> list[set[str]]:
        """Modules that import one another, directly or not: the strongly connected components."""
        names = list(self.files)
        edges = np.zeros((len(names), len(names)), dtype=bool)
        for row, module in enumerate(names):
            for imported in self.imports[module] - {COMPUTED}:
                edges[row, names.index(imported)] = True
        _, component_of = connected_components(csr_array(edges), connection="strong")

        found: list[set[str]] = []
        for component in sorted(set(component_of)):
            members = {names[row] for row in np.flatnonzero(component_of == component)}
            imports_itself = any(name in self.imports[name] for name in members)
            if len(members) > 1 or imports_itself:
                found.append(members)
        return found

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
        # `import_module(name, package)`: the name is the first argument, or `name=`.
        by_keyword = [keyword.value for keyword in node.keywords if keyword.arg == "name"]
        (target, *_) = [*node.args, *by_keyword]
        if isinstance(target, ast.Constant) and isinstance(target.value, str):
            yield _absolute(target.value, here)
        else:
            yield COMPUTED


def _called(node: ast.Call) -> str:
    """The last part of what is called: `import_module` of `importlib.import_module(…)`."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _absolute(name: str, here: str) -> str:
    """Resolve a relative name: `..x` in the package a.b is a.x, and `..` is a."""
    relative = name.lstrip(".")
    level = len(name) - len(relative)
    if level == 0:
        return name
    # One dot is the package itself; each further dot is one package up.
    parts = here.split(".")
    parts = parts[: len(parts) - level + 1]
    if relative:
        parts.append(relative)
    return ".".join(parts)
