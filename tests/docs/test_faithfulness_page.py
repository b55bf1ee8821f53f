"""docs/faithfulness.md is what the numbers render to."""

from __future__ import annotations

import evidence
import pytest

page, results = (evidence.load(name) for name in ("page", "results"))


@pytest.fixture(scope="module")
def numbers():
    return results.read()


def test_the_page_is_what_the_numbers_render_to(numbers):
    """Written by benchmarks/evidence/page.py, never by hand."""
    assert results.PAGE.read_text() == page.page(numbers)


def test_adapters_differ_as_the_page_says(numbers):
    adapters = numbers["adapters"].values()
    assert len({one["cluster"] for one in adapters}) >= 5
    assert {one["kind"] for one in adapters} == {"fact", "behaviour"}
    assert any(one["dora"] for one in adapters)
    assert any(one["rslora"] for one in adapters)
    for one in adapters:
        assert set(one["ends"]) == {"trained", "paraphrase", "neighbour", "unrelated"}


def test_pictures_of_the_page_are_there():
    assert page.PARETO.is_file()
    assert page.STRENGTH.is_file()
