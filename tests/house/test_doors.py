"""What one folder of the package takes from another goes through that folder's door."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from imports import Package, named_in
from own_package import LENS_LORA, QUESTIONS, findings, folder_of, is_within, planted, public_names

import lens_lora.core

# --- the core's door

# What of the core a folder may use beside its door, `lens_lora.core`: those that register what the
# core reads have the door of what they register with.
DOORS: dict[str, set[str]] = {
    "formats": {"core.adapter", "core.adapter.extensions", "core.model.extensions"},
    "hosts": {"core.adapter", "core.model", "core.model.extensions"},
    # It writes the files of an adapter.
    "demonstration": {"core.adapter"},
    # They provide functions that the core declares.
    "banks": {"core.model.extensions"},
    "directions": {"core.model.extensions"},
    "responses": {"core.model.extensions", "core.readout.extensions"},
    # The package itself finds by name what is registered.
    "__init__": {"core.registry"},
}


def past_the_door(package: Package, module: str) -> list[str]:
    """What this module imports of the core from behind its door."""
    folder = folder_of(module)
    if folder == "core":
        return []
    allowed = {"lens_lora.core", *(f"lens_lora.{door}" for door in DOORS.get(folder, ()))}
    of_the_core = {name for name in package.imports[module] if is_within(name, "lens_lora.core")}
    return sorted(of_the_core - allowed)


def test_nothing_of_the_core_is_taken_from_behind_its_door():
    assert findings(past_the_door) == {}


def test_a_planted_import_past_the_door_is_seen(tmp_path: Path):
    """Negative control: a question that takes a function of the core from its own file."""
    source = "def f():\n    from lens_lora.core.reverse import site_slopes"
    package = planted(tmp_path, core__reverse="", path__rules=source)
    found = past_the_door(package, "lens_lora.path.rules")
    assert found == ["lens_lora.core.reverse"]


STUBS_OF_DOORS = sorted(LENS_LORA.folder.rglob("__init__.pyi"))


@pytest.mark.parametrize("stub", STUBS_OF_DOORS, ids=lambda path: path.parent.name)
def test_no_name_of_a_door_is_a_module_behind_it(stub: Path):
    """Once that module is imported, Python puts it where the door's name is looked for."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(stub.read_text(encoding="utf-8"))):
        # `from . import x` is left out: there the module x is meant.
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names.update(alias.asname or alias.name for alias in node.names)
    # A path without a suffix is a folder.
    modules = {path.stem for path in stub.parent.iterdir() if path.suffix in ("", ".py")}
    assert not names & modules


# --- what one question takes from another


def inside_of_another_question(package: Package, module: str) -> list[str]:
    """What a question imports of another question that is no public name of the package."""
    folder = folder_of(module)
    if folder not in QUESTIONS:
        return []
    others = [f"lens_lora.{other}" for other in QUESTIONS - {folder}]
    public = {name.rpartition(".")[2] for name in public_names()}
    source = package.files[module].read_text(encoding="utf-8")
    found: list[str] = []
    for name in sorted(named_in(source, module.rpartition(".")[0])):
        is_public = name.rpartition(".")[2] in public
        if is_within(name, *others) and not is_public:
            found.append(name)
    return found


def test_a_question_uses_another_by_its_public_names():
    """`explanations` stands above the questions, as it puts all of them on one page."""
    assert findings(inside_of_another_question) == {}


def test_a_planted_inside_of_another_question_is_seen(tmp_path: Path):
    """Negative control: a helper of judging is seen, a public function of it is not."""
    source = (
        "from lens_lora.judging.compare import compare\n"
        "def f():\n    from lens_lora.judging.compare import _ranks"
    )
    package = planted(tmp_path, judging__compare="", path__rules=source)
    found = inside_of_another_question(package, "lens_lora.path.rules")
    assert found == ["lens_lora.judging.compare._ranks"]


# --- what draws


def results_named(source: str) -> list[str]:
    """The classes of results that this source takes from the core."""
    found: list[str] = []
    for name in sorted(named_in(source, "lens_lora.show")):
        module, _, last = name.rpartition(".")
        if module != "lens_lora.core":
            continue
        taken = getattr(lens_lora.core, last)
        if isinstance(taken, type) and issubclass(taken, lens_lora.core.Result):
            found.append(last)
    return found


def test_what_figures_are_made_of_knows_no_result_by_name():
    """A folder draws its own results; those of the core are drawn in `views`."""
    for path in sorted((LENS_LORA.folder / "show").glob("*.py")):
        assert results_named(path.read_text(encoding="utf-8")) == [], path.name


def test_a_result_that_is_named_among_the_primitives_is_seen():
    """Negative control."""
    assert results_named("from lens_lora.core import Attribution, Site") == ["Attribution"]
