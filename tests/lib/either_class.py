"""On which of the two classes of hooked model a test of either is run.

Most tests of a model have an item for each class: `test_it[llama-HookedTransformer-raw]` and
`test_it[llama-TransformerBridge-raw]`. Two such items are twins.

1. Where both classes exist (transformer-lens 3.9), one of twins is run, drawn by their name.
2. Where one class exists (2.18 has HookedTransformer, 4.3 has TransformerBridge), the items of that
   class are run which were not drawn in 1, so that the lines together run every item once.
3. Some items are run on each class everywhere: see `_runs_on_each`.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable

import pytest
import selection

CLASSES = ("HookedTransformer", "TransformerBridge")
# Built, or refused, by transformer-lens 2.18 alone: no other line runs what 2.18 would leave out.
_OF_ONE_LINE = ("phi-HookedTransformer", "mixtral-HookedTransformer-processed")
# The marks of a test that a line of transformer-lens may skip.
_MAY_SKIP = ("skipif", "of_some_lines")


def class_of(nodeid: str) -> str | None:
    """The class of model that an item names; None for one that names none, or both."""
    named = [cls for cls in CLASSES if cls in nodeid]
    return named[0] if len(named) == 1 else None


def run_on_another_class(items: Iterable[pytest.Item], *, both_exist: bool) -> set[pytest.Item]:
    """The items that this run leaves to the other class of model, or to another line.

    Args:
        items: all items that were collected.
        both_exist: whether this line of transformer-lens has both classes.
    """
    twins_by_name = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        cls = class_of(item.nodeid)
        if cls is not None:
            twins_by_name[item.nodeid.replace(cls, "either")].append(item)
    left_out: set[pytest.Item] = set()
    for name, twins in twins_by_name.items():
        if any(_may_be_skipped(item) for item in twins):
            # What is drawn may be what is skipped.
            continue
        if both_exist and len(twins) == 1:
            continue
        drawn = _drawn_class(name)
        for item in twins:
            is_drawn = class_of(item.nodeid) == drawn
            is_run_elsewhere = not is_drawn if both_exist else is_drawn
            if is_run_elsewhere and not _runs_on_each(item.nodeid):
                left_out.add(item)
    return left_out


def _drawn_class(name: str) -> str:
    """The class on which twins are run where both exist, by their name alone."""
    number = zlib.crc32(selection.name_in_file(name).encode())
    return CLASSES[number % len(CLASSES)]


def _may_be_skipped(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(mark) is not None for mark in _MAY_SKIP)


def _runs_on_each(nodeid: str) -> bool:
    """Whether an item is run wherever its class exists."""
    if selection.guards_a_defect(nodeid):
        return True
    return any(part in nodeid for part in _OF_ONE_LINE)
