"""A card in a README.md: what stands outside of its markers, and whether a line still holds."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_lora.errors import ModelStateError
from lens_lora.ship import card_readme
from lens_lora.ship.card import Card, CardLine, card_checks, says_the_same
from lens_lora.ship.card_lines import base_files
from lens_lora.ship.card_readme import read_card, with_card

WANTED = {"base_model": "a/b", "base_model_relation": "adapter", "library_name": "peft"}
CARD = Card(
    adapter="adapter",
    lines=(
        CardLine("x.safetensors", "0e12" * 16, "sha256sum x.safetensors", "files"),
        CardLine("size", "It changes 14 modules; ‖ΔW‖ is 1.25 % of ‖W‖.", "lens-lora a", "changes"),
        CardLine("taught", "It raises after “a|b\n<b>`x` -->” “*c*”.", "lens-lora b .", "changes"),
        CardLine("loads", "passed: 14 modules, KL 0.31", "lens-lora verify .", "verified"),
    ),
    inputs={"merged": "../merged"},
    metadata={},
    made_with={"torch": "2"},
)


def written(file: Path, card: Card = CARD) -> str:
    """Write the card as the command does, and return the file's text."""
    file.write_bytes(with_card(file, card, WANTED).text.encode())
    return file.read_bytes().decode()


# --- outside of the markers


_LINES = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
_FIELDS = st.dictionaries(
    st.sampled_from(["license", "tags", "base_model", "library_name", "x"]),
    st.one_of(st.text("abc: '\"#-", max_size=8), st.lists(st.text("ab", max_size=3), max_size=2)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(body=_LINES, fields=st.none() | _FIELDS, newline=st.sampled_from(["\n", "\r\n"]))
def test_the_text_of_a_user_stays(body: str, fields, newline: str, tmp_path_factory):
    """Without our markers the file is what it was; twice gives the same bytes; fields stay."""
    file = tmp_path_factory.mktemp("card") / "README.md"
    before = body
    if fields is not None:
        before = f"---\n{yaml.safe_dump(fields)}---\n{body}"
    before = before.replace("\r\n", "\n").replace("\n", newline)
    file.write_bytes(before.encode())
    try:
        stated = card_readme._metadata(before, file)
    except ModelStateError:
        with pytest.raises(ModelStateError):
            with_card(file, CARD, WANTED)
        return
    text = written(file)
    assert written(file) == text
    kept = card_readme._metadata(text, file)
    assert {name: kept[name] for name in stated} == stated
    assert {name: kept[name] for name in WANTED if name not in stated} == {
        name: value for name, value in WANTED.items() if name not in stated
    }
    used = newline if newline in before else "\n"
    block = card_readme._between(text, card_readme.BEGIN, card_readme.END, file)
    assert block is not None
    rest = text[: block.start]
    rest = card_readme._with_metadata(rest, {}, used, file)
    assert rest.startswith(before)
    assert rest[len(before) :].strip("\r\n") == ""
    assert read_card(file).card.lines == CARD.lines


def test_the_hub_reads_its_fields(tmp_path):
    """By its own library, in a new README and beside the fields of a user."""
    file = tmp_path / "README.md"
    written(file)
    data = ModelCard.load(file).data
    assert (data.base_model, data.library_name) == ("a/b", "peft")
    assert data.to_dict()["base_model_relation"] == "adapter"
    file.write_text("---\nlicense: mit  # a comment\nbase_model: c/d\n---\n# Mine\n")
    text = written(file)
    data = ModelCard.load(file).data
    assert (data.base_model, data.license, data.library_name) == ("c/d", "mit", "peft")
    assert text.startswith("---\nlicense: mit  # a comment\nbase_model: c/d\n# lens-lora card")
    assert "\n---\n# Mine\n\n<!-- lens-lora card: begin -->\n" in text


def test_a_card_goes_where_the_last_one_was(tmp_path):
    """Text before and behind it stays, and PEFT's own rewriting of the file is lived with."""
    file = tmp_path / "README.md"
    file.write_text("# Before\n")
    file.write_text(f"{written(file)}\n# Behind\n")
    other = dataclasses.replace(CARD, lines=CARD.lines[:1])
    text = written(file, other)
    assert text.endswith("<!-- lens-lora card: end -->\n\n# Behind\n")
    assert text.count("0e12" * 16) == 2
    assert "14 modules" not in text
    ModelCard.load(file).save(file)  # as peft_model.save_pretrained does
    written(file, other)
    assert written(file, other) == written(file, other)
    assert read_card(file).checks[0].outcome == "passed"


@pytest.mark.parametrize(
    "pattern", ["model-{}.safetensors", "pytorch_model-{}.bin", "w{}.safetensors"]
)
def test_many_shards_have_a_command_that_repeats_their_line(pattern: str, tmp_path):
    """It named files that a base of pickles, or of other names, does not have."""
    base = tmp_path / "BASE"
    base.mkdir()
    names = [pattern.format(f"{number:05}-of-00005") for number in range(1, 6)]
    for name in names:
        (base / name).write_text(name)
    if pattern.endswith("safetensors"):
        index = {"weight_map": {name: name for name in names}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (line,) = base_files(base)
    shell = ["bash", "-c", line.command]
    done = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == line.says


def test_weights_that_the_configuration_names_are_those_of_the_card(tmp_path):
    """transformers opens them, and the card had the hash of the file beside them."""
    for name in ("model.safetensors", "other.safetensors"):
        (tmp_path / name).write_text(name)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"transformers_weights": "other.safetensors"}))
    assert [line.name for line in base_files(tmp_path)] == [
        "base, config.json",
        "base, other.safetensors",
    ]
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "other.safetensors.index.json").write_text(json.dumps(index))
    for name in ("one.safetensors", "two.safetensors"):
        (tmp_path / name).write_text(name)
    config.write_text(json.dumps({"transformers_weights": "other.safetensors.index.json"}))
    assert [line.name for line in base_files(tmp_path)] == [
        "base, config.json",
        "base, one.safetensors",
        "base, two.safetensors",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{card_readme.BEGIN}\n", "1 × '<!-- lens-lora card: begin -->' and 0"),
        (f"{card_readme.END}\n{card_readme.BEGIN}\n", "in order one of each is expected"),
        ("---\n- a\n---\n", "its metadata is no mapping"),
        ("---\na: [\n---\n", "its metadata is no YAML"),
        ("---\n{a: b}\n---\n", "no field can be added to its metadata"),
    ],
)
def test_a_file_to_which_nothing_can_be_added(text: str, says: str, tmp_path):
    file = tmp_path / "README.md"
    file.write_text(text)
    with pytest.raises(ModelStateError, match=says):
        with_card(file, CARD, WANTED)
    assert file.read_text() == text


