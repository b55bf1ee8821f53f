"""What a release promises: one version, tested lower bounds, an entry in the changelog."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import pickle
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lens_lora as ll

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BOUNDED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["demo"]]


def parts(version: str) -> tuple[int, ...]:
    """(2, 16) of '2.16.0': zeros at the end say nothing."""
    return tuple(map(int, re.sub(r"(\.0)+$", "", version).split(".")))


def lower_bound(requirement: Requirement) -> str:
    return next(s.version for s in requirement.specifier if s.operator == ">=")


def oldest() -> dict[str, str]:
    """{package: version} of .ci/oldest.txt."""
    lines = (ROOT / ".ci/oldest.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_version_is_that_of_the_installed_package():
    assert importlib.metadata.version("lens-lora") == ll.__version__
    assert "version" in PROJECT["dynamic"]


def test_the_changelog_begins_with_this_version():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert first[1] == ll.__version__


def test_every_lower_bound_is_what_the_oldest_environment_installs():
    bounds = {r.name: parts(lower_bound(r)) for r in map(Requirement, BOUNDED)}
    installed = {name: parts(version) for name, version in oldest().items()}
    assert {name: installed[name] for name in bounds} == bounds


def test_the_oldest_environment_names_nothing_else():
    assert sorted(oldest()) == sorted(Requirement(text).name for text in BOUNDED)


PACKAGE = ROOT / "lens_lora"


def homes(stub: str) -> dict[str, str]:
    """{name: module} of the imports in lens_lora/__init__.pyi or lens_lora/results.pyi."""
    text = (PACKAGE / f"{stub}.pyi").read_text(encoding="utf-8")
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
    return {
        alias.name: importlib.util.resolve_name("." * node.level + (node.module or ""), "lens_lora")
        for node in imports
        for alias in node.names
    }


def listed() -> list[str]:
    """`__all__` of lens_lora/__init__.pyi."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    (names,) = (node.value for node in tree.body if isinstance(node, ast.Assign))
    return ast.literal_eval(names)


def test_type_checkers_and_python_find_the_same_names():
    beside = {"errors", "results", "__version__"}  # found in lens_lora, and not typed every day
    assert {*listed(), *beside} == set(homes("__init__"))
    assert not beside & set(ll.__all__)
    assert sorted(listed()) == sorted(ll.__all__) == sorted(dir(ll))
    assert sorted(homes("results")) == sorted(dir(ll.results))


def test_public_names_are_what_their_modules_define():
    for name, home in homes("__init__").items():
        module = importlib.import_module(home)
        assert getattr(ll, name) is getattr(module, name), name


# Functions that once stood among the results; there they have their old names still.
FORMER_RESULTS = {"feature_shift", "foils"}


def test_result_classes_are_what_their_modules_define():
    for name, home in homes("results").items():
        module = importlib.import_module(home)
        assert getattr(ll.results, name) is getattr(module, name), name
        if name not in FORMER_RESULTS:
            assert not hasattr(ll, name), f"{name} is a result's class: in lens_lora.results alone"


def test_a_function_that_stood_among_the_results_is_found_under_both_names():
    assert ll.results.feature_shift is ll.feature_shift


def test_errors_are_in_their_module_alone():
    assert issubclass(ll.errors.SiteError, ll.errors.LensLoraError)
    assert not [name for name in dir(ll) if name.endswith("Error")]


def test_public_class_is_pickled():
    assert pickle.loads(pickle.dumps(ll.Margin("a", "b"))).label == ll.Margin("a", "b").label


def test_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(AttributeError, match=r"no attribute 'generate': lens\.generate\("):
        ll.generate  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'explian'; the nearest are explain"):
        ll.explian  # noqa: B018
    with pytest.raises(AttributeError, match=r"'zzzz'; help\(lens_lora\) has"):
        ll.zzzz  # noqa: B018
    assert not hasattr(ll, "__wrapped__")
