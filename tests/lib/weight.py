"""How heavy the package is, counted on its sources; nothing is imported.

    python tests/lib/weight.py

Code lines are lines that are neither blank, nor a comment, nor part of a docstring. A module's
readers are the other files of the package that import from it. A vague name is one of `VAGUE`
where it is assigned; a fragment is the description of an argument that begins with a preposition.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
VAGUE = frozenset({
    *("found", "own", "one", "some", "of", "at", "each", "what", "which", "all"),
    *("them", "it", "these", "here", "there", "made", "given", "got"),
})  # fmt: skip
PREPOSITIONS = "of|what|whose|in|as|at|by|which|from|to|on|for"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
NO_TOPIC = {"__init__.py", "__main__.py", "_version.py"}


@dataclass(frozen=True)
class Source:
    """One file of the package."""

    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.text)))

    @cached_property
    def docstrings(self) -> list[ast.Constant]:
        bodies = [node.body for node in self.nodes if isinstance(node, DOCUMENTED) and node.body]
        firsts = [body[0].value for body in bodies if isinstance(body[0], ast.Expr)]
        return [
            first
            for first in firsts
            if isinstance(first, ast.Constant) and isinstance(first.value, str)
        ]

    @cached_property
    def docstring_lines(self) -> set[int]:
        return {
            number
            for docstring in self.docstrings
            for number in range(docstring.lineno, (docstring.end_lineno or 0) + 1)
        }

    @property
    def code_lines(self) -> int:
        lines = enumerate(self.text.splitlines(), start=1)
        return sum(
            bool(line.strip()) and not line.strip().startswith("#")
            for number, line in lines
            if number not in self.docstring_lines
        )

    @property
    def assigned_names(self) -> list[str]:
        names = [node for node in self.nodes if isinstance(node, ast.Name)]
        return [name.id for name in names if isinstance(name.ctx, ast.Store)]

    @property
    def descriptions(self) -> Iterator[str]:
        """Of arguments and attributes."""
        for docstring in self.docstrings:
            yield from re.findall(r"^\s{4,}[\w, *]+: (.+)$", str(docstring.value), re.M)

    @property
    def imported(self) -> set[str]:
        """Dotted names of this package that are imported from, with and without the name."""
        nodes = [node for node in self.nodes if isinstance(node, ast.ImportFrom)]
        return {
            name
            for node in nodes
            for alias in node.names
            for name in (node.module or "", f"{node.module}.{alias.name}")
        }


def weigh(root: Path = ROOT) -> dict[str, float]:
    """Each number of the house."""
    package = root / "lens_lora"
    sources = {
        ".".join(path.relative_to(root).with_suffix("").parts): Source(path)
        for path in sorted(package.rglob("*.py"))
    }
    readers = Counter(
        name for module, source in sources.items() for name in source.imported - {module}
    )
    names = [name for source in sources.values() for name in source.assigned_names]
    descriptions = [text for source in sources.values() for text in source.descriptions]
    fragments = [text for text in descriptions if re.match(f"({PREPOSITIONS}) ", text)]
    stub = ast.parse((package / "__init__.pyi").read_text(encoding="utf-8"))
    (public,) = (node.value for node in stub.body if isinstance(node, ast.Assign))
    return {
        "files": len(sources),
        "code lines": sum(source.code_lines for source in sources.values()),
        "docstring lines": sum(len(source.docstring_lines) for source in sources.values()),
        "modules with one reader": sum(
            readers[module] == 1 for module in sources if not module.endswith("__init__")
        ),
        "modules at the root": sum(path.name not in NO_TOPIC for path in package.glob("*.py")),
        "longest file": max(len(source.text.splitlines()) for source in sources.values()),
        "public names": len(ast.literal_eval(public)),
        "vague names, %": round(100 * sum(name in VAGUE for name in names) / len(names), 1),
        "fragments, %": round(100 * len(fragments) / len(descriptions), 1),
    }


if __name__ == "__main__":
    for name, value in weigh().items():
        print(f"{name:25} {value:>8}")
