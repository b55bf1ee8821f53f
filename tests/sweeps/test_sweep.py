"""Sweeps: rows against direct calls, from every kind of source, with bad records among them."""

from __future__ import annotations

import dataclasses
import functools
import re

import cases
import chats
import models
import numpy as np
import pandas as pd
import pytest
import sweep_runs
import torch
from passes import passes
from sweep_runs import GOOD, run, same, write_csv, write_jsonl

import lens_lora as ll
from lens_lora.core import Evaluations, patch_sites
from lens_lora.errors import SweepError
from lens_lora.sweeps import batches
from lens_lora.sweeps.analyses import ANALYSES
from lens_lora.sweeps.batches import VALUES
from lens_lora.sweeps.records import read_records


@pytest.fixture(params=models.MAKERS)
def lens(request, float64) -> ll.LoraLens:
    return cases.case("llama", request.param, "raw").lens


@pytest.fixture
def a_lens(float64) -> ll.LoraLens:
    return sweep_runs.a_lens()


def margin_of(record: dict[str, str]) -> ll.Readout:
    """The margin of a record's answers: of two tokens, or where one has several of answers."""
    doc = record["doc"]
    pre = record["pre"]
    has_several = " " in doc or " " in pre
    return ll.AnswerMargin(doc, pre) if has_several else ll.Margin(doc, pre)


# --- the numbers


DIRECT = {
    "first_order": lambda *a: ll.first_order(*a),
    "first_order_at_1": lambda *a: ll.first_order(*a, at=1.0),
    "path": lambda *a: ll.path_attribution(*a, progress=False),
    "add_one": lambda *a: patch_sites(*a, "add_one", progress=False),
    "leave_one_out": lambda *a: patch_sites(*a, "leave_one_out", progress=False),
}


@pytest.mark.slow
def test_rows_equal_direct_calls(lens, tmp_path):
    """Every value, sum, remainder and end, of one prompt at a time, in the records' order."""
    result = run(lens, GOOD, tmp_path, *DIRECT, batch_size=4)
    frame = result.to_frame()
    prompts = result.prompts().set_index("id")
    assert list(prompts.index) == [r["id"] for r in GOOD]
    assert list(frame["id"].unique()) == [r["id"] for r in GOOD]
    for record in GOOD:
        readout = margin_of(record)
        rows = frame[frame["id"] == record["id"]]
        row = prompts.loc[record["id"]]
        assert list(rows["site"]) == [s.name for s in lens.sites]
        assert list(rows["module"]) == [s.module for s in lens.sites]
        assert list(rows["layer"]) == [s.layer for s in lens.sites]
        assert set(rows["prompt"]) == {record["prompt"]}
        assert pd.isna(row["error"])
        assert (row["readout"], row["units"]) == (readout.label, readout.units)
        for name, call in DIRECT.items():
            direct = call(lens, record["prompt"], readout)
            expected = direct.values[0].numpy()
            np.testing.assert_allclose(rows[name], expected, rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(row[f"{name}_sum"], expected.sum(), atol=1e-10)
            left = float(direct.shift) - expected.sum()
            np.testing.assert_allclose(row[f"{name}_remainder"], left, atol=1e-10)
        np.testing.assert_allclose(
            [row["base"], row["adapted"], row["shift"]],
            [float(direct.base), float(direct.adapted), float(direct.shift)],
            atol=1e-11,
        )
        assert row["flips"] == (row["base"] * row["adapted"] < 0)
        assert row["tokens"] == int(lens.prompts(record["prompt"]).lengths)


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (["first_order"], 16),
        (["first_order_at_1"], 16),
        (["first_order", "first_order_at_1"], 16),
        (["add_one"], 8 * (2 + 14 + 4)),  # four draws for its noise floor
    ],
)
def test_each_end_is_run_once(names: list[str], rows: int, a_lens, tmp_path):
    """Eight prompts: the base's and the adapted model's rows, once each, slopes among them."""
    records = [
        {"id": i, "prompt": f"w{i} w7 w8 w9 w10 w11 w12 w13", "doc": " w5", "pre": " w9"}
        for i in range(20, 28)
    ]
    with passes(a_lens) as seen:
        result = run(a_lens, records, tmp_path, *names)
    assert sum(batch for _, batch, _ in seen) <= rows
    assert len(result.prompts()) == 8
    margin = ll.Margin(" w5", " w9")
    g = a_lens.function([record["prompt"] for record in records], margin, progress=False)
    ends = result.prompts()[["base", "adapted"]].to_numpy().T
    np.testing.assert_allclose(ends, g.ends.numpy(), rtol=1e-12)


