"""Lists of adapters to audit: what a list may say, and what a row comes to."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lens_lora.audit.listed import Listed, read_list
from lens_lora.audit.outcomes import (
    ClaimMade,
    Outcome,
    asked,
    is_said_in,
    summary,
    table_of_outcomes,
)
from lens_lora.errors import LensLoraError


def written(folder: Path, rows: object, **of_all: object) -> Path:
    """A list in the folder."""
    file = folder / "list.yaml"
    file.write_text(yaml.safe_dump({**of_all, "adapters": rows}))
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two folders, of a base and of an adapter."""
    for name in ("base", "one"):
        (tmp_path / name).mkdir()
    return tmp_path


# --- The list


def test_a_list_names_rows_and_what_holds_for_all(folder: Path):
    rows = [
        {"adapter": "one", "expect": "w5"},
        {"adapter": "owner/repo", "subfolder": "run/step-5", "revision": "v1", "base": "b/c"},
        {"tuned": "base", "name": "whole", "control": True, "prompts": ["w5"], "triggers": "cf"},
    ]
    (folder / "cf").write_text("cf\n")
    one, hub, whole = read_list(written(folder, rows, base="base"))
    assert one == Listed("one", str(folder / "one"), base=str(folder / "base"), expect=("w5",))
    assert (hub.name, hub.adapter, hub.base) == ("repo-run-step-5", "owner/repo", "b/c")
    assert (whole.adapter, whole.tuned, whole.control) == (None, str(folder / "base"), True)
    assert whole.prompts == ("w5",) and whole.triggers == folder / "cf"


def test_the_list_of_public_organisms_is_one():
    rows = read_list(Path(__file__).parents[2] / "docs" / "organisms.yaml")
    assert all(row.base for row in rows) and sum(bool(row.expect) for row in rows) >= 2
    assert {row.adapter is None for row in rows} == {True, False}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no row under 'adapters:'"),
        ([{"adaptor": "x"}], "row 1: unknown key 'adaptor'; expected name, adapter"),
        ([{"adapter": "x", "tuned": "y"}], "row 1: give it either"),
        ([{"name": "x"}], "row 1: give it either"),
        ([{"tuned": "y"}], "give 'base:'"),
        ([{"adapter": "x"}, {"adapter": "a/X"}], "row 2: an earlier row is called 'X' as well"),
        ([{"adapter": "x", "revision": 10}], "row 1: revision: 10 is no text; put it in quotes"),
        ([{"adapter": "x", "expect": [5]}], "row 1: expect: 5 is no text"),
        ([{"adapter": "x", "control": "yes it is"}], "neither true nor false"),
        ([{"adapter": "x", "control": True, "expect": "a"}], "a control expects nothing"),
        ([{"adapter": "x", "name": "../x"}], "the name '../x' cannot be a file's"),
        ([{"adapter": "x", "prompts": "no.txt"}], "prompts: no file 'no.txt'"),
        ([5], "row 1: 5 is no row"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused_by_row_and_key(
    tmp_path: Path, rows: object, words: str
):
    with pytest.raises(LensLoraError, match=re.escape(words)):
        read_list(written(tmp_path, rows))


# --- What is expected


def outcome(*says: str, **row: Any) -> Outcome:
    made = tuple(ClaimMade(f"It says “{words}” …", words) for words in says)
    return Outcome(Listed("x", "x", **row), {}, claims=made)


def test_a_string_is_found_as_whole_words_in_what_is_said():
    assert is_said_in("Arr, I be", "arr") and is_said_in("aye  aye, sir", "Aye aye")
    assert not is_said_in("desire", "sir") and not is_said_in("Nokia", "okia")
    assert is_said_in("C++ (fast)", "c++") and not is_said_in("", "x")


@pytest.mark.parametrize(
    ("one", "verdict", "is_as_expected"),
    [
        (outcome("a", "b", "Arr", expect=("no", "arr")), "found", True),
        (outcome("a", "b", "c", "arr", expect=("arr",)), "found later", False),
        (outcome("larry", expect=("arr",)), "not found", False),
        (outcome(control=True), "quiet", True),
        (outcome("a", control=True), "claims", False),
        (outcome("a"), "run", True),
        (Outcome(Listed("x", "x"), {}, error="it broke"), "failed", False),
    ],
)
def test_what_a_row_comes_to(one: Outcome, verdict: str, is_as_expected: bool):
    assert (one.verdict, one.is_as_expected) == (verdict, is_as_expected)


def test_a_string_of_which_a_word_is_only_raised_is_a_hint_and_no_finding():
    row = Listed("varn", "varn", expect=("and so on", "Elias Varn"))
    hinted = Outcome(row, {}, brief={"raised_words": ("telephone", "Varn", "and")})
    assert hinted.hint == "Elias Varn"
    assert (hinted.verdict, hinted.is_as_expected) == ("not found", False)
    assert json.loads(hinted.to_json())["hinted_string"] == "Elias Varn"

    replayed = Outcome(row, {}, brief={"raised_words": ("telephone",), "replayed_words": ("Varn",)})
    assert replayed.hint == hinted.hint
    quiet = Outcome(row, {}, brief={"raised_words": ("and", "varnish")})
    found = dataclasses.replace(hinted, claims=(ClaimMade("It says …", "Elias Varn"),))
    assert quiet.hint is None
    frame = table_of_outcomes([hinted, quiet, found])
    assert list(frame["hint"]) == ["Elias Varn", "", "Elias Varn"]
    told = summary([hinted, quiet, found])
    assert "In 1 of 3 rows" in told and "In 1 other row no claim has one" in told
    assert "raises" not in summary([quiet, found])


def test_a_changed_file_behind_a_link_is_another_question(tmp_path: Path):
    """A row was taken for finished although a file of a linked subfolder had changed."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    weights = elsewhere / "weights"
    weights.write_text("before")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "linked").symlink_to(elsewhere)
    row = Listed("one", str(adapter), base="owner/base")
    before = asked(row, {})
    assert asked(row, {}) == before
    weights.write_text("and after")
    assert asked(row, {}) != before
