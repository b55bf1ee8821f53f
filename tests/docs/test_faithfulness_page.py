"""docs/faithfulness.md is what its numbers render to."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faithfulness_page.py"


def _load():
    spec = importlib.util.spec_from_file_location("faithfulness_page", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table = _load()


def test_the_page_is_what_the_numbers_render_to():
    """Written by benchmarks/faithfulness.py, never by hand."""
    assert table.PAGE.read_text() == table.page(json.loads(table.NUMBERS.read_text()))


def test_there_are_six_adapters_and_more_of_three_prompts_each():
    rows = json.loads(table.NUMBERS.read_text())["attributions"]
    prompts = {adapter: set() for adapter in {row["adapter"] for row in rows}}
    for row in rows:
        prompts[row["adapter"]].add(row["prompt"])
    assert len(prompts) >= 6
    assert {len(found) for found in prompts.values()} == {3}
