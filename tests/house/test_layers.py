"""Imports point one way, without circles, and nothing heavy is imported early."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from imports import COMPUTED, Package
from own_package import LENS_LORA, QUESTIONS, findings, folder_of, planted

# From the lowest to the highest. Folders of one layer may import one another.
LAYERS = [
    {"errors", "_version", "families", "registered", "vocabulary"},
    {"guesses"},
    {"spans"},
    {"compat"},
    {"arguments", "correlation"},
    {"core"},
    {"formats", "hosts"},
    {"demonstration"},
    {"loading"},
    {"show", "runs"},
    {"views"},
    {"responses", "integrals"},
    {"texts"},
    {"stream"},
    QUESTIONS,
    {"explanations"},
    # These two import each of their names at its first use.
    {"results"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Where names that are computed are imported: those of `results.pyi`, and those that are registered.
IMPORTERS = {"lens_lora.results", "lens_lora.core.registry", "lens_lora.runs.shards"}


def upward(package: Package, module: str) -> list[str]:
    """What this module imports from a higher layer, and imports whose target cannot be read."""
    own_level = LEVEL[folder_of(module)]
    found: list[str] = []
    for name in sorted(package.imports[module]):
        if name != COMPUTED:
            level = LEVEL[folder_of(name)]
        elif module in IMPORTERS:
            continue
        else:
            level = LEVEL["__init__"]
        if level > own_level:
            found.append(name)
    return found


def test_imports_point_downward():
    """A file imports from its own layer or from a lower one, wherever the import stands.

    An import whose target cannot be read counts as one of the whole package: only the top of the
    package (`__init__`, `cli` and `__main__`) and IMPORTERS may have one.
    """
    # An empty list would pass; so many files show that the package was found.
    assert len(LENS_LORA.files) > 50
    assert {folder_of(module) for module in LENS_LORA.files} <= LEVEL.keys()
    assert findings(upward) == {}


FORMS = {
    "import": "import lens_lora.show.text",
    "from": "from lens_lora.show.text import text_table",
    "module from its package": "from lens_lora.show import text",
    "star": "from lens_lora.show.text import *",
    "relative": "from ..show.text import text_table",
    "relative module": "from ..show import text",
    "literal": "import importlib\nimportlib.import_module('lens_lora.show.text')",
    "relative literal": "from importlib import import_module\n"
    "import_module('..show.text', __package__)",
    "dunder": "__import__('lens_lora.show.text')",
    "named": "import importlib\nimportlib.import_module(name='lens_lora.show.text')",
}
# The source around an import, and how far the import is indented there.
PLACES = {
    "top": ("{}", ""),
    "function": ("def f():\n{}", " " * 4),
    "method": ("class A:\n    def f(self):\n{}", " " * 8),
    "TYPE_CHECKING": ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n{}", " " * 4),
    "try": ("try:\n{}\nexcept ImportError:\n    pass", " " * 4),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", FORMS)
def test_a_planted_import_is_seen(form: str, place: str, tmp_path: Path):
    """Negative control: core → show in every form and at every place."""
    around, indent = PLACES[place]
    source = around.format(textwrap.indent(FORMS[form], indent))
    package = planted(tmp_path, core__reverse=source)
    assert upward(package, "lens_lora.core.reverse") == ["lens_lora.show.text"]


def test_each_planted_import_of_a_file_is_seen(tmp_path: Path):
    """Negative control: a file that imports from two higher layers."""
    source = "def f():\n    import lens_lora.show.text\n    import lens_lora.cli"
    package = planted(tmp_path, core__reverse=source, cli="")
    assert upward(package, "lens_lora.core.reverse") == ["lens_lora.cli", "lens_lora.show.text"]


def test_a_computed_name_is_seen(tmp_path: Path):
    """Negative control: what cannot be read may be anything."""
    source = "import importlib\nimportlib.import_module(name)"
    package = planted(tmp_path, core__reverse=source, cli__explain=source)
    assert upward(package, "lens_lora.core.reverse") == [COMPUTED]
    assert upward(package, "lens_lora.cli.explain") == []


# --- circles


def test_no_circles():
    """No module imports itself, directly or through others, wherever the imports stand."""
    assert LENS_LORA.circles() == []


def test_a_planted_circle_is_seen(tmp_path: Path):
    """Negative control: a → b at the top, b → c in a function, c → a under TYPE_CHECKING."""
    package = planted(
        tmp_path,
        core__a="from lens_lora.core import b",
        core__b="def f():\n    from . import c",
        core__c="if TYPE_CHECKING:\n    from lens_lora.core.a import A",
        core__d="import lens_lora.core.a",
    )
    assert package.circles() == [{f"lens_lora.core.{name}" for name in "abc"}]


def test_a_planted_circle_through_two_folders_is_seen(tmp_path: Path):
    """Negative control: core → show → core."""
    package = planted(
        tmp_path,
        core__a="def f():\n    from lens_lora.show import text",
        core__b="from lens_lora.core import a",
        show__text="from lens_lora.core.b import Effects",
    )
    assert package.circles() == [{"lens_lora.core.a", "lens_lora.core.b", "lens_lora.show.text"}]


def test_a_module_that_imports_itself_is_seen(tmp_path: Path):
    """Negative control."""
    package = planted(tmp_path, core__a="def f():\n    from lens_lora.core import a")
    assert package.circles() == [{"lens_lora.core.a"}]


# --- what importing the package loads


def test_import_works_without_hooked_transformer():
    """`import lens_lora` needs neither HookedTransformer nor a GPU, and loads no transformers."""
    code = (
        "import sys, lens_lora; "
        "assert 'transformers' not in sys.modules, 'transformers'; "
        "assert 'transformer_lens' not in sys.modules, 'transformer_lens'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
