"""Imports point one way, and nothing heavy or host-specific is imported early."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lens_lora"
LAYERS = [
    {"errors", "_version", "families"},
    {"adapters", "readouts"},
    {"hooked"},
    {"lens"},
    {"demonstration", "loading"},
    {"engine"},
    {"results"},
    {"analyses"},
    {"show"},
    {"sweeps"},
    {"__init__"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"


def imports(tree: ast.AST) -> set[str]:
    """Modules of the package that a file imports anywhere but under TYPE_CHECKING or lazily."""
    found: set[str] = set()
    for node in tree.body:
        for inner in ast.walk(node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
            if isinstance(inner, ast.ImportFrom) and inner.module:
                found.add(inner.module)
            elif isinstance(inner, ast.Import):
                found.update(alias.name for alias in inner.names)
    return {name for name in found if name.startswith("lens_lora")}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path):
    """A file imports from its own layer or from one below it."""
    relative = path.relative_to(PACKAGE.parent).with_suffix("")
    own = LEVEL[layer_of(".".join(relative.parts))]
    for name in imports(ast.parse(path.read_text())):
        assert LEVEL[layer_of(name)] <= own, f"{relative} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_layer_is_known(path: Path):
    relative = path.relative_to(PACKAGE)
    assert relative.parts[0].removesuffix(".py") in LEVEL


def test_import_works_without_hooked_transformer():
    """`import lens_lora` needs neither HookedTransformer nor a GPU, and loads no transformers."""
    code = (
        "import sys, lens_lora; "
        "assert 'transformers' not in sys.modules, 'transformers'; "
        "assert 'transformer_lens' not in sys.modules, 'transformer_lens'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