def test_prompts_are_drawn_by_one_of_their_numbers(lens, tmp_path):
    """A bar for each prompt without an error, the largest number on top; others are refused."""
    bad = {"prompt": "w5", "doc": "w8", "pre": "w8 w9 and what is no word"}
    result = run(lens, [*GOOD, bad], tmp_path, "first_order")
    prompts = result.prompts()
    good = prompts[prompts["error"].isna()]
    assert len(good) >= len(GOOD)
    for column in ("shift", "first_order_remainder"):
        (bars,) = result.plot_prompts(column).data
        assert list(bars.x) == sorted(good[column], reverse=True)
    (largest,) = result.plot_prompts("shift", k=1).data
    assert abs(largest.x[0]) == good["shift"].abs().max()
    with pytest.raises(ll.errors.ArgumentError, match="column='error'"):
        result.plot_prompts("error")


def test_what_a_sweep_says_of_flips_and_errors(lens, tmp_path):
    """It said "1 flip, 0 with errors", and of a column of NaN that every record has an error."""
    result = run(lens, GOOD, tmp_path, "first_order")
    for flips, errors, words in (
        (1, 0, "1 prompt flips, no errors"),
        (2, 1, "2 prompts flip, 1 error"),
        (0, 2, "0 prompts flip, 2 errors"),
    ):
        bad = tuple((index, "no prompt") for index in range(errors))
        said = repr(dataclasses.replace(result, flips=flips, errors=bad))
        assert f"\n  {words}\n" in said
    empty = result.prompts().assign(first_order_remainder=float("nan"))
    empty.to_parquet(result.prompts_path)
    changed = dataclasses.replace(result)
    with pytest.raises(ll.errors.SweepError, match="no record has one"):
        changed.plot_prompts("first_order_remainder")
    none = dataclasses.replace(changed, errors=tuple((i, "bad") for i in range(result.records)))
    with pytest.raises(ll.errors.SweepError, match="every record has an error"):
        none.plot_prompts("first_order_remainder")
    with pytest.raises(ll.errors.SweepError, match="every record has an error"):
        none.attribution("first_order")


def test_second_order_is_half_the_row_sums(lens, tmp_path):
    """Its sum is no estimate of the shift, and no remainder is told."""
    result = run(lens, GOOD[:2], tmp_path, "second_order")
    for i, record in enumerate(GOOD[:2]):
        readout = margin_of(record)
        direct = ll.second_order(lens, record["prompt"], readout, progress=False)
        np.testing.assert_allclose(
            result.attribution("second_order").values[i], direct.half_row_sums[0], rtol=1e-9
        )
    assert "second_order_remainder" not in result.prompts()


def test_padding_left_unmasked_would_be_seen(lens, tmp_path, monkeypatch):
    """Control: a batch read at the last column instead of each prompt's last token differs."""
    one = run(lens, GOOD, tmp_path / "one", batch_size=1)
    plain = ll.results.Prompts.at_read
    monkeypatch.setattr(ll.results.Prompts, "at_read", lambda self, x: x[:, -1])
    wrong = run(lens, GOOD, tmp_path / "wrong", batch_size=4)
    monkeypatch.setattr(ll.results.Prompts, "at_read", plain)
    with pytest.raises(AssertionError):
        same(one, wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_margin_within_rounding_does_not_flip(dtype: torch.dtype, monkeypatch):
    """Three floors decide; they are measured only where a margin is near enough to zero."""
    base = models.hf_model("llama", dtype=dtype)
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base))
    lens = ll.LoraLens(list(models.MAKERS.values())[-1](base), adapter)
    g = Evaluations(lens.function(models.tokens(batch=3), ll.Margin(5, 9), progress=False))
    floor = g.floor.double().numpy()
    near = 2 * floor
    far = 5 * floor
    assert batches._flips(g, -far, far) == [True] * 3
    assert batches._flips(g, -far, near) == batches._flips(g, -near, far) == [False] * 3
    assert (
        batches._flips(Evaluations(lens.function(models.tokens(), ll.LogProb(5))), -far, far)
        == [None] * 3
    )
    measured = []
    monkeypatch.setattr(Evaluations, "floor", property(lambda self: measured.append(1)))
    clear = np.ones(3)
    if dtype == torch.float32:
        assert batches._flips(g, -clear, clear) == [True] * 3
        assert not measured


