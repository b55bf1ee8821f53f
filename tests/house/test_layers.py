"""Imports point one way, and nothing heavy is imported early."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from imports import COMPUTED, Package, named_in

import lens_lora.core

TESTS = Path(__file__).parents[1]
LENS_LORA = Package(TESTS.parent / "lens_lora")
QUESTIONS = {
    *("path", "relevance", "curvature", "shifts", "hidden", "edge_attribution", "directions"),
    *("audit", "two_adapters", "judging", "interaction", "banks", "sweeps", "ship"),
}
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
    {"results"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Where names that are computed are imported: those of `results.pyi`, and those that are registered.
IMPORTERS = {"lens_lora.results", "lens_lora.core.extensions", "lens_lora.runs.shards"}
# What still points upward, from a module to a folder. It gets shorter; nothing is added to it.
UPWARD: set[tuple[str, str]] = set()


def layer(module: str) -> str:
    """`core` of `lens_lora.core.function.reverse`; `lens_lora` itself is nearly above all.

    `lens_lora` and `lens_lora.results` import each of their names at its first use.
    """
    _, *parts = module.split(".")
    return parts[0] if parts else "__init__"


def upward(package: Package, module: str) -> list[str]:
    """What this module imports from a higher layer, and imports whose target cannot be read."""
    own = LEVEL[layer(module)]
    found = []
    for name in sorted(package.imports[module]):
        level = LEVEL["__init__"] if name == COMPUTED else LEVEL[layer(name)]
        is_by_name = name == COMPUTED and module in IMPORTERS
        if level > own and not is_left(module, name) and not is_by_name:
            found.append(name)
    return found


def is_left(module: str, name: str) -> bool:
    """Whether this import is among those that are still to be turned."""
    return (module.partition(".")[2], layer(name)) in UPWARD


def test_imports_point_downward():
    """A file imports from its own layer or from one below it, wherever the import stands.

    A computed name counts as the whole package: only `__init__`, commands and cli may have one.
    """
    assert len(LENS_LORA.files) > 50
    assert {layer(module) for module in LENS_LORA.files} <= {*LEVEL}
    assert {m: names for m in LENS_LORA.files if (names := upward(LENS_LORA, m))} == {}


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
    "__init__": {"core.extensions"},
}


def past_the_door(package: Package, module: str) -> list[str]:
    """What this module imports of the core from behind its door."""
    folder = layer(module)
    if folder == "core":
        return []
    allowed = {"lens_lora.core", *(f"lens_lora.{door}" for door in DOORS.get(folder, ()))}
    of_the_core = {n for n in package.imports[module] if f"{n}.".startswith("lens_lora.core.")}
    return sorted(of_the_core - allowed)


def test_nothing_of_the_core_is_taken_from_behind_its_door():
    found = {m: names for m in LENS_LORA.files if (names := past_the_door(LENS_LORA, m))}
    assert found == {}


def test_a_planted_import_past_the_door_is_seen(tmp_path: Path):
    """Negative control: a question that takes a function of the core from its own file."""
    source = "def f():\n    from lens_lora.core.reverse import site_slopes"
    package = planted(tmp_path, core__reverse="", path__rules=source)
    found = past_the_door(package, "lens_lora.path.rules")
    assert found == ["lens_lora.core.reverse"]


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


# --- what tests import

# Folders whose files may know how everything is made: what tests share, and these rules.
KNOW_ALL = {"lib", "house"}
# What a folder of tests is the folder of, where that is more than the package's of its name.
OWN = {
    "cli": ("lens_lora.cli", "lens_lora.__main__"),
    "demonstration": ("lens_lora.demonstration", "lens_lora.loading"),
    # What figures and tables are made of is seen on results of the core.
    "show": ("lens_lora.show", "lens_lora.views"),
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


def listed_in(stub: Path) -> set[str]:
    """The names that a stub gives to the module beside it."""
    nodes = ast.walk(ast.parse(stub.read_text(encoding="utf-8")))
    aliases = [a for node in nodes if isinstance(node, ast.ImportFrom) for a in node.names]
    return {alias.asname or alias.name for alias in aliases}


def public_names() -> set[str]:
    """All that a test may import from any folder: public names, and the command line."""
    found = {"lens_lora.cli", "lens_lora.cli.app", *STUBS, *WHOLE}
    for module, stub in STUBS.items():
        found.update(f"{module}.{name}" for name in listed_in(LENS_LORA.folder / stub))
    return found


def free_to_import() -> frozenset[str]:
    """What any test may import: the public names."""
    return frozenset(public_names())


# What still comes from another folder's inside: of each test file, the names, and why.
# It gets shorter; nothing is added to it.
BORROWED: dict[str, tuple[set[str], str]] = {
    "audit/test_brief.py": (
        {"texts.neutral.own_openings"},
        "makes the texts that a brief asks of a model by itself",
    ),
    "audit/test_what_changed.py": (
        {"texts.neutral", "texts.neutral.own_openings", "stream.stream_reading.over_scale"},
        "asks the same texts by hand, and scales a reading as the audit does",
    ),
    "cli/test_cli.py": (
        {
            "_version.versions",
            "demonstration.embedded.LYON_SENTENCES",
            "demonstration.embedded.train_adapter",
        },
        "puts a fake in the place of training, which takes minutes",
    ),
    "core/adapter/test_formats.py": (
        {
            "formats.folders.checkpoint_folders",
            "formats.folders.folders_in",
            "formats.folders.last_checkpoint",
            "formats.folders.stated_base",
        },
        "sees that all who read folders know a registered format",
    ),
    "core/function/test_planned.py": (
        {"hosts.planned_analyses.planned_analyses", "hosts.unloaded.unloaded"},
        "compares footprints with the plan for a model that is not loaded, which hosts/ makes",
    ),
    "explanations/test_explain_page.py": (
        {"show.page", "show.text.label"},
        "plants a template that escapes nothing",
    ),
    "hosts/test_experts.py": (
        {"directions.spectra.summarise"},
        "compares the singular values of each expert",
    ),
    "ship/test_exports.py": (
        {"loading.tokenizer_beside"},
        "checks one merged folder without all else that `verify` checks",
    ),
    "ship/test_forms.py": (
        {"formats.gguf_quantised.rounded_to_q4_k", "formats.gguf_quantised.type_of_rows"},
        "compares them with llama.cpp's own library, which only ship/ drives",
    ),
    "ship/test_gguf.py": (
        {"formats.gguf_layout.rounding_to"},
        "compares it with llama.cpp's own library, which only ship/ drives",
    ),
}


def is_within(name: str, *modules: str) -> bool:
    """Whether a dotted name is one of these modules, or is found in one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def patched_in(source: str) -> set[str]:
    """The dotted names that a file patches by their text: `patch.setattr("a.b.name", 1)`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr") and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                found.add(first.value)
    return found


def internals(folder: str, source: str, allowed: frozenset[str]) -> list[str]:
    """What a test in this folder of tests imports, or patches, of another folder's internals."""
    own = OWN.get(folder, (f"lens_lora.{folder}",))
    every_name = named_in(source, "tests") | patched_in(source)
    names = {name for name in every_name if is_within(name, "lens_lora")}
    return sorted(name for name in names - allowed if not is_within(name, *own, *WHOLE))


