"""Activations of many texts: the file against direct calls, resumed, extended, bounded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cases
import chats
import command_line
import limits
import models
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from differences import largest_difference
from sweep_runs import write_jsonl

import lens_lora as ll
from lens_lora.sweeps import stream
from lens_lora.sweeps.records import each_record

pytestmark = pytest.mark.usefixtures("float64")
WORDS = ["w5 w6 w7 w20 w9", "w7", "w7 w30", "w14 w30 w9 w8", "w5 w6", "w40", "w11 w12 w13", "w9 w9"]
TEXTS = [{"id": f"t{i}", "prompt": words} for i, words in enumerate(WORDS)]
BAD = [*TEXTS[:2], {"id": "bad", "prompt": ""}, *TEXTS[2:]]


@pytest.fixture
def lens() -> ll.LoraLens:
    return cases.case("llama", next(iter(models.MAKERS)), "raw").lens


@pytest.fixture(autouse=True)
def small_windows(monkeypatch) -> None:
    monkeypatch.setattr(stream, "WINDOW_TOKENS", 8)


def run(
    lens, texts, folder: Path, name: str = "activations", **options
) -> ll.results.ActivationsFile:
    options = {"progress": False, "batch_size": 2, **options}
    found = ll.sweep(lens, texts, name, out=folder / "u.parquet", **options)
    assert isinstance(found, ll.results.ActivationsFile)
    assert not (folder / "u.parts").exists()
    return found


def test_the_spread_is_that_of_all_tokens(lens, tmp_path):
    file = run(lens, BAD, tmp_path)
    direct = ll.lora_activations(lens, WORDS)
    for site in (None, "*.attn.o"):
        frame = file.spread(site)
        expected = direct.spread(site)
        assert frame[["site", "rank"]].equals(expected[["site", "rank"]])
        numbers = [table.select_dtypes("float").to_numpy() for table in (frame, expected)]
        np.testing.assert_allclose(*numbers, rtol=1e-9, atol=1e-9)
    drawn = file.plot().data[0]
    assert len(drawn.y) == len(lens.sites)
    assert list(drawn.q3) == list(file.spread()["upper"])


def same(one: ll.results.ActivationsFile, other: ll.results.ActivationsFile) -> None:
    first, second = (pq.read_table(found.path) for found in (one, other))
    assert first.schema.equals(second.schema)
    assert len(first) == len(second)
    for name in first.column_names:
        a = first[name].combine_chunks()
        b = second[name].combine_chunks()
        if name in ("record", "id", "position", "token", "prefix", "sink", "error"):
            assert a.to_pylist() == b.to_pylist()
        else:
            a, b = (x.flatten().to_numpy(zero_copy_only=False) for x in (a, b))
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize(
    ("name", "gauge"), [("activations", "svd"), ("activations_trained", "trained")]
)
def test_rows_equal_direct_calls(cls: str, name: str, gauge, tmp_path):
    lens = cases.case("gpt2", cls, "processed").lens
    found = run(lens, iter(TEXTS), tmp_path, name)
    frame = pd.read_parquet(found.path)
    assert (found.texts, found.errors, found.gauge) == (len(TEXTS), 0, gauge)
    assert found.sites == lens.sites
    assert found.tokens == len(frame)
    assert list(frame["record"].unique()) == list(range(len(TEXTS)))
    for number, text in enumerate(TEXTS):
        direct = ll.lora_activations(lens, text["prompt"], gauge=gauge)
        rows = frame[frame["record"] == number]
        assert list(rows["token"]) == list(direct.str_tokens[0])
        assert set(rows["id"]) == {text["id"]}
        assert rows["position"].tolist() == list(range(len(rows)))
        assert rows["sink"].tolist() == direct.sinks[0].tolist()
        for slot, site in enumerate(lens.sites):
            stacked = np.stack(rows[site.name].tolist())
            assert np.abs(stacked - direct.values[0, slot].numpy()).max() < 1e-10


def test_examples_and_means_are_those_in_memory(lens, tmp_path):
    """Over groups of rows, and a context never crosses into another text."""
    found = run(lens, TEXTS, tmp_path)
    assert pq.ParquetFile(found.path).num_row_groups > 2
    direct = ll.lora_activations(lens, WORDS)
    site = "blocks.1.mlp.down"
    for options in ({"sign": -1}, {"rank": 1, "context": 1}):
        top = found.top(site, 4, **options)
        expected = direct.top(site, 4, **options)
        assert top["value"].tolist() == pytest.approx(expected["value"].tolist(), abs=1e-10)
        renamed = expected.rename(columns={"prompt": "record"})
        for column in ("rank", "record", "position", "token", "context"):
            assert top[column].tolist() == renamed[column].tolist()
        assert top["id"].tolist() == [f"t{number}" for number in top["record"]]
    top, expected = (of.top(site, 4, sinks=True) for of in (found, direct))  # the same BOS: ties
    assert top["value"].tolist() == pytest.approx(expected["value"].tolist(), abs=1e-10)
    for positions in (None, -1, slice(1, 3), [1, 2]):
        assert largest_difference(found.mean(positions), direct.mean(positions)) < 1e-12
    with_sinks = found.mean(sinks=True) - direct.mean(sinks=True)
    assert with_sinks.abs().max() < 1e-12


def test_texts_that_begin_alike(lens, tmp_path, monkeypatch):
    """Conversations over several groups of rows: a token with the same ids before it once."""
    system = {"role": "system", "content": "w5 w6 w7 w8"}
    asked = ["w9", "w9 w10", "w11 w12 w13", "w9", "w14"]
    conversations = [[system, {"role": "user", "content": words}] for words in asked]
    chats.with_template(lens.model, monkeypatch)
    found = run(lens, [{"messages": messages} for messages in conversations], tmp_path)
    direct = ll.lora_activations(lens, conversations)
    assert pq.ParquetFile(found.path).num_row_groups > 2
    frame = pd.read_parquet(found.path)
    assert found.repeated == direct.repeated == len(frame) - frame["prefix"].nunique() - 4 > 10
    assert f"{found.repeated} after the same tokens as earlier" in repr(found)
    site = "blocks.1.mlp.down"
    top, expected = (of.top(site, 40, rank=0) for of in (found, direct))
    assert top["value"].tolist() == pytest.approx(expected["value"].tolist(), abs=1e-10)
    rows = frame.set_index(["record", "position"]).loc[
        list(zip(top["record"], top["position"], strict=True))
    ]
    assert rows["prefix"].is_unique
    for positions in (None, -1, slice(0, 3)):
        assert largest_difference(found.mean(positions), direct.mean(positions)) < 1e-12


class Stopped(Exception):
    pass


def stop_at(monkeypatch, window: int) -> None:
    plain = stream.window_table
    made = []

    def table(*args):
        made.append(None)
        if len(made) == window:
            raise Stopped
        return plain(*args)

    monkeypatch.setattr(stream, "window_table", table)


@pytest.mark.sample(1)
@pytest.mark.parametrize("window", [1, 2, 3])
def test_an_interrupted_run_is_resumed(lens, tmp_path, monkeypatch, window: int):
    """What was written is not run again, also with another batch size."""
    whole = run(lens, BAD, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_at(patch, window)
        with pytest.raises(Stopped):
            run(lens, BAD, stopped)
    assert len(list((stopped / "u.parts").glob("*.parquet"))) == window - 1
    rows = []
    plain = stream.site_activations

    def counted(f, *args):
        rows.append(f.rows.batch)
        return plain(f, *args)

    monkeypatch.setattr(stream, "site_activations", counted)
    with pytest.warns(UserWarning, match="1 of 9 records"):
        same(run(lens, BAD, stopped, batch_size=3), whole)
    ran = sum(rows)
    rows.clear()
    with pytest.warns(UserWarning, match="1 of 9 records"):
        same(run(lens, BAD, stopped), whole)
    assert ran == len(TEXTS) - (0, 2, 4)[window - 1]
    assert not rows


def test_a_bad_record_is_named_and_its_correction_is_run(lens, tmp_path):
    with pytest.warns(UserWarning, match="1 of 9 records have no numbers"):
        found = run(lens, BAD, tmp_path)
    assert (found.texts, found.errors) == (9, 1)
    bad = found.bad()
    assert bad["id"].tolist() == ["bad"]
    assert "row 2: no prompt." in bad["error"].iloc[0]
    top = found.top("blocks.0.attn.q", 50, sinks=True)
    assert 2 not in top["record"].tolist()
    assert not found.mean().isnan().any()
    corrected = [*BAD[:2], {"id": "bad", "prompt": "w8 w8 w8 w8 w8 w8"}, *BAD[3:]]
    again = run(lens, corrected, tmp_path)
    same(again, run(lens, corrected, tmp_path / "anew"))


def test_more_records_are_added_at_the_end(lens, tmp_path):
    run(lens, TEXTS[:5], tmp_path)
    same(run(lens, TEXTS, tmp_path), run(lens, TEXTS, tmp_path / "anew"))


def test_only_one_window_of_records_is_read_ahead(lens, tmp_path, monkeypatch):
    """The stream is read as it is run: at each window no later record has come by."""
    read = []
    seen = []

    def texts() -> Iterator[dict[str, str]]:
        for text in TEXTS:
            read.append(text)
            yield text

    plain = stream.window_table

    def table(lens, window, *args):
        seen.append((len(read), window[-1].number))
        return plain(lens, window, *args)

    monkeypatch.setattr(stream, "window_table", table)
    found = run(lens, texts(), tmp_path)
    assert len(seen) > 2
    assert all(count <= last + 2 for count, last in seen)
    assert found.texts == len(TEXTS)


def test_damaged_parts_are_run_again(lens, tmp_path, monkeypatch):
    whole = run(lens, TEXTS, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stopped):
            run(lens, TEXTS, tmp_path)
    part = sorted((tmp_path / "u.parts").glob("*.parquet"))[0]
    part.write_bytes(part.read_bytes()[:-7])
    with pytest.warns(UserWarning, match="could not be read"):
        same(run(lens, TEXTS, tmp_path), whole)


def test_processes_share_the_records(lens, tmp_path, monkeypatch):
    """Every block of records is one process's, and all together are the whole."""
    monkeypatch.setattr(stream, "BLOCK", 3)
    shares: list[list[int]] = []
    for index in range(2):
        records = each_record(TEXTS, with_answers=False)
        windows = stream.Windows(lens, records, [], limits.one_process(index, 2))
        shares.append([text.number for window in windows for text in window])
    assert shares == [[0, 1, 2, 6, 7], [3, 4, 5]]


