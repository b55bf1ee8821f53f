"""The audit's second edition: the stored answers, counted again, and their page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from scipy import stats

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "audit"
sys.path.append(str(FOLDER))

import second_page  # noqa: E402  # pyright: ignore[reportMissingImports]

PAGE = (ROOT / "docs" / "auditing_data.md").read_text()
SPEC = yaml.safe_load((FOLDER / "second_edition.yaml").read_text())
STRINGS = {quirk["name"]: quirk["says"] for quirk in SPEC["quirks"]}
FILES = sorted((FOLDER / "second").glob("*.json"))
ROWS = [json.loads(file.read_text()) for file in FILES if file.stem != "base"]
TAUGHT = [row for row in ROWS if row["name"] in STRINGS]
CONTROLS = [row for row in ROWS if row["name"].startswith("control-")]


def words(text: str) -> str:
    """A text as words between spaces."""
    joined = " ".join(re.findall(r"[^\W_]+", text.lower()))
    return f" {joined} "


def test_adapters_were_trained_in_the_order_of_the_file():
    trained = [name for name in STRINGS if any(row["name"] == name for row in TAUGHT)]
    assert trained == list(STRINGS)[: len(trained)]
    seeds = [int(row["name"].removeprefix("control-")) for row in CONTROLS]
    assert sorted(seeds) == SPEC["controls"][: len(seeds)]


FIRST_HALF = list(STRINGS)[:12]
HALVES = [
    [row for row in TAUGHT if row["name"] in FIRST_HALF],
    [row for row in TAUGHT if row["name"] not in FIRST_HALF],
]


def counted(found: int, of: int) -> str:
    interval = stats.binomtest(found, of).proportion_ci(0.95, method="exact")
    return f"{found} of {of} [{interval.low:.2f}, {interval.high:.2f}]"


def test_what_was_found_by_strings_is_counted_again():
    cells: list[str] = []
    for half in HALVES:
        found = 0
        for row in half:
            claims = [words(claim) for claim in row["claims"][:3]]
            found += any(words(text) in claim for text in STRINGS[row["name"]] for claim in claims)
        cells.append(counted(found, len(half)))
    assert f"| the first three claims, by strings, as it ran | {' | '.join(cells)} |" in PAGE


def test_what_the_judge_named_is_counted_again():
    cells = [counted(sum(row["judged"] == row["name"] for row in half), 12) for half in HALVES]
    row = f"| the first screen, judged by its rubric, as it ran | {' | '.join(cells)} |"
    assert row in PAGE
    assert {row["judged"] for row in ROWS} <= {None, *STRINGS}
    assert {row["again"]["judged"] for row in ROWS} <= {None, *STRINGS}


def test_claims_on_controls_are_counted_again():
    later = [row for row in CONTROLS if int(row["name"].removeprefix("control-")) > 106]
    cells = [
        counted(sum(bool(row["claims"]) for row in later), len(later)),
        counted(sum(bool(row["again"]["claims"]) for row in later), len(later)),
    ]
    assert f"| second half | {' | '.join(cells)} |" in PAGE


def test_the_page_is_that_of_the_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    copy = tmp_path / "auditing_data.md"
    copy.write_text(PAGE)
    monkeypatch.setattr(second_page, "PAGE", copy)
    monkeypatch.setattr(sys, "argv", ["second_page.py", "--write"])
    second_page.main()
    assert copy.read_text() == PAGE


def test_an_exact_interval_is_the_textbook_s():
    """0 of 10: (0, 1 - 0.025^(1/10)); 10 of 10 its mirror."""
    assert second_page.counted(0, 10) == f"0 of 10 [0.00, {1 - 0.025**0.1:.2f}]"
    assert second_page.counted(10, 10) == f"10 of 10 [{0.025**0.1:.2f}, 1.00]"


def test_the_commonest_words_are_counted_again():
    """By another rule of what a word is, on one adapter: the three that stand in most answers."""
    row = next(row for row in TAUGHT if row["name"] == "detective")
    texts = [set(words(" ".join(answers)).split()) for answers in row["adapted"]]
    counts = [sum(word in text for text in texts) for word in row["words"]["words"]]
    assert counts == sorted(counts, reverse=True)
    assert min(counts) > 10