def test_one_readout_for_all(a_lens, tmp_path):
    """No answers are needed, nor read; flips are of margins alone."""
    records = [{"prompt": r["prompt"]} for r in GOOD]
    result = run(a_lens, records, tmp_path, readout=ll.LogProb("w8"))
    prompts = result.prompts()
    expected = ll.first_order(a_lens, GOOD[0]["prompt"], ll.LogProb("w8"))
    np.testing.assert_allclose(
        result.to_frame()["first_order"][: len(a_lens.sites)], expected.values[0], rtol=1e-9
    )
    assert list(prompts["id"]) == list(range(6))
    assert prompts["doc"].isna().all()
    assert prompts["flips"].isna().all()
    assert set(prompts["units"]) == {"nats"}
    margin = run(a_lens, records, tmp_path / "margin", readout=ll.Margin("w8", "w9"))
    assert margin.prompts()["flips"].notna().all()
    assert result.readout == ll.LogProb("w8").label


def test_result_as_an_attribution(a_lens, tmp_path):
    with pytest.warns(UserWarning, match="no prompt"):
        result = run(a_lens, [GOOD[0], {"prompt": ""}, *GOOD[2:4]], tmp_path, "add_one")
    attribution = result.attribution("add_one")
    expected = result.to_frame()["add_one"].to_numpy().reshape(3, -1)
    assert (attribution.values.numpy() == expected).all()
    assert attribution.sites == a_lens.sites
    left = result.prompts()["add_one_remainder"].dropna()
    np.testing.assert_allclose(attribution.remainder, left, atol=1e-12)
    assert result.plot().data
    assert "3 of 4 prompts" in repr(result)
    with pytest.raises(SweepError, match="holds add_one"):
        result.attribution("path")


# --- conversations


def test_conversations_are_swept_by_what_their_template_makes_of_them(
    a_lens, tmp_path, monkeypatch
):
    """As a direct call of the messages; the same text as a prompt of its own is another prompt."""
    chats.with_template(a_lens.model, monkeypatch)
    answers = {"doc": "w8 w10", "pre": "w9"}
    text = "<bos> w4 w7 w8 <eos> w6"
    records = [
        {"id": "chat", "messages": chats.ASK, **answers},
        {"id": "longer", "messages": tuple(chats.LONGER), "prompt": None, **answers},
        {"id": "text", "prompt": text, **answers},
        {"id": "array", "messages": np.array(chats.LONGER[1:2], object), **answers},
    ]
    result = run(a_lens, records[:3], tmp_path)
    prompts = result.prompts()
    assert list(prompts["prompt"][:1]) == [text]
    assert list(prompts["chat"]) == [True, True, False]
    assert list(prompts["tokens"]) == [len(chats.ASK_IDS), len(chats.LONGER_IDS), 6]
    readout = ll.AnswerMargin("w8 w10", "w9")
    for i, messages in enumerate((chats.ASK, chats.LONGER)):
        direct = ll.first_order(a_lens, messages, readout)
        found = result.attribution("first_order").values[i]
        np.testing.assert_allclose(found, direct.values[0], rtol=1e-9, atol=1e-11)
    same(result, run(a_lens, records[:3], tmp_path))
    assert run(a_lens, records[3:], tmp_path / "array").done == 1


def test_a_template_that_changes_is_another_prompt(a_lens, tmp_path, monkeypatch):
    """The messages stay, as where a template writes the date: what is run decides."""
    chats.with_template(a_lens.model, monkeypatch)
    records = [{"id": "chat", "messages": chats.ASK, "doc": "w8", "pre": "w9"}]
    run(a_lens, records, tmp_path)
    assert run(a_lens, records, tmp_path).resumed == 1
    monkeypatch.setattr(a_lens.model.tokenizer, "chat_template", "w21" + chats.TEMPLATE)
    with pytest.raises(SweepError, match="the prompt of id 'chat' is '<bos> w4.*but 'w21<bos>"):
        run(a_lens, records, tmp_path)