@pytest.mark.bad_input
def test_other_sweeps_and_records_are_refused(lens, tmp_path):
    found = run(lens, TEXTS, tmp_path)
    before = found.path.read_bytes()
    other = [{**TEXTS[0], "prompt": "w50"}, *TEXTS[1:]]
    out = {"out": found.path, "progress": False}
    for fact, records, options in (
        ("other ids or prompts", other, {}),
        ("the results hold 8 records, and there are 3", TEXTS[:3], {}),
        ("analyses", TEXTS, {"analyses": "activations_trained"}),
        ("analyses", [{**t, "doc": "w8", "pre": "w9"} for t in TEXTS], {"analyses": "first_order"}),
        ("run it alone", TEXTS, {"analyses": ["first_order", "activations"]}),
        ("no readout", TEXTS, {"readout": ll.Logit("w8")}),
        ("batch_size", TEXTS, {"batch_size": 0}),
        ("no record", [], {}),
    ):
        options = {"analyses": "activations", **out, **options}
        with pytest.raises(ll.errors.SweepError, match=fact):
            ll.sweep(lens, records, **options)
    scaled = lens.with_adapter(lens.adapter.scaled(0.5))
    with pytest.raises(ll.errors.SweepError, match="adapter_weights"):
        ll.sweep(scaled, TEXTS, "activations", **out)
    assert found.path.read_bytes() == before
    anew = run(scaled, TEXTS[:3], tmp_path, resume=False)
    assert anew.texts == 3
    plain = [{"prompt": "w5", "doc": "w8", "pre": "w9"}]
    first = ll.sweep(lens, plain, out=tmp_path / "first.parquet", progress=False)
    for path in (tmp_path / "none.parquet", first.path):
        with pytest.raises(ll.errors.SweepError, match=r"no such file|no activations"):
            ll.results.ActivationsFile(path)


