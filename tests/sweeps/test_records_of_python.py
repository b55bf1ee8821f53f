"""Prompts are records where no answers are needed; what cannot be a record is refused at once."""

from __future__ import annotations

from pathlib import Path

import chats
import numpy as np
import pytest
import sweep_runs
import torch
from sweep_runs import GOOD, run, write_jsonl

import lens_lora as ll
from lens_lora.sweeps.batches import VALUES

pytestmark = pytest.mark.bad_input
TEXTS = ["w5 w6 w7", "w14", "w30 w9"]
LOG_PROB = ll.LogProb("w8")
ENTROPY = ll.Readout.of(
    lambda logits: torch.distributions.Categorical(logits=logits).entropy(), "entropy", units="nats"
)


@pytest.fixture
def lens(float64) -> ll.LoraLens:
    return sweep_runs.a_lens()


@pytest.mark.parametrize("records", [TEXTS, tuple(TEXTS), iter(TEXTS)], ids=["list", "tuple", "it"])
def test_strings_are_prompts(lens: ll.LoraLens, tmp_path: Path, records):
    result = run(lens, records, tmp_path, readout=LOG_PROB)
    direct = ll.first_order(lens, TEXTS, LOG_PROB)
    np.testing.assert_allclose(
        result.attribution("first_order").values, direct.values, rtol=1e-9, atol=1e-12
    )
    assert (result.readout, result.units, result.done) == (LOG_PROB.label, "nats", 3)
    assert list(result.prompts()["prompt"]) == TEXTS
    assert list(result.prompts()["id"]) == [0, 1, 2]


def test_conversations_are_prompts(lens: ll.LoraLens, tmp_path: Path, monkeypatch):
    """Beside strings and mappings; one conversation alone is not two records."""
    chats.with_template(lens.model, monkeypatch)
    records = [chats.ASK, "w5 w6", {"id": "own", "prompt": "w7"}]
    result = run(lens, records, tmp_path, readout=LOG_PROB)
    values = [
        ll.first_order(lens, prompt, LOG_PROB).values for prompt in (chats.ASK, "w5 w6", "w7")
    ]
    np.testing.assert_allclose(
        result.attribution("first_order").values, torch.cat(values), rtol=1e-9, atol=1e-12
    )
    with pytest.raises(ll.errors.SweepError, match="row 0 is one message of a conversation"):
        run(lens, chats.ASK, tmp_path / "alone", readout=LOG_PROB)


def test_strings_have_activations(lens: ll.LoraLens, tmp_path: Path):
    found = run(lens, TEXTS, tmp_path, "activations")
    expected = run(lens, [{"prompt": text} for text in TEXTS], tmp_path / "other", "activations")
    assert found.texts == expected.texts == 3
    assert not found.errors


def test_a_line_that_is_a_string_is_a_prompt(lens: ll.LoraLens, tmp_path: Path):
    path = tmp_path / "r.jsonl"
    path.write_text('"w5 w6"\n{"prompt": "w7"}\n')
    assert run(lens, path, tmp_path, readout=LOG_PROB).done == 2


EACH_READOUT = {"log prob": LOG_PROB, "function": ENTROPY, "class": ll.AnswerLogProb}


@pytest.mark.parametrize("readout", EACH_READOUT.values(), ids=EACH_READOUT)
def test_a_readout_keeps_its_name_where_every_record_is_bad(
    lens: ll.LoraLens, tmp_path: Path, readout
):
    with pytest.warns(UserWarning, match="1 of 1 records"):
        result = run(lens, [{"id": "bad", "prompt": ""}], tmp_path, readout=readout)
    named = readout if isinstance(readout, ll.Readout) else readout(["", ""])
    assert result.done == 0
    assert (result.readout, result.units) == (named.label, "nats")
    assert f"of {named.label} in nats" in repr(result)


NONE = {
    "strings without answers": (TEXTS, None, "row 0 is a prompt alone.*needs doc, pre.*readout="),
    "a string without its response": (TEXTS, ll.AnswerLogProb, "row 0 is a prompt.*needs response"),
    "a conversation without answers": ([chats.ASK], None, "row 0 is a prompt alone"),
    "a number": ([*TEXTS, 3], LOG_PROB, "row 3 is a int, and no record"),
    "nothing": ([None], LOG_PROB, "row 0 is a NoneType"),
    "ids": ([[5, 6, 7]], LOG_PROB, "row 0 is a list, and no record"),
    "a tensor": ([torch.tensor([5, 6])], LOG_PROB, "row 0 is a Tensor"),
    "no records at all": (5, LOG_PROB, "records are a int"),
    "an empty list": ([], LOG_PROB, "no record found"),
    "one string": ("w5 w6", LOG_PROB, r"w5 w6: expected a file that ends in \.jsonl or \.csv"),
}


@pytest.mark.parametrize("kind", NONE)
def test_what_cannot_be_a_record_is_refused_before_anything_runs(
    lens: ll.LoraLens, tmp_path: Path, kind: str, monkeypatch
):
    records, readout, words = NONE[kind]

    def never(*_: object) -> None:
        raise AssertionError("an analysis ran")

    monkeypatch.setitem(VALUES, "first_order", never)
    with pytest.raises(ll.errors.SweepError, match=words):
        run(lens, records, tmp_path, readout=readout)
    assert not list(tmp_path.iterdir())


def test_a_later_mistake_of_a_list_is_seen_before_its_first_activation(
    lens: ll.LoraLens, tmp_path: Path
):
    with pytest.raises(ll.errors.SweepError, match="row 1 is a int, and no record"):
        run(lens, ["w5", 3], tmp_path, "activations")


def test_rows_of_a_file_stay_bad_records(lens: ll.LoraLens, tmp_path: Path):
    """Data may hold anything: its faults are rows, whatever they are."""
    path = tmp_path / "r.jsonl"
    write_jsonl(path, GOOD[:1])
    path.write_text(path.read_text() + '[5, 6]\n3\n"w5"\n')
    with pytest.warns(UserWarning, match="3 of 4 records"):
        result = run(lens, path, tmp_path)
    assert result.done == 1
    assert [error.partition(": ")[2] for _, error in result.errors] == [
        "[5, 6] is not a record with the columns prompt, doc, pre.",
        "3 is not a record with the columns prompt, doc, pre.",
        "no doc.",
    ]