def test_a_test_imports_public_names_or_internals_of_its_own_folder():
    """But for what is listed above, all of which is still needed."""
    allowed = free_to_import()
    found: dict[str, set[str]] = {}
    for path in sorted(TESTS.rglob("*.py")):
        place = path.relative_to(TESTS)
        folder = place.parts[0]
        if folder in KNOW_ALL:
            continue
        names = internals(folder, path.read_text(encoding="utf-8"), allowed)
        if names:
            found[place.as_posix()] = {name.removeprefix("lens_lora.") for name in names}
    assert found == {file: names for file, (names, _) in BORROWED.items()}


@pytest.mark.parametrize(
    "source",
    [
        "from lens_lora.path.rules import _weights",
        "def f():\n    from lens_lora.path import _weights",
        "import lens_lora.path.rules",
        "from importlib import import_module\nimport_module('lens_lora.path.rules')",
        "def f(patch):\n    patch.setattr('lens_lora.path.rules._weights', 1)",
        "from lens_lora.core import reverse",
        "from lens_lora.core.function.reverse import site_slopes",
    ],
)
def test_a_planted_import_of_another_folder_s_internals_is_seen(source: str):
    """Negative control, in each form; the folder's own test may have it."""
    allowed = free_to_import()
    owner = "core" if "core" in source else "path"
    assert len(internals("curvature", source, allowed)) == 1
    assert internals(owner, source, allowed) == []
    public = "from lens_lora import LoraLens\nfrom lens_lora.errors import AdapterError"
    assert internals("curvature", public, allowed) == []


