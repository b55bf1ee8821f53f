"""Which tests a run has: `tests/lib/selection.py` and `tests/lib/either_class.py`."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import either_class
import pytest
import selection


class Item:
    """As much of a test as the selection looks at."""

    def __init__(self, nodeid: str, **marks: tuple[int, ...]) -> None:
        self.nodeid = nodeid
        self.marks = marks

    def get_closest_marker(self, name: str) -> SimpleNamespace | None:
        return SimpleNamespace(args=self.marks[name]) if name in self.marks else None


def config(
    *arguments: str,
    whole: bool = False,
    rest: bool = False,
    thinned: bool = False,
    line: bool = False,
) -> SimpleNamespace:
    options = SimpleNamespace(whole=whole, rest=rest, thinned=thinned, line=line)
    return SimpleNamespace(args=arguments, option=options, rootpath=Path.cwd())


SAMPLED = [Item(f"tests/test_a.py::test_of_all[{i}]", sample=(3,)) for i in range(16)]
MARKED = [Item(f"tests/test_a.py::test_{mark}", **{mark: ()}) for mark in selection.LEFT_OUT]
PLAIN = [Item("tests/test_a.py::test_plain")]
ITEMS = [*SAMPLED, *MARKED, *PLAIN]


def run_by(options: SimpleNamespace) -> set[Item]:
    return set(ITEMS) - selection.deselected(options, ITEMS)


def test_the_quick_suite_has_neither_what_is_marked_nor_more_than_a_sample():
    quick = run_by(config())
    assert set(PLAIN) <= quick
    assert not quick & set(MARKED)
    assert len(quick & set(SAMPLED)) == 3


def test_the_quick_suite_and_the_rest_are_the_whole():
    quick = run_by(config())
    rest = run_by(config(rest=True))
    whole = run_by(config(whole=True))
    assert quick | rest == whole == set(ITEMS)
    assert not quick & rest


def test_a_test_that_is_named_runs_whatever_its_marks():
    quick = run_by(config())
    slow = MARKED[0]
    assert slow not in quick
    assert run_by(config("tests/test_a.py::test_slow")) == quick | {slow}
    assert run_by(config("tests/test_a.py::test_of_all")) == quick | set(SAMPLED)
    assert run_by(config("tests/test_a.py::test_of_all[1]")) == quick | {SAMPLED[1]}
    assert run_by(config("tests/test_a.py")) == quick


def test_a_second_line_has_the_quick_suite_and_all_that_a_line_changes():
    of_models = Item("tests/core/model/test_b.py::test_slow", slow=())
    of_this_line = Item("tests/test_a.py::test_new", exhaustive=(), of_some_lines=(True,))
    items = [*ITEMS, of_models, of_this_line]
    found = set(items) - selection.deselected(config(line=True), items)
    assert found == run_by(config()) | {of_models, of_this_line}


def test_what_is_marked_for_the_night_is_in_no_run_of_one_commit():
    of_models = Item("tests/core/model/test_b.py::test_of_models", night=())
    items = [*ITEMS, of_models]
    of_the_night = {item for item in items if selection.NIGHT in item.marks}
    assert len(of_the_night) == 2
    for options in (config(), config(rest=True, thinned=True), config(line=True)):
        assert of_the_night <= selection.deselected(options, items)
    for options in (config(rest=True), config(whole=True)):
        assert not of_the_night & selection.deselected(options, items)


def widest_gap(product: list[Item], found: set[Item]) -> int:
    """The most items between one that runs and the next, plus one."""
    places = [place for place, item in enumerate(product) if item in found]
    return max(after - before for before, after in itertools.pairwise(places))


@pytest.mark.parametrize(
    ("options", "marks", "step"),
    [
        (config(rest=True), {"exhaustive": ()}, 1),
        (config(rest=True, thinned=True), {"exhaustive": ()}, 6),
        (config(line=True), {"exhaustive": ()}, 6),
        (config(line=True), {}, 6),
    ],
    ids=["rest", "rest thinned", "rest on a line", "quick on a line"],
)
def test_of_a_test_of_several_items_one_in_so_many_runs(
    options: SimpleNamespace, marks: dict[str, tuple], step: int
):
    product = [Item(f"tests/hosts/test_b.py::test_of_all[{i}]", **marks) for i in range(42)]
    few = [Item(f"tests/hosts/test_b.py::test_of_few[{i}]", **marks) for i in range(3)]
    items = [*product, *few]
    found = set(items) - selection.deselected(options, items)
    assert set(few) <= found
    assert len(found & set(product)) == 42 / step
    assert widest_gap(product, found) == step


def test_a_case_that_guards_a_defect_is_always_drawn(monkeypatch: pytest.MonkeyPatch):
    left_out = next(item for item in SAMPLED if item not in run_by(config()))
    monkeypatch.setattr(selection, "_text_of_defects", lambda: f"| wrong | `{left_out.nodeid}` |")
    assert left_out in run_by(config())


@pytest.mark.parametrize(("cases", "count"), [(5, 5), (5, 9), (33, 8), (262, 32), (16, 1)])
def test_a_draw_is_repeatable_and_spread_over_all_cases(cases: int, count: int):
    nodeids = [f"tests/test_a.py::test_of_all[{i}]" for i in range(cases)]
    drawn = selection.draw(nodeids, count)
    assert drawn == selection.draw(nodeids, count) <= set(nodeids)
    assert len(drawn) == min(cases, count)
    places = [nodeids.index(nodeid) for nodeid in sorted(drawn, key=nodeids.index)]
    gaps = [after - before for before, after in zip(places, places[1:], strict=False)]
    assert max(gaps, default=0) <= -(-cases // count) + 1


def test_different_tests_of_one_family_draw_different_members():
    """Together 16 tests of one item each meet at least half of 16 members."""
    drawn = set()
    for test in range(16):
        nodeids = [f"tests/test_a.py::test_{test}[{member}]" for member in range(16)]
        (one,) = selection.draw(nodeids, 1)
        drawn.add(one.partition("[")[2])
    assert len(drawn) >= 8


# --- On which class of hooked model: `tests/lib/either_class.py`


def twins(test: str, **marks: tuple[int, ...]) -> list[Item]:
    """The items of a test, one for each class of hooked model."""
    return [Item(f"tests/test_a.py::{test}[{cls}]", **marks) for cls in either_class.CLASSES]


TWINS = [item for i in range(16) for item in twins(f"test_{i}")]


def of_class(cls: str) -> list[Item]:
    return [item for item in TWINS if either_class.class_of(item.nodeid) == cls]


def test_where_both_classes_exist_one_of_twins_runs():
    left_out = either_class.run_on_another_class(TWINS, both_exist=True)
    for first, second in zip(TWINS[::2], TWINS[1::2], strict=True):
        assert (first in left_out) != (second in left_out)
    for cls in either_class.CLASSES:
        assert not left_out.issuperset(of_class(cls))


def test_the_lines_together_run_every_item_once():
    """One line has both classes, and each of the others has one."""
    left_out = either_class.run_on_another_class(TWINS, both_exist=True)
    run = [item for item in TWINS if item not in left_out]
    for cls in either_class.CLASSES:
        of_line = of_class(cls)
        left_out = either_class.run_on_another_class(of_line, both_exist=False)
        run += [item for item in of_line if item not in left_out]
    assert len(run) == len(TWINS)
    assert set(run) == set(TWINS)


def test_what_has_no_twin_is_left_to_no_other_class():
    alone = Item("tests/test_a.py::test_it[TransformerBridge]")
    of_no_class = Item("tests/test_a.py::test_it[gpt2]")
    items = [alone, of_no_class]
    assert either_class.run_on_another_class(items, both_exist=True) == set()


@pytest.mark.parametrize("mark", ["skipif", "of_some_lines"])
@pytest.mark.parametrize("both_exist", [True, False])
def test_twins_of_which_a_line_may_skip_one_both_run(mark: str, both_exist: bool):
    """What is drawn may be what is skipped."""
    for i in range(16):
        items = twins(f"test_{i}", **{mark: (False,)})
        assert either_class.run_on_another_class(items, both_exist=both_exist) == set()


@pytest.mark.parametrize("both_exist", [True, False])
def test_an_item_that_guards_a_defect_runs_on_each_line(
    monkeypatch: pytest.MonkeyPatch, both_exist: bool
):
    table = "".join(f"| wrong | `{item.nodeid}` |\n" for item in TWINS)
    monkeypatch.setattr(selection, "_text_of_defects", lambda: table)
    assert either_class.run_on_another_class(TWINS, both_exist=both_exist) == set()
