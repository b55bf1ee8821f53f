"""Every defect that was mended keeps a test in the quick suite, named in `tests/defects.md`."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import selection

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests" / "defects.md"
# Tests so marked are left out of README's test command.
LEFT_OUT = set(selection.LEFT_OUT)


def named_tests(table: str) -> list[str]:
    """The test of each row of the table: its pytest node id."""
    return re.findall(r"^\| .* \| `(tests/\S+::[^`]+)` \|$", table, flags=re.MULTILINE)


def marks_of(node: ast.AST) -> set[str]:
    """The marks that an expression or a decorator applies: `pytest.mark.a`, `models.NEEDS_B`."""
    return {
        part.attr
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute) and ast.unparse(part.value) in ("pytest.mark", "models")
    }


def marked_tests(source: str) -> dict[str, set[str]]:
    """The tests of a module, as a node id names them after the file, each with its marks.

    A mark of a single case, in `pytest.param`, is none of the test, as its other cases run.
    """
    tree = ast.parse(source)
    of_module: set[str] = set()
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            targets = [ast.unparse(target) for target in statement.targets]
            if "pytestmark" in targets:
                of_module |= marks_of(statement.value)
    return dict(_tests_in(tree, "", of_module))


def _tests_in(
    scope: ast.Module | ast.ClassDef, prefix: str, marks: set[str]
) -> Iterator[tuple[str, set[str]]]:
    for item in scope.body:
        if isinstance(item, ast.ClassDef) and item.name.startswith("Test"):
            own = marks.union(*map(_marks_of_decorator, item.decorator_list))
            yield from _tests_in(item, f"{prefix}{item.name}::", own)
        elif isinstance(item, ast.FunctionDef) and item.name.startswith("test_"):
            own = marks.union(*map(_marks_of_decorator, item.decorator_list))
            yield f"{prefix}{item.name}", own


def _marks_of_decorator(decorator: ast.expr) -> set[str]:
    """`pytest.mark.parametrize(...)` is the mark `parametrize` alone, whatever its cases hold."""
    return marks_of(decorator.func if isinstance(decorator, ast.Call) else decorator)


@functools.cache
def marks_in_file(path: Path) -> dict[str, set[str]]:
    return marked_tests(path.read_text())


def faults(table: str) -> list[str]:
    """The named tests that do not exist, or that README's command leaves out."""
    found: list[str] = []
    for node_id in named_tests(table):
        file, _, test = node_id.partition("::")
        path = ROOT / file
        marks = marks_in_file(path).get(test.partition("[")[0]) if path.exists() else None
        if marks is None:
            found.append(f"{node_id}: there is no such test")
        elif marks & LEFT_OUT:
            found.append(f"{node_id}: marked {', '.join(sorted(marks & LEFT_OUT))}")
    return found


def test_every_defect_keeps_a_quick_test():
    table = TABLE.read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    heads = [line for line in rows if line.startswith(("| what was wrong |", "| --- |"))]
    assert len(named_tests(table)) == len(rows) - len(heads) > 500
    assert faults(table) == []


def test_a_test_that_is_gone_or_left_out_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(
        "@pytest.mark.slow\n"
        "def test_long(): ...\n"
        "@pytest.mark.parametrize('n', [1, pytest.param(2, marks=pytest.mark.slow)])\n"
        "def test_short(n): ...\n"
        "@pytest.mark.browser\n"
        "class TestPage:\n"
        "    def test_drawn(self): ...\n"
    )
    (tmp_path / "tests" / "test_all.py").write_text(
        "pytestmark = [pytest.mark.exhaustive]\ndef test_one(): ...\n"
    )
    names = ["some.py::test_long", "some.py::test_short[1]", "some.py::TestPage::test_drawn"]
    names += ["some.py::test_gone", "all.py::test_one", "none.py::test_one"]
    table = "".join(f"| It was wrong. | `tests/test_{name}` |\n" for name in names)
    assert faults(table) == [
        "tests/test_some.py::test_long: marked slow",
        "tests/test_some.py::TestPage::test_drawn: marked browser",
        "tests/test_some.py::test_gone: there is no such test",
        "tests/test_all.py::test_one: marked exhaustive",
        "tests/test_none.py::test_one: there is no such test",
    ]


def test_every_named_case_is_collected(pytestconfig: pytest.Config):
    """Cases in brackets are known by collecting alone; every named test has one that is run.

    Of the files that this run has collected. But for those that need another line of
    transformer-lens, where `.ci/run` has them.
    """
    if any("::" in argument for argument in pytestconfig.args):
        pytest.skip("of a file that is named with one of its tests, no others are collected")
    cases = pytestconfig.stash[selection.COLLECTED]
    files = {case.partition("::")[0] for case in cases}
    whole = {case.partition("[")[0] for case in cases}
    names = {name for name in named_tests(TABLE.read_text()) if name.partition("::")[0] in files}
    assert {name for name in names - cases - whole if not _needs_a_line(name)} == set()


def _needs_a_line(node_id: str) -> bool:
    file, _, test = node_id.partition("::")
    marks = marks_in_file(ROOT / file)[test.partition("[")[0]]
    return any(mark.startswith("NEEDS_") or mark == "of_some_lines" for mark in marks)