# --- circles, and what is seen of all this


def inside_of_another_question(package: Package, module: str) -> list[str]:
    """What a question imports of another question that is no public name of the package."""
    folder = layer(module)
    if folder not in QUESTIONS:
        return []
    others = [f"lens_lora.{other}" for other in QUESTIONS - {folder}]
    public = {name.rpartition(".")[2] for name in public_names()}
    source = package.files[module].read_text(encoding="utf-8")
    return [
        name
        for name in sorted(named_in(source, module.rpartition(".")[0]))
        if is_within(name, *others) and name.rpartition(".")[2] not in public
    ]


def test_a_question_uses_another_by_its_public_names():
    """`explanations` stands above the questions, as it puts all of them on one page."""
    found: dict[str, list[str]] = {}
    for module in LENS_LORA.files:
        names = inside_of_another_question(LENS_LORA, module)
        if names:
            found[module] = names
    assert found == {}


def test_a_planted_inside_of_another_question_is_seen(tmp_path: Path):
    """Negative control: a helper of judging is seen, a public function of it is not."""
    source = (
        "from lens_lora.judging.compare import compare\n"
        "def f():\n    from lens_lora.judging.compare import _ranks"
    )
    package = planted(tmp_path, judging__compare="", path__rules=source)
    found = inside_of_another_question(package, "lens_lora.path.rules")
    assert found == ["lens_lora.judging.compare._ranks"]


# A file by which its folder registers, or is given, something: the page's last sentence says how.
_REGISTERING = {"__init__.py", "extensions.py", "provided.py"}


def on_the_page(page: str) -> list[str]:
    """The files that the core's page names; one without a folder is in that of the one before."""
    names: list[str] = []
    folder = ""
    for line in page.splitlines():
        if not line.startswith("    "):
            continue
        for own_folder, name in re.findall(r"(?:(\w+)/)?(\w+\.py)\b", line):
            folder = own_folder or folder
            names.append(f"{folder}/{name}")
    return names


def test_the_cores_page_names_each_file_of_the_core_once():
    """It says in which order the core is read, so it leaves out no file and invents none."""
    core = LENS_LORA.folder / "core"
    page = ast.get_docstring(ast.parse((core / "__init__.py").read_text(encoding="utf-8")))
    assert page is not None
    files = [path for path in core.rglob("*.py") if path.name not in _REGISTERING]
    there = sorted(path.relative_to(core).as_posix() for path in files)
    assert sorted(on_the_page(page)) == there


def test_a_planted_file_of_the_page_is_seen():
    """Negative control: a file in its own folder, one in the folder before it, and prose."""
    page = "See a/x.py.\n\n    b/one.py, two.py\n    c/three.py  which may wait"
    assert on_the_page(page) == ["b/one.py", "b/two.py", "c/three.py"]


def test_no_circles():
    """The door left out: show reads results, and results are drawn by show."""
    assert LENS_LORA.circles(but=is_left) == []


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
PLACES = {
    "top": "{}",
    "function": "def f():\n    {}",
    "method": "class A:\n    def f(self):\n        {}",
    "TYPE_CHECKING": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {}",
    "try": "try:\n    {}\nexcept ImportError:\n    pass",
}


def planted(folder: Path, **sources: str) -> Package:
    """A package of this name, with these sources; `core__reverse` is core/reverse.py."""
    for name, source in {"show__text": "", **sources}.items():
        path = folder / "lens_lora" / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder_of_it in path.relative_to(folder / "lens_lora").parents:
            (folder / "lens_lora" / folder_of_it / "__init__.py").touch()
        path.write_text(source, encoding="utf-8")
    (folder / "lens_lora" / "__init__.py").touch()
    return Package(folder / "lens_lora")


