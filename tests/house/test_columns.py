"""One name for one thing: the columns of every result's table are those of docs/columns.md."""

from __future__ import annotations

import re
from pathlib import Path

import by_folder
import pandas as pd
import pytest
from every_result import every_result

from lens_lora.core import Ranked, Result

activations = by_folder.made_public("core").activations
features = by_folder.made_public("hidden").features

PAGE = Path(__file__).parents[2] / "docs" / "columns.md"
SECTION = "## What each column holds"
# Columns of results that are not made by hand in `every_result`, or of an axis that none there has.
ELSEWHERE = {
    *("result", "head", "expert", "rerouted", "asked", "tokens", "ended", "fixed"),
    *("group_a", "group_b"),
}
# One column for each group of an explained response: 'add_one, layer 3'.
BY_GROUP = re.compile(r"(add_one|leave_one_out), .+")


def vocabulary() -> set[str]:
    """The names in the first cells of the page's table."""
    _, _, section = PAGE.read_text(encoding="utf-8").partition(f"{SECTION}\n")
    section, _, _ = section.partition("\n## ")
    names: set[str] = set()
    for line in section.splitlines():
        if line.startswith("| `"):
            cell = line.split("|")[1]
            names |= set(re.findall(r"`(\w+)`", cell))
    return names


def results() -> list[Result]:
    return [*every_result(), activations(by_position=False), features(by_position=False)]


def columns(result) -> set[str]:
    names = {str(name) for name in result.to_frame().columns}
    return {name for name in names if not BY_GROUP.fullmatch(name)}


def each() -> list:
    return [
        pytest.param(result, id=f"{type(result).__name__}-{i}")
        for i, result in enumerate(results())
    ]


@pytest.mark.parametrize("result", each())
def test_every_column_is_in_the_vocabulary(result):
    assert columns(result) <= vocabulary()


@pytest.mark.parametrize("result", each())
def test_a_row_of_a_site_says_where_it_is(result):
    """With `site` come its module, layer and kind, in the table and in the largest entries."""
    frames = [result.to_frame()]
    if isinstance(result, Ranked):
        frames.append(result.top(3, 0))
    for frame in frames:
        assert isinstance(frame, pd.DataFrame)
        if "site" in frame:
            at = list(frame).index("site")
            assert list(frame)[at : at + 4] == ["site", "module", "layer", "kind"]


def test_the_vocabulary_has_no_name_that_no_table_has():
    used = set().union(*(columns(result) for result in results()))
    assert vocabulary() - used <= ELSEWHERE


def test_no_index_holds_what_a_column_should():
    """All labels are columns, so that tables can be put together."""
    for result in results():
        frame = result.to_frame()
        assert list(frame.index) == list(range(len(frame))), type(result).__name__