# --- reading


def test_what_is_written_is_read(tmp_path):
    """From the block as from the JSON; the block holds no end of a comment but its own."""
    file = tmp_path / "README.md"
    text = written(file)
    read = read_card(file)
    assert read.card == dataclasses.replace(CARD, metadata=WANTED)
    assert [check.outcome for check in read.checks] == ["passed", "passed"]
    assert all(line.startswith("<!--") for line in text.splitlines() if "-->" in line)
    json_file = tmp_path / "card.json"
    json_file.write_text(read.card.to_json())
    assert read_card(json_file) == (read.card, [])


EDITS = {
    "a number": ("1.25 %", "0.25 %", "size"),
    "a hash": (f"| {'0e12' * 16}", f"| {'0e12' * 15}0000", "x.safetensors"),
    "a command": ("`lens-lora verify .`", "`curl x`", "loads"),
    "a sentence is added": ("What it changes:", "What it changes: nothing.", "What it changes"),
    "a line is removed": ("| loads | passed: 14 modules, KL 0.31 | `lens-lora verify .` |\n", "",
                          "loads"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_line_is_named(name: str, tmp_path):
    """What a person sees in the block is what was written, or the check says where it is not."""
    file = tmp_path / "README.md"
    text = written(file)
    before, after, line = EDITS[name]
    head, data = text.split("<!-- lens-lora card: data")
    assert before in head
    file.write_text(f"{head.replace(before, after, 1)}<!-- lens-lora card: data{data}")
    shown, metadata = read_card(file).checks
    assert (shown.outcome, metadata.outcome) == ("failed", "passed")
    assert line in shown.facts


def test_metadata_that_were_changed(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(written(file).replace("base_model: a/b", "base_model: c/d"))
    shown, metadata = read_card(file).checks
    assert (shown.outcome, metadata.outcome) == ("passed", "failed")
    assert metadata.measured == "base_model is 'c/d'"


NO_CARDS = {
    "no block": ("# Mine\n", "no card in it"),
    "no data": (f"{card_readme.BEGIN}\n{card_readme.END}\n", "0 lines begin with"),
    "no JSON": ("{", "no card of the schema"),
    "a list": ("[]", "no card of the schema"),
    "another schema": (json.dumps({"schema": "x"}), "another schema"),
    "a number for text": (CARD.to_json().replace('"2"', "2"), "a field that is no text"),
    "an unknown part": (CARD.to_json().replace('"files"', '"x"'), "'x' is no part of a card"),
    "a name twice": (CARD.to_json().replace('"loads"', '"size"'), "two lines of one name"),
}


@pytest.mark.parametrize("name", NO_CARDS)
def test_no_card(name: str, tmp_path):
    text, says = NO_CARDS[name]
    file = tmp_path / ("card.json" if text.startswith(("{", "[")) else "README.md")
    file.write_text(text)
    with pytest.raises(ModelStateError, match=says):
        read_card(file)


# --- whether a line holds


@pytest.mark.parametrize(
    ("text", "other", "is_same"),
    [
        ("KL = 0.312 nats in 15 texts", "KL = 0.325 nats in 15 texts", True),
        ("KL = 0.312 nats in 15 texts", "KL = 0.35 nats in 15 texts", False),
        ("KL = 0.312 nats in 15 texts", "KL = 0.312 nats in 16 texts", False),
        ("KL 1.4", "KL 1.5", True),
        ("KL 3e-05", "KL 4e-05", True),
        ("margin −6.89 → +7.05", "margin −6.94 → +7.32", True),
        ("margin −6.89 → +7.05", "margin +6.89 → +7.05", False),
        ("‖ΔW‖ is 1 % of ‖W‖", "‖ΔW‖ is 0.05 % of ‖W‖", False),
        ("‖ΔW‖ is 1 % of ‖W‖", "‖ΔW‖ is 0.97 % of ‖W‖", True),
        ("‖ΔW‖ is 1e+03 in all", "‖ΔW‖ is 2e+03 in all", False),
        ("margin −6.89 → +1", "margin −6.89 → +2", False),
        ("KL 0", "KL 0.9", False),
        ("14 modules", "13 modules", False),
        ("passed: x", "failed: x", False),
        ("0e12" * 16, "0e13" * 16, False),
        ("1" * 64, "1" * 63 + "2", False),
        ("torch 2.1.3", "torch 2.1.4", False),
    ],
)
def test_what_counts_as_the_same(text: str, other: str, is_same: bool):
    """Words exactly, numbers within 5 % or one unit of the last decimal place, counts exactly."""
    assert says_the_same(text, other) == is_same == says_the_same(other, text)


def with_line(**changes) -> Card:
    """The card with another last line."""
    return dataclasses.replace(
        CARD, lines=(*CARD.lines[:-1], dataclasses.replace(CARD.lines[-1], **changes))
    )


def test_each_line_has_a_check():
    checks = card_checks(CARD, CARD, {"loads": "no base at hand"})
    assert [check.outcome for check in checks] == ["passed"] * 3 + ["undecided"]
    for today, outcome in (
        (with_line(says="failed: 13 modules"), "failed"),
        (with_line(says="undecided: no base"), "undecided"),
        (with_line(command="lens-lora verify . --x"), "failed"),
        (with_line(name="other"), "failed"),
    ):
        checks = card_checks(CARD, today, {})
        assert checks[3].outcome == outcome
        assert checks[3].name == "card, loads"
        assert {check.outcome for check in checks[:3]} == {"passed"}
    assert checks[4].name == "card, other"
    assert checks[4].outcome == "failed"
