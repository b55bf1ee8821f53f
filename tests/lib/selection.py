"""Which tests a run has: the quick suite, what it leaves out, or the whole.

The quick suite (README's test command, `pytest` without a word) leaves out what is marked

- `slow`: takes seconds, and guards something rare;
- `exhaustive`: runs every member of a family of which the quick suite runs some;
- `browser`: opens pages in a browser;
- `night`: takes many seconds for what it guards, so that `.ci/run` leaves it to the night as well;

and of a test that is marked `sample(n)` it runs n items, drawn by the test's name: tests of one
product (sixteen families × two classes × two processings, say) draw different items, and together
they meet every member. The items that `tests/defects.md` names are always among them.

`--rest` runs what the quick suite leaves out, `--whole` both. `--line` is for a second line of
transformer-lens: the quick suite, and everything that a line may change, which is what
tests/core/model and tests/hosts say of models, and what only some lines can run. A test that is
named on the command line by its `::` runs whatever its marks.

`.ci/run` is to end within 25 minutes. Of a test of several items, such as one of every
architecture, it runs every sixth item of what the quick suite leaves out (`--rest --thinned`), and
on another line of transformer-lens every sixth as well, also of the quick suite's own (`--line`).
At night every line runs all of them.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from functools import cache
from math import ceil
from pathlib import Path

import pytest

NIGHT = "night"
LEFT_OUT = ("slow", "exhaustive", "browser", NIGHT)
# A test of so many items is a product (architectures, targets, settings), of which `.ci/run` need
# not run every item each time.
SEVERAL_ITEMS = 4
# Of such a test it runs one item in six, and at least one.
ONE_IN = 6
# The node ids of everything that was collected, before any of it was left out.
COLLECTED = pytest.StashKey[frozenset[str]]()
DEFECTS = Path(__file__).parents[1] / "defects.md"


@cache
def _text_of_defects() -> str:
    return DEFECTS.read_text(encoding="utf-8") if DEFECTS.exists() else ""


def guards_a_defect(nodeid: str) -> bool:
    """Whether the table of mended defects names this very item."""
    return nodeid.removeprefix("tests/") in _text_of_defects()


def name_in_file(nodeid: str) -> str:
    """`test_path.py::test_it[case]`, so that what is drawn does not move with the file."""
    file, separator, name = nodeid.partition("::")
    return f"{file.rpartition('/')[2]}{separator}{name}"


def draw(nodeids: list[str], count: int) -> set[str]:
    """So many of a test's items, one out of each of `count` stretches of equal length.

    Where a stretch is begun depends on the test's name alone, so that runs are repeatable and
    different tests of one family draw different members of it.
    """
    if len(nodeids) <= count:
        return set(nodeids)
    test_name = name_in_file(nodeids[0]).partition("[")[0]
    stretch = len(nodeids) / count
    offset = zlib.crc32(test_name.encode()) / 2**32 * stretch
    return {nodeids[int(offset + index * stretch)] for index in range(count)}


def _left_out_of_samples(items: list[pytest.Item]) -> set[pytest.Item]:
    items_of_test = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        if item.get_closest_marker("sample") is not None:
            items_of_test[item.nodeid.partition("[")[0]].append(item)
    left_out: set[pytest.Item] = set()
    for sampled in items_of_test.values():
        marker = sampled[0].get_closest_marker("sample")
        drawn = draw([item.nodeid for item in sampled], *marker.args)
        left_out |= {
            item
            for item in sampled
            if item.nodeid not in drawn and not guards_a_defect(item.nodeid)
        }
    return left_out


def left_out_of_the_quick_suite(items: list[pytest.Item]) -> set[pytest.Item]:
    """What is marked as too slow for it, and what no sample has drawn."""
    marked = {
        item
        for item in items
        if any(item.get_closest_marker(mark) is not None for mark in LEFT_OUT)
    }
    return marked | _left_out_of_samples(items)


def deselected(config: pytest.Config, items: list[pytest.Item]) -> set[pytest.Item]:
    """The tests that this run leaves out, by its options."""
    if config.option.whole:
        return set()
    left_out = left_out_of_the_quick_suite(items)
    if config.option.rest:
        rest = [item for item in items if item in left_out]
        left_out = set(items) - (_thinned(rest) if config.option.thinned else set(rest))
    if config.option.line:
        of_the_line = [i for i in items if i not in left_out or _depends_on_the_line(i)]
        left_out = set(items) - _thinned(of_the_line)
    named = tuple(argument for argument in config.args if "::" in argument)
    return {item for item in left_out if not _is_named(item, config.rootpath, named)}


def _thinned(items: list[pytest.Item]) -> set[pytest.Item]:
    """Of a test of several items one in so many, of every other test all; nothing of the night."""
    items_of_test = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        if item.get_closest_marker(NIGHT) is None:
            items_of_test[item.nodeid.partition("[")[0]].append(item)
    drawn: set[pytest.Item] = set()
    for of_test in items_of_test.values():
        step = ONE_IN if len(of_test) >= SEVERAL_ITEMS else 1
        nodeids = draw([item.nodeid for item in of_test], ceil(len(of_test) / step))
        drawn |= {
            item for item in of_test if item.nodeid in nodeids or guards_a_defect(item.nodeid)
        }
    return drawn


def is_of_models(item: pytest.Item) -> bool:
    """Whether it tests the meeting of an adapter with a hooked model, which a line may change."""
    return item.nodeid.startswith(("tests/core/model/", "tests/hosts/"))


def _depends_on_the_line(item: pytest.Item) -> bool:
    return is_of_models(item) or item.get_closest_marker("of_some_lines") is not None


def _is_named(item: pytest.Item, root: Path, arguments: tuple[str, ...]) -> bool:
    """Whether one of these arguments, each with a `::`, names the item, its test or its class."""
    for argument in arguments:
        file, _, name = argument.partition("::")
        named = f"{(Path.cwd() / file).relative_to(root)}::{name}"
        if item.nodeid == named or item.nodeid.startswith((f"{named}[", f"{named}::")):
            return True
    return False


def said(config: pytest.Config) -> str:
    """Why `deselected` leaves them out."""
    if config.option.rest:
        others = ", or left to the night: five of six items of a test"
        return f"in the quick suite{others if config.option.thinned else ''}"
    return "slow, exhaustive, in a browser, or not drawn of a sample; in .ci/run"