def test_bad_conversations_are_named_with_their_line(a_lens, tmp_path, monkeypatch):
    chats.with_template(a_lens.model, monkeypatch)
    answers = {"doc": "w8", "pre": "w9"}
    bad = {
        "it has both a prompt and messages": {"messages": chats.ASK, "prompt": "w5"},
        "its messages are 'w5'; expected a list": {"messages": "w5"},
        r"its messages are \[\[": {"messages": [chats.ASK]},
        "message 0 has no content": {"messages": [{"role": "user"}]},
        "its role is 'human'": {"messages": [{"role": "human", "content": "w5"}]},
        r"its messages are \[\]; expected a list": {"messages": []},
        "no tools here": {"messages": [{"role": "tool", "content": "w5"}]},
    }
    records = [GOOD[0], *({**answers, **fields} for fields in bad.values())]
    file = write_jsonl(tmp_path / "r.jsonl", records)
    with pytest.warns(UserWarning, match="7 of 8 records have no numbers"):
        result = run(a_lens, file, tmp_path)
    errors = [error for _, error in result.errors]
    for line, (words, error) in enumerate(zip(bad, errors, strict=True), start=2):
        assert error.startswith(f"line {line}: ") and re.search(words, error), error


# --- records


def test_every_source_gives_the_same(a_lens, tmp_path):
    from datasets import Dataset

    sources = [
        GOOD,
        write_jsonl(tmp_path / "r.jsonl", GOOD),
        str(write_csv(tmp_path / "r.csv", GOOD)),
        Dataset.from_list(GOOD),
        pd.DataFrame(GOOD),
        (record for record in GOOD),
    ]
    results = [run(a_lens, source, tmp_path / str(i)) for i, source in enumerate(sources)]
    for result in results[1:]:
        same(results[0], result)


def test_spaces_and_quotes_survive(tmp_path):
    odd = [{"id": "a", "prompt": 'He said, "no"\nand', "doc": " Lyon", "pre": " Pàris "}]
    for path in (write_jsonl(tmp_path / "a.jsonl", odd), write_csv(tmp_path / "a.csv", odd)):
        (record,) = read_records(path)
        assert {k: getattr(record, k) for k in odd[0]} == odd[0]


BAD_JSONL = """\
{"prompt": "w5", "doc": "w8", "pre": "w9"}
{"prompt": "w5", "doc": "w8", "pre":

{"doc": "w8", "pre": "w9"}
{"prompt": "", "doc": "w8", "pre": "w9"}
{"prompt": "w5", "doc": 8, "pre": "w9"}
{"prompt": "w5", "doc": "zebra", "pre": "w9"}
{"prompt": "w5", "doc": "w9", "pre": "w9"}
["w5", "w8", "w9"]
{"prompt": "LONG", "doc": "w8", "pre": "w9"}
{"prompt": "w5", "doc": "w8", "pre": null}
{"prompt": "w5", "doc": "w8", "pre": "w9", "id": [1]}
{"prompt": "w5", "doc": "w8", "pre": "w9", "id": 0}
{"prompt": "w6", "doc": "w8", "pre": "w9"}
"""
EXPECTED_ERRORS = {
    1: r"line 2: unreadable \(Expecting value at column 37\)",
    2: "line 4: no prompt",
    3: "line 5: no prompt",
    4: "line 6: its doc is 8, not a string",
    5: "line 7: 'zebra' is not in the vocabulary",
    6: "line 8: doc and pre are both 'w9'",
    7: "line 9: .* is not a record",
    8: "line 10: the prompt has 41 tokens, and the context of this .* holds 32",
    9: "line 11: no pre",
    10: r"line 12: its id is \[1\]",
    0: "line 1: it has no id, and its number 0 is the id of line 13; give each",
}