@pytest.mark.sample(2)
@pytest.mark.bad_input
@pytest.mark.parametrize("change", ["a row less", "a row more", "other groups", "a column", "rank"])
def test_rows_that_were_changed_are_refused(lens, tmp_path, change: str):
    """With the notes of the sweep still in the file."""
    path = run(lens, TEXTS, tmp_path).path
    with pq.ParquetFile(path) as file:
        groups = [file.read_row_group(i) for i in range(file.num_row_groups)]
    name = lens.sites[0].name
    if change == "a row less":
        groups[1] = groups[1].slice(1)
    elif change == "a row more":
        groups[0] = pa.concat_tables([groups[0], groups[0].slice(0, 1)])
    elif change == "other groups":
        groups = [pa.concat_tables(groups)]
    elif change == "a column":
        groups = [group.drop_columns([name]) for group in groups]
    else:
        wide = [pa.array([[0.0] * 9] * len(g), pa.list_(pa.float64(), 9)) for g in groups]
        index = groups[0].schema.get_field_index(name)
        groups = [g.set_column(index, name, w) for g, w in zip(groups, wide, strict=True)]
    schema = groups[0].schema.with_metadata(pq.read_schema(path).metadata)
    with pq.ParquetWriter(path, schema) as writer:
        for group in groups:
            writer.write_table(group)
    fact = f"{name} has" if change in ("a column", "rank") else "rows in"
    with pytest.raises(ll.errors.SweepError, match=fact) as caught:
        ll.results.ActivationsFile(path)
    assert str(path) in str(caught.value)


