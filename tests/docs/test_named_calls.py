"""What the docs call on a result, `ll.coupling(…).matrix`, is there."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import lens_lora as ll

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md"]
CALL = re.compile(r"\bll\.((?:results\.)?\w+)\([^`\n]*?\)\.(\w+)")


def classes_in(hint: object) -> list[type]:
    """A class, or those of a union or a tuple."""
    if inspect.isclass(hint):
        return [hint]
    return [held for part in typing.get_args(hint) for held in classes_in(part)]


def lacking(text: str) -> Iterator[str]:
    """The calls whose result has no such name."""
    for call in CALL.finditer(text):
        made = ll
        for part in call[1].split("."):
            made = getattr(made, part)
        is_class = inspect.isclass(made)
        results = [made] if is_class else classes_in(typing.get_type_hints(made).get("return"))
        fields = {name for cls in results for name in getattr(cls, "__dataclass_fields__", {})}
        if not any(hasattr(cls, call[2]) for cls in results) and call[2] not in fields:
            yield call[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_called_on_a_result_is_there(page: Path):
    assert list(lacking(page.read_text(encoding="utf-8"))) == []


def test_a_method_that_is_gone_is_seen():
    text = "`ll.coupling(lens, prompts).matrix`, `ll.coupling(…).estimate(…)`"
    assert list(lacking(text)) == ["ll.coupling(…).estimate"]
    assert sum(len(CALL.findall(page.read_text(encoding="utf-8"))) for page in PAGES) > 10


def test_each_equation_of_the_note_is_in_the_file_that_is_named():
    """`docs/symbols.md` names a function and a file; the first function is defined there."""
    page = (ROOT / "docs" / "symbols.md").read_text(encoding="utf-8")
    table = page.split("## From the note")[1].split("\n## ")[0]
    elsewhere: list[str] = []
    rows = 0
    for row in table.splitlines():
        function = re.search(r"`ll\.(?:results\.)?(\w+)", row)
        files = re.findall(r"`([\w/]+\.py)`", row)
        if function is None or not files:
            continue
        rows += 1
        sources = [(ROOT / "lens_lora" / file).read_text(encoding="utf-8") for file in files]
        definition = re.compile(rf"^(def|class) {function[1]}\b", re.MULTILINE)
        if not any(definition.search(source) for source in sources):
            elsewhere.append(row)
    assert elsewhere == []
    assert rows > 10