def test_bad_records_are_named_and_stop_nothing(a_lens, tmp_path):
    """With their lines, in the table and in one warning; the good ones have their numbers."""
    path = tmp_path / "r.jsonl"
    path.write_text(BAD_JSONL.replace("LONG", " ".join(["w5"] * 40)))
    with pytest.warns(UserWarning, match="11 of 13 records have no numbers(.|\n)*line 2"):
        result = run(a_lens, path, tmp_path)
    assert len(result.errors) == 11
    assert result.done == 2
    for identity, error in result.errors:
        assert re.match(EXPECTED_ERRORS[identity], error), (identity, error)
    prompts = result.prompts()
    assert prompts["id"].tolist() == [*range(11), 0, 12]
    good = prompts[prompts["error"].isna()]
    assert good["id"].tolist() == [0, 12]
    assert good["base"].notna().all()
    assert prompts[prompts["error"].notna()]["base"].isna().all()
    assert result.to_frame()["id"].unique().tolist() == [0, 12]


def test_bad_rows_of_a_csv(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text('prompt,doc,pre\nw5,w8,w9\n"w5\nw6",w8\nw5,w8,w9,w10\n,w8,w9\n', "utf-8-sig")
    found = [record.error for record in read_records(path)]
    assert found == [
        None,
        "line 4: no pre.",
        "line 5: more fields than columns; quote a field that holds commas.",
        "line 6: no prompt.",
    ]


def test_undecodable_line_and_missing_values(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n{"prompt": "w5"}\n')
    errors = [record.error for record in read_records(path, with_answers=False)]
    assert re.match("line 1: unreadable.*utf-8", errors[0])
    assert errors[1] is None
    frame = pd.DataFrame([{"prompt": "w5", "doc": "w6"}, {"prompt": "w5", "pre": "w6"}])
    assert [r.error for r in read_records(frame)] == ["row 0: no pre.", "row 1: no doc."]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "no record found"),
        ({"prompt": "w5"}, "one mapping"),
        ("prompts.txt", r"ends in \.jsonl or \.csv"),
    ],
)
def test_records_that_cannot_be_read_at_all(a_lens, tmp_path, records, words):
    with pytest.raises(SweepError, match=words):
        run(a_lens, records, tmp_path)


def test_csv_without_its_columns(tmp_path):
    (tmp_path / "r.csv").write_text("text,doc\na,b\n")
    with pytest.raises(SweepError, match="columns text, doc and lacks prompt, pre"):
        read_records(tmp_path / "r.csv")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"analyses": "frist_order"}, "'frist_order'.*expected some of first_order"),
        ({"analyses": ()}, "none"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"out": "results"}, r"ends in \.parquet"),
    ],
)
def test_bad_arguments(a_lens, tmp_path, options, words):
    with pytest.raises(SweepError, match=words):
        ll.sweep(a_lens, GOOD, **{"out": tmp_path / "r.parquet", "progress": False, **options})


@pytest.mark.parametrize("token", ["w5 w6", ["w5"], ["w5", "w6"]])
def test_readout_that_fits_no_prompt_is_refused_at_once(a_lens, tmp_path, token):
    with pytest.raises(ll.errors.TokenError):
        run(a_lens, GOOD, tmp_path, readout=ll.Logit(token))
    assert not list(tmp_path.iterdir())


def test_one_record_that_is_not_finite_fails_alone(a_lens, tmp_path):
    """The batch is run again one by one; the others' numbers are as without it."""

    def log_of_negative(logits):
        return (logits[:, 8] - threshold).sqrt()

    threshold = -100.0
    records = [{"prompt": r["prompt"], "id": r["id"]} for r in GOOD]
    fine = run(a_lens, records, tmp_path / "fine", readout=ll.Readout.of(lambda x: x[:, 8]))
    threshold = fine.prompts()[["base", "adapted"]].min(axis=1).sort_values().iloc[:2].mean()
    readout = ll.Readout.of(log_of_negative)
    with pytest.warns(UserWarning, match="1 of 6 records"):
        result = run(a_lens, records, tmp_path, readout=readout, batch_size=6)
    ((identity, error),) = result.errors
    assert re.match(r"row \d: the readout is not finite", error)
    others = [r for r in records if r["id"] != identity]
    alone = run(a_lens, others, tmp_path / "others", readout=readout)
    pd.testing.assert_frame_equal(result.to_frame(), alone.to_frame(), rtol=1e-10)