def test_a_number_that_is_not_finite_fails_one_record(lens, tmp_path):
    """Its batch is run again text by text."""
    token = lens.prompts("w40").tokens[0, -1]
    own = lens.model.W_E[token].detach().clone()

    def blow(value: torch.Tensor, hook: object) -> torch.Tensor:
        del hook
        is_own = (value == own).all(-1, keepdim=True)
        return torch.where(is_own, torch.inf, value)

    lens.model.add_hook(lens.plan.host.block_input(0), blow)
    try:
        with pytest.warns(UserWarning, match="1 of 8 records"):
            found = run(lens, TEXTS, tmp_path, batch_size=8)
    finally:
        lens.model.reset_hooks()
    assert found.bad()["id"].tolist() == ["t5"]
    assert "not finite" in found.bad()["error"].iloc[0]
    rest = [text for text in TEXTS if text["id"] != "t5"]
    expected = run(lens, rest, tmp_path / "rest").mean()
    assert largest_difference(found.mean(), expected) < 1e-12


def test_the_command_reads_texts_without_answers(lens, tmp_path, monkeypatch):
    """`lens-lora sweep --analysis activations`, of the first records only."""
    from typer.testing import CliRunner

    from lens_lora.cli import app

    command_line.commands_have(monkeypatch, lens)
    monkeypatch.setattr(ll, "load_adapter", lambda path: lens.adapter)
    records = write_jsonl(tmp_path / "texts.jsonl", BAD)
    out = tmp_path / "u.parquet"
    asked = ["sweep", "--prompts", records, "--out", out, "--analysis", "activations"]
    ran = CliRunner().invoke(app, [*map(str, asked), "--limit", "4", "--quiet"])
    assert ran.exit_code == 0, ran.output
    assert "4 texts (1 with errors)" in ran.output
    assert "bad: line 3: no prompt." in ran.output
    found = ll.results.ActivationsFile(out)
    assert (found.texts, found.errors) == (4, 1)


def test_a_conversation_has_the_ids_of_the_template(lens, tmp_path, monkeypatch):
    """Beside texts, and resumed as they are."""
    chats.with_template(lens.model, monkeypatch)
    messages = [{"role": "user", "content": "w5 w6"}]
    records = [{"id": "chat", "messages": messages}, TEXTS[1]]
    found = run(lens, records, tmp_path)
    ids = pq.read_table(found.path)["id"].to_pylist()
    assert ids.count("chat") == int(lens.prompts(messages).lengths) > 3
    same(found, run(lens, records, tmp_path))


def test_a_text_that_reads_like_a_conversation_is_another_record(lens, tmp_path, monkeypatch):
    """Where the template writes no BOS, a string of its text gets one, and has other ids."""
    plain = chats.TEMPLATE.removeprefix("{{ bos_token }}")
    monkeypatch.setattr(lens.model.tokenizer, "chat_template", plain)
    messages = [{"role": "user", "content": "w5 w6"}]
    run(lens, [{"id": "a", "messages": messages}], tmp_path)
    text = lens.prompts(messages).texts[0]
    with pytest.raises(ll.errors.SweepError, match="record"):
        run(lens, [{"id": "a", "prompt": text}], tmp_path)