def at(place: str, form: str) -> str:
    """The source with this form of import at this place."""
    *before, last = PLACES[place].partition("{}")[0].splitlines() or [""]
    indent = " " * (len(last) - len(last.lstrip()))
    return PLACES[place].format(FORMS[form].replace("\n", "\n" + indent))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", FORMS)
def test_a_planted_import_is_seen(form: str, place: str, tmp_path: Path):
    """Negative control: core → show in every form and at every place."""
    package = planted(tmp_path, core__reverse=at(place, form))
    assert upward(package, "lens_lora.core.reverse") == ["lens_lora.show.text"]


def test_a_computed_name_is_seen(tmp_path: Path):
    """Negative control: what cannot be read may be anything."""
    source = "import importlib\nimportlib.import_module(name)"
    package = planted(tmp_path, core__reverse=source, cli__explain=source)
    assert upward(package, "lens_lora.core.reverse") == [COMPUTED]
    assert upward(package, "lens_lora.cli.explain") == []


def test_a_circle_through_what_is_left_is_none(monkeypatch, tmp_path: Path):
    monkeypatch.setitem(globals(), "UPWARD", {("core.a", "show")})
    package = planted(
        tmp_path,
        core__a="def f():\n    from lens_lora.show import text",
        core__b="from lens_lora.core import a",
        show__text="from lens_lora.core.b import Effects",
    )
    assert package.circles(but=is_left) == []
    assert len(package.circles()) == 1


def test_what_is_left_is_of_one_file_and_one_folder(monkeypatch, tmp_path: Path):
    """A file that may still import one folder from above may import nothing else from there."""
    monkeypatch.setitem(globals(), "UPWARD", {("core.a", "show")})
    source = "def f():\n    import lens_lora.show.text\n    import lens_lora.cli"
    package = planted(tmp_path, core__a=source, core__b=source, cli="")
    assert upward(package, "lens_lora.core.a") == ["lens_lora.cli"]
    assert upward(package, "lens_lora.core.b") == ["lens_lora.cli", "lens_lora.show.text"]


def test_a_planted_circle_is_seen(tmp_path: Path):
    """Negative control: a → b at the top, b → c in a function, c → a under TYPE_CHECKING."""
    package = planted(
        tmp_path,
        core__a="from lens_lora.core import b",
        core__b="def f():\n    from . import c",
        core__c="if TYPE_CHECKING:\n    from lens_lora.core.a import A",
        core__d="import lens_lora.core.a",
    )
    assert package.circles(but=is_left) == [{f"lens_lora.core.{name}" for name in "abc"}]


def imported_names(source: str) -> set[str]:
    """The last part of every module that a file imports, or imports from."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found.update([*(node.module or "").split("."), *(a.name for a in node.names)])
        elif isinstance(node, ast.Import):
            found.update(part for alias in node.names for part in alias.name.split("."))
    return found


TEST_MODULES = {path.stem for path in TESTS.rglob("test_*.py")}


@pytest.mark.slow
def test_no_test_module_is_imported():
    """What tests share stands in tests/lib, or beside them where one folder alone uses it."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in TESTS.rglob("*.py")}
    names = {name: imported_names(text) & TEST_MODULES for name, text in texts.items()}
    assert {name: imported for name, imported in names.items() if imported} == {}


def test_an_imported_test_module_is_seen():
    """Negative control, in each form."""
    for source in ("import test_path", "from test_path import f", "from . import test_path"):
        assert imported_names(f"def f():\n    {source}") & {"test_path"}


def test_import_works_without_hooked_transformer():
    """`import lens_lora` needs neither HookedTransformer nor a GPU, and loads no transformers."""
    code = (
        "import sys, lens_lora; "
        "assert 'transformers' not in sys.modules, 'transformers'; "
        "assert 'transformer_lens' not in sys.modules, 'transformer_lens'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "door", sorted((TESTS.parent / "lens_lora").rglob("__init__.pyi")), ids=lambda p: p.parent.name
)
def test_no_name_of_a_door_is_a_module_behind_it(door: Path):
    """Once that module is imported, Python puts it where the door's name is looked for."""
    names = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(door.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }
    modules = {path.stem for path in door.parent.iterdir() if path.suffix in ("", ".py")}
    assert not names & modules
