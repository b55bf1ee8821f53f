"""A test imports public names, or internals of its own folder, and no other module of tests."""

from __future__ import annotations

import ast
from typing import NamedTuple

import pytest
from imports import named_in
from own_package import TESTS, WHOLE, is_within, public_names

# Folders whose files may know how everything is made: what tests share, and these rules.
KNOW_ALL = {"lib", "house"}
# What a folder of tests is the folder of, where that is more than the package's of its name.
OWN = {
    "cli": ("lens_lora.cli", "lens_lora.__main__"),
    "demonstration": ("lens_lora.demonstration", "lens_lora.loading"),
    # What figures and tables are made of is seen on results of the core.
    "show": ("lens_lora.show", "lens_lora.views"),
}


class Borrowed(NamedTuple):
    """What a file of tests takes from another folder's inside, and what it needs it for."""

    names: set[str]
    because: str


# It gets shorter; nothing is added to it.
BORROWED = {
    "audit/test_brief.py": Borrowed(
        {"texts.neutral.own_openings"},
        "makes the texts that a brief asks of a model by itself",
    ),
    "audit/test_what_changed.py": Borrowed(
        {"texts.neutral", "texts.neutral.own_openings", "stream.stream_reading.over_scale"},
        "asks the same texts by hand, and scales a reading as the audit does",
    ),
    "cli/test_cli.py": Borrowed(
        {
            "_version.versions",
            "demonstration.embedded.LYON_SENTENCES",
            "demonstration.embedded.train_adapter",
        },
        "puts a fake in the place of training, which takes minutes",
    ),
    "core/adapter/test_formats.py": Borrowed(
        {
            "formats.folders.checkpoint_folders",
            "formats.folders.folders_in",
            "formats.folders.last_checkpoint",
            "formats.folders.stated_base",
        },
        "sees that all who read folders know a registered format",
    ),
    "core/function/test_planned.py": Borrowed(
        {"hosts.planned_analyses.planned_analyses", "hosts.unloaded.unloaded"},
        "compares footprints with the plan for a model that is not loaded, which hosts/ makes",
    ),
    "explanations/test_explain_page.py": Borrowed(
        {"show.page", "show.text.label"},
        "plants a template that escapes nothing",
    ),
    "hosts/test_experts.py": Borrowed(
        {"directions.spectra.summarise"},
        "compares the singular values of each expert",
    ),
    "ship/test_exports.py": Borrowed(
        {"loading.tokenizer_beside"},
        "checks one merged folder without all else that `verify` checks",
    ),
    "ship/test_forms.py": Borrowed(
        {"formats.gguf_quantised.rounded_to_q4_k", "formats.gguf_quantised.type_of_rows"},
        "compares them with llama.cpp's own library, which only ship/ drives",
    ),
    "ship/test_gguf.py": Borrowed(
        {"formats.gguf_layout.rounding_to"},
        "compares it with llama.cpp's own library, which only ship/ drives",
    ),
}


def patched_in(source: str) -> set[str]:
    """The dotted names that a file patches by their text: `patch.setattr("a.b.name", 1)`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        if not ast.unparse(node.func).endswith("setattr"):
            continue
        first = node.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            found.add(first.value)
    return found


def internals(folder: str, source: str, public: frozenset[str]) -> list[str]:
    """What a test in this folder of tests imports, or patches, of another folder's internals."""
    allowed_modules = (*OWN.get(folder, (f"lens_lora.{folder}",)), *WHOLE)
    found: list[str] = []
    for name in sorted(named_in(source, "tests") | patched_in(source)):
        is_allowed = name in public or is_within(name, *allowed_modules)
        if is_within(name, "lens_lora") and not is_allowed:
            found.append(name)
    return found


def test_a_test_imports_public_names_or_internals_of_its_own_folder():
    """A test of one folder imports no internals of another, except those in BORROWED.

    An entry of BORROWED that is no longer needed fails as well.
    """
    public = public_names()
    found: dict[str, set[str]] = {}
    for path in sorted(TESTS.rglob("*.py")):
        place = path.relative_to(TESTS)
        folder = place.parts[0]
        if folder in KNOW_ALL:
            continue
        names = internals(folder, path.read_text(encoding="utf-8"), public)
        if names:
            found[place.as_posix()] = {name.removeprefix("lens_lora.") for name in names}
    assert found == {file: borrowed.names for file, borrowed in BORROWED.items()}


@pytest.mark.parametrize(
    ("owner", "source"),
    [
        ("path", "from lens_lora.path.rules import _weights"),
        ("path", "def f():\n    from lens_lora.path import _weights"),
        ("path", "import lens_lora.path.rules"),
        ("path", "from importlib import import_module\nimport_module('lens_lora.path.rules')"),
        ("path", "def f(patch):\n    patch.setattr('lens_lora.path.rules._weights', 1)"),
        ("core", "from lens_lora.core import reverse"),
        ("core", "from lens_lora.core.function.reverse import site_slopes"),
    ],
)
def test_a_planted_import_of_another_folder_s_internals_is_seen(owner: str, source: str):
    """Negative control, in each form; the folder's own test may have it."""
    public = public_names()
    assert len(internals("curvature", source, public)) == 1
    assert internals(owner, source, public) == []


def test_public_names_are_no_internals():
    source = "from lens_lora import LoraLens\nfrom lens_lora.errors import AdapterError"
    assert internals("curvature", source, public_names()) == []


# --- modules of tests


def imported_names(source: str) -> set[str]:
    """Every part of the modules that a file imports, and the names that it imports from them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found.update((node.module or "").split("."))
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                found.update(alias.name.split("."))
    return found


@pytest.mark.slow
def test_no_test_module_is_imported():
    """What tests share stands in tests/lib, or beside them where one folder alone uses it."""
    test_modules = {path.stem for path in TESTS.rglob("test_*.py")}
    found: dict[str, set[str]] = {}
    for path in TESTS.rglob("*.py"):
        imported = imported_names(path.read_text(encoding="utf-8")) & test_modules
        if imported:
            found[path.relative_to(TESTS).as_posix()] = imported
    assert found == {}


def test_an_imported_test_module_is_seen():
    """Negative control, in each form."""
    for source in ("import test_path", "from test_path import f", "from . import test_path"):
        assert "test_path" in imported_names(f"def f():\n    {source}")