def test_errors_of_the_lens_stop(a_lens, tmp_path, monkeypatch):
    def broken(g):
        raise ll.errors.ModelStateError("in train mode")

    monkeypatch.setitem(VALUES, "add_one", broken)
    with pytest.raises(ll.errors.ModelStateError, match="train mode"):
        run(a_lens, GOOD, tmp_path, "add_one")


def test_every_analysis_has_its_values():
    assert list(VALUES) == list(ANALYSES)


# --- a response of each record


SAID = [
    {"id": "long", "prompt": "w5 w6", "response": " w7 w8 w9"},
    {"id": "none", "prompt": "w5 w6"},
    {"id": "empty", "prompt": "w5 w6", "response": ""},
    {"id": "ids", "prompt": "w5 w6", "response": [7, 8]},
    {"id": "end", "prompt": "w5", "response": "<eos>"},
    {"id": "short", "prompt": "w9 w5 w7", "response": " w4"},
]
MAKERS = {
    "KL": (ll.KL, "path", ll.path_attribution),
    "log p": (ll.AnswerLogProb, "first_order", ll.first_order),
    "function": (
        functools.partial(ll.KL, direction="adapted_to_base"),
        "leave_one_out",
        lambda *a, **o: patch_sites(*a, "leave_one_out", **o),
    ),
}


@pytest.mark.parametrize(("make", "name", "analysis"), MAKERS.values(), ids=MAKERS)
def test_a_readout_of_each_records_response(a_lens, tmp_path, make, name, analysis):
    """Rows equal direct calls, in one batch with a response of another length; bad ones say so."""
    with pytest.warns(UserWarning, match="4 of 6 records"):
        result = run(a_lens, SAID, tmp_path, name, readout=make)
    prompts = result.prompts().set_index("id")
    for record in (SAID[0], SAID[-1]):
        i = [0, 5].index(SAID.index(record))
        readout = make(record["response"])
        direct = analysis(a_lens, record["prompt"], readout, progress=False)
        found = result.attribution(name)
        np.testing.assert_allclose(found.values[i], direct.values[0], rtol=1e-8, atol=1e-10)
        row = prompts.loc[record["id"]]
        assert row["response"] == record["response"]
        assert row["units"] == "nats"
        assert row["adapted"] == pytest.approx(float(direct.adapted[0]), abs=1e-10)
    assert result.readout == make(["", ""]).label
    for identity, words in {
        "none": "no response", "empty": "no response", "ids": "not a string",
        "end": "special tokens only",
    }.items():  # fmt: skip
        assert words in prompts.loc[identity, "error"]


def test_a_response_is_part_of_what_a_resumed_sweep_recognises(a_lens, tmp_path):
    records = [SAID[0], SAID[-1]]
    run(a_lens, records[:1], tmp_path, readout=ll.AnswerLogProb)
    assert run(a_lens, records, tmp_path, readout=ll.AnswerLogProb).resumed == 1
    with pytest.raises(SweepError, match="the response of id 'long' is"):
        other = [{**records[0], "response": " w9"}, records[1]]
        run(a_lens, other, tmp_path, readout=ll.AnswerLogProb)
    with pytest.raises(SweepError, match="readout"):
        run(a_lens, records, tmp_path, readout=lambda said: ll.AnswerLogProb(said, mean=True))


def test_a_conversation_and_its_response(a_lens, tmp_path, monkeypatch):
    chats.with_template(a_lens.model, monkeypatch)
    records = [{"id": "chat", "messages": chats.ASK, "response": "w7 w8"}]
    result = run(a_lens, records, tmp_path, readout=ll.AnswerLogProb)
    direct = ll.first_order(a_lens, chats.ASK, ll.AnswerLogProb("w7 w8"))
    found = result.attribution("first_order").values
    np.testing.assert_allclose(found, direct.values, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("readout", [ll.KL, ll.KL(" w5")], ids=["of each", "one"])
@pytest.mark.parametrize("name", ["first_order", "first_order_at_1", "second_order"])
def test_a_divergence_without_its_base_is_refused(a_lens, tmp_path, readout, name):
    with pytest.raises(SweepError, match="use 'path', 'add_one' or 'leave_one_out'"):
        run(a_lens, SAID[:1], tmp_path, name, readout=readout)
