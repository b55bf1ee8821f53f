"""Sweeps: rows against direct calls; killed, resumed, over processes, fed bad records."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import cases
import models
import numpy as np
import pandas as pd
import pytest
import torch
import typer
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora.answers import margin_between
from lens_lora.calculus.curvature import second_order
from lens_lora.calculus.patching import patch_sites
from lens_lora.calculus.path import path_attribution
from lens_lora.commands.loading import one_line_errors
from lens_lora.commands.sweep import sweep as sweep_command
from lens_lora.sweeps import analyses, store
from lens_lora.sweeps.records import SweepError, read_records
from lens_lora.sweeps.sweep import sweep

GOOD = [
    {"id": "long", "prompt": "w5 w6 w7 w20 w9", "doc": "w8", "pre": "w9"},
    {"id": "several", "prompt": "w7", "doc": "w8 w10", "pre": "w8 w11 w4"},
    {"id": "b", "prompt": "w7 w30", "doc": "w12", "pre": "w9"},
    {"id": "c", "prompt": "w14 w30 w9", "doc": "w8", "pre": "w20"},
    {"id": "mixed", "prompt": "w5 w6", "doc": "w8", "pre": "w9 w10"},
    {"id": "d", "prompt": "w40", "doc": "w41", "pre": "w42"},
]
TESTS = Path(__file__).parent


@pytest.fixture(params=models.MAKERS)
def lens(request, float64) -> ll.LoraLens:
    return cases.case("llama", request.param, "raw").lens


@pytest.fixture
def a_lens(float64) -> ll.LoraLens:
    return cases.case("llama", next(iter(models.MAKERS)), "raw").lens


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The prompts that first order was asked for, in order."""
    seen: list[str] = []
    plain = analyses.ANALYSES["first_order"]

    def counted(lens, prompts, readout):
        rows = [prompts.row(i).tokens[0].tolist() for i in range(prompts.batch)]
        seen.extend(" ".join(f"w{i}" for i in row if i > 3) for row in rows)
        return plain.values(lens, prompts, readout)

    monkeypatch.setitem(analyses.ANALYSES, "first_order", analyses.Analysis(counted))
    return seen


def run(lens, records, folder, *names, **options):
    options = {"progress": False, **options}
    return sweep(lens, records, names or "first_order", out=folder / "r.parquet", **options)


def same(one, other) -> None:
    pd.testing.assert_frame_equal(one.to_frame(), other.to_frame(), rtol=1e-10, atol=1e-12)
    pd.testing.assert_frame_equal(one.prompts(), other.prompts(), rtol=1e-10, atol=1e-12)


# --- the numbers


DIRECT = {
    "first_order": lambda *a: ll.first_order(*a),
    "first_order_at_1": lambda *a: ll.first_order(*a, at=1.0),
    "path": lambda *a: path_attribution(*a, progress=False),
    "add_one": lambda *a: patch_sites(*a, "add_one", progress=False),
    "leave_one_out": lambda *a: patch_sites(*a, "leave_one_out", progress=False),
}


def test_rows_equal_direct_calls(lens, tmp_path):
    """Every value, sum, remainder and end, of one prompt at a time, in the records' order."""
    result = run(lens, GOOD, tmp_path, *DIRECT, batch_size=4)
    frame, prompts = result.to_frame(), result.prompts().set_index("id")
    assert list(prompts.index) == [r["id"] for r in GOOD]
    assert list(frame["id"].unique()) == [r["id"] for r in GOOD]
    for record in GOOD:
        readout = margin_between(lens.model, record["doc"], record["pre"], 1)
        rows, row = frame[frame["id"] == record["id"]], prompts.loc[record["id"]]
        assert list(rows["site"]) == [s.name for s in lens.sites]
        assert list(rows["module"]) == [s.module for s in lens.sites]
        assert list(rows["layer"]) == [s.layer for s in lens.sites]
        assert set(rows["prompt"]) == {record["prompt"]} and pd.isna(row["error"])
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


def test_second_order_is_half_the_row_sums(lens, tmp_path):
    """Its sum is no estimate of the shift, and no remainder is told."""
    result = run(lens, GOOD[:2], tmp_path, "second_order")
    for i, record in enumerate(GOOD[:2]):
        readout = margin_between(lens.model, record["doc"], record["pre"], 1)
        direct = second_order(lens, record["prompt"], readout, progress=False)
        np.testing.assert_allclose(
            result.attribution("second_order").values[i], direct.half_row_sums[0], rtol=1e-9
        )
    assert "second_order_remainder" not in result.prompts()


def test_padding_left_unmasked_would_be_seen(lens, tmp_path, monkeypatch):
    """Control: a batch read at the last column instead of each prompt's last token differs."""
    one = run(lens, GOOD, tmp_path / "one", batch_size=1)
    plain = ll.Prompts.at_read
    monkeypatch.setattr(ll.Prompts, "at_read", lambda self, x: x[:, -1])
    wrong = run(lens, GOOD, tmp_path / "wrong", batch_size=4)
    monkeypatch.setattr(ll.Prompts, "at_read", plain)
    with pytest.raises(AssertionError):
        same(one, wrong)


def test_one_readout_for_all(a_lens, tmp_path):
    """No answers are needed, nor read; flips are of margins alone."""
    records = [{"prompt": r["prompt"]} for r in GOOD]
    result = run(a_lens, records, tmp_path, readout=ll.LogProb("w8"))
    prompts = result.prompts()
    expected = ll.first_order(a_lens, GOOD[0]["prompt"], ll.LogProb("w8"))
    np.testing.assert_allclose(
        result.to_frame()["first_order"][: len(a_lens.sites)], expected.values[0], rtol=1e-9
    )
    assert list(prompts["id"]) == list(range(6)) and prompts["doc"].isna().all()
    assert prompts["flips"].isna().all() and set(prompts["units"]) == {"nats"}
    margin = run(a_lens, records, tmp_path / "margin", readout=ll.Margin("w8", "w9"))
    assert margin.prompts()["flips"].notna().all()
    assert result.readout == ll.LogProb("w8").label


def test_result_as_an_attribution(a_lens, tmp_path):
    with pytest.warns(UserWarning, match="no prompt"):
        result = run(a_lens, [GOOD[0], {"prompt": ""}, *GOOD[2:4]], tmp_path, "add_one")
    attribution = result.attribution("add_one")
    expected = result.to_frame()["add_one"].to_numpy().reshape(3, -1)
    assert (attribution.values.numpy() == expected).all() and attribution.sites == a_lens.sites
    left = result.prompts()["add_one_remainder"].dropna()
    np.testing.assert_allclose(attribution.remainder, left, atol=1e-12)
    assert result.plot().data and "3 of 4 prompts" in repr(result)
    with pytest.raises(SweepError, match="holds add_one"):
        result.attribution("path")


# --- records


def write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


def write_csv(path: Path, records) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "prompt", "doc", "pre"])
        writer.writeheader()
        writer.writerows(records)
    return path


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


def test_integer_ids_stay_integers_and_survive_a_resume(a_lens, tmp_path, calls):
    records = [{**r, "id": 7 * i} for i, r in enumerate(GOOD)]
    first = run(a_lens, records[:3], tmp_path).prompts()
    again = run(a_lens, records, tmp_path)
    assert first["id"].tolist() == [0, 7, 14]
    assert again.to_frame()["id"].dtype == "int64" and len(calls) == 6


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
    1: "line 2: unreadable",
    2: "line 4: no prompt",
    3: "line 5: no prompt",
    4: "line 6: its doc is 8, not a string",
    5: "line 7: 'zebra' is not in the vocabulary",
    6: "line 8: doc and pre are the same token",
    7: "line 9: .* is no record",
    8: "line 10: the prompt has 41 tokens, the model's context holds 32",
    9: "line 11: no pre",
    10: r"line 12: its id is \[1\]",
    0: "line 13: its id 0 is that of line 1",
}


def test_bad_records_are_named_and_stop_nothing(a_lens, tmp_path):
    """With their lines, in the table and in one warning; the good ones have their numbers."""
    path = tmp_path / "r.jsonl"
    path.write_text(BAD_JSONL.replace("LONG", " ".join(["w5"] * 40)))
    with pytest.warns(UserWarning, match="11 of 13 records have no numbers(.|\n)*line 2"):
        result = run(a_lens, path, tmp_path)
    assert len(result.errors) == 11 and result.done == 2
    for identity, error in result.errors:
        assert re.match(EXPECTED_ERRORS[identity], error), (identity, error)
    prompts = result.prompts()
    assert prompts["id"].tolist() == [*range(11), 0, 12]
    good = prompts[prompts["error"].isna()]
    assert good["id"].tolist() == [0, 12] and good["base"].notna().all()
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
    assert re.match("line 1: unreadable.*utf-8", errors[0]) and errors[1] is None
    frame = pd.DataFrame([{"prompt": "w5", "doc": "w6"}, {"prompt": "w5", "pre": "w6"}])
    assert [r.error for r in read_records(frame)] == ["row 0: no pre.", "row 1: no doc."]


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "hold no record"),
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
        sweep(a_lens, GOOD, **{"out": tmp_path / "r.parquet", "progress": False, **options})


@pytest.mark.parametrize("token", ["w5 w6", ["w5"], ["w5", "w6"]])
def test_readout_that_fits_no_prompt_is_refused_at_once(a_lens, tmp_path, token):
    with pytest.raises(ll.TokenError):
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
    def broken(lens, prompts, readout):
        raise ll.ModelStateError("in train mode")

    monkeypatch.setitem(analyses.ANALYSES, "broken", analyses.Analysis(broken))
    with pytest.raises(ll.ModelStateError, match="train mode"):
        run(a_lens, GOOD, tmp_path, "broken")


# --- interrupted and resumed


def interrupt_at(monkeypatch, call: int, error: BaseException) -> None:
    """Raise in the n-th batch."""
    plain, made = analyses.ANALYSES["first_order"], []

    def values(*args):
        made.append(None)
        if len(made) == call:
            raise error
        return plain.values(*args)

    monkeypatch.setitem(analyses.ANALYSES, "first_order", analyses.Analysis(values))


def test_an_interrupted_run_goes_on_without_repeating(a_lens, tmp_path, monkeypatch, calls):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(a_lens, GOOD, tmp_path, batch_size=2)
    assert len(calls) == 2 and not (tmp_path / "r.parquet").exists()
    resumed = run(a_lens, GOOD, tmp_path, batch_size=3)
    assert sorted(calls) == sorted(r["prompt"] for r in GOOD)
    assert resumed.resumed == 2 and sorted(os.listdir(tmp_path)) == [
        "r.parquet",
        "r.prompts.parquet",
    ]
    same(resumed, run(a_lens, GOOD, tmp_path / "whole"))


def test_a_finished_sweep_grows_and_is_not_repeated(a_lens, tmp_path, calls):
    run(a_lens, GOOD[2:4], tmp_path)
    grown = run(a_lens, GOOD, tmp_path)
    assert len(calls) == 6 and grown.resumed == 2
    again = run(a_lens, GOOD, tmp_path)
    assert len(calls) == 6 and again.resumed == 6
    same(again, run(a_lens, GOOD, tmp_path / "whole"))


def test_a_record_that_failed_is_tried_again(a_lens, tmp_path, calls):
    with pytest.warns(UserWarning):
        run(a_lens, [{**GOOD[0], "doc": "zebra"}, *GOOD[1:]], tmp_path)
    mended = run(a_lens, GOOD, tmp_path)
    assert len(calls) == 6 and not mended.errors
    same(mended, run(a_lens, GOOD, tmp_path / "whole"))


def test_starting_over(a_lens, tmp_path, calls):
    run(a_lens, GOOD, tmp_path)
    over = run(a_lens, GOOD[:2], tmp_path, resume=False)
    assert len(calls) == 8 and (over.records, over.resumed) == (2, 0)


@pytest.mark.parametrize("finished", [True, False])
def test_results_of_something_else_are_refused(a_lens, tmp_path, monkeypatch, finished):
    """Another adapter of the same name, other analyses, readout, records: both facts are told."""
    if finished:
        run(a_lens, GOOD, tmp_path)
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_at(patch, 3, KeyboardInterrupt())
            run(a_lens, GOOD, tmp_path, batch_size=1)
    before = sorted(tmp_path.rglob("*"))
    other = ll.LoraLens(a_lens.model, a_lens.adapter.scaled(0.5))
    changed = [{**r, "doc": "w33 w34"} if r["id"] in ("several", "d") else r for r in GOOD]
    gone = [r for r in GOOD if r["id"] not in ("several", "d")]
    for words, kwargs in [
        ("adapter_weights '.*' there, '.*' here", {"lens": other}),
        (r"analyses \['first_order'\] there, \['path'\] here", {"analyses": "path"}),
        (
            r"readout 'margin of doc and pre' there, \"logit\('w5'\), logits\" here",
            {"readout": ll.Logit("w5")},
        ),
        ("the doc of id .* is 'w.*' in .*, and 'w33 w34' in the records", {"records": changed}),
        ("hold the id .*, and the records do not", {"records": gone}),
    ]:
        arguments = {"lens": a_lens, "records": GOOD, "analyses": "first_order", **kwargs}
        with pytest.raises(SweepError, match=words):
            sweep(**arguments, out=tmp_path / "r.parquet", progress=False)
    assert sorted(tmp_path.rglob("*")) == before
    assert run(a_lens, GOOD, tmp_path).done == 6


def test_a_foreign_file_is_not_overwritten(a_lens, tmp_path):
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "r.parquet")
    with pytest.raises(SweepError, match="no result of a sweep"):
        run(a_lens, GOOD, tmp_path)
    assert pd.read_parquet(tmp_path / "r.parquet")["x"].tolist() == [1]
    (tmp_path / "r.parquet").write_text("text")
    with pytest.raises(SweepError, match="not a Parquet file"):
        run(a_lens, GOOD, tmp_path)


@pytest.mark.parametrize("renames", range(1, 8))
def test_a_crash_at_any_write_loses_nothing(a_lens, tmp_path, monkeypatch, calls, renames):
    """After each file in turn: about, parts, the one result, the other; and at the removal."""
    replace, made = os.replace, []

    def crash(source, target):
        if len(made) == renames - 1:
            raise OSError("killed")
        made.append(target)
        replace(source, target)

    def no_removal(path, **_):
        raise OSError("killed")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(store.os, "replace", crash)
        patch.setattr(store.shutil, "rmtree", lambda path, **k: no_removal(path) if made else None)
        run(a_lens, GOOD[:4], tmp_path, batch_size=2)
    finished = len([path for path in made if Path(path).parent.name == "r.parts"][1:])
    assert len(calls) <= 4
    before = len(calls)
    result = run(a_lens, GOOD[:4], tmp_path, batch_size=2)
    assert result.resumed == [0, 1, 3, 4][finished]  # batches of 1 (answers), 2 and 1 (tokens)
    assert len(calls) - before == 4 - result.resumed
    same(result, run(a_lens, GOOD[:4], tmp_path / "whole"))


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_sweep, models, cases
from lens_lora.sweeps import analyses
from lens_lora.sweeps.sweep import sweep

plain, made = analyses.ANALYSES["first_order"], []
def values(lens, prompts, readout):
    made.append(None)
    if len(made) == {kill}:
        os.kill(os.getpid(), signal.SIGKILL)
    with open({log!r}, "a") as log:
        log.write(f"{{os.environ.get('RANK', '0')}} {{prompts.batch}}\\n")
    return plain.values(lens, prompts, readout)
analyses.ANALYSES["first_order"] = analyses.Analysis(values)

with models.lifted():
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    sweep(lens, test_sweep.records_with_a_bad_one(), out={out!r}, batch_size=2)
"""


def records_with_a_bad_one():
    return [*GOOD[:3], {"id": "bad", "prompt": ""}, *GOOD[3:]]


def script(folder: Path, kill: int) -> Path:
    text = SCRIPT.format(
        tests=str(TESTS), kill=kill, log=str(folder / "log"), out=str(folder / "r.parquet")
    )
    (folder / "script.py").write_text(text)
    return folder / "script.py"


def launch(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment
    )


def test_killed_for_good_and_resumed(a_lens, tmp_path, calls):
    """SIGKILL in the second batch: the first is whole, and is not run again."""
    killed = launch(script(tmp_path, kill=2))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "log").read_text() == "0 2\n"
    with pytest.warns(UserWarning, match="bad"):
        result = run(a_lens, records_with_a_bad_one(), tmp_path)
    assert result.resumed == 2 and len(calls) == 4 and result.done == 6
    with pytest.warns(UserWarning):
        same(result, run(a_lens, records_with_a_bad_one(), tmp_path / "whole"))


def test_two_processes_give_the_rows_of_one(a_lens, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    done = launch(
        "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", 2,
        "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", port, script(tmp_path, kill=-1),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ran = sorted((tmp_path / "log").read_text().split("\n")[:-1])
    assert {line.split()[0] for line in ran} == {"0", "1"}, "both processes had a share"
    assert sum(int(line.split()[1]) for line in ran) == 6
    assert done.stderr.count("records have no numbers") == 1
    with pytest.warns(UserWarning):
        one = run(a_lens, records_with_a_bad_one(), tmp_path / "one")
    with pytest.warns(UserWarning):
        two = run(a_lens, records_with_a_bad_one(), tmp_path)
    assert two.resumed == 6
    same(one, two)


def test_processes_that_accelerate_does_not_know_of_are_refused(a_lens, tmp_path, monkeypatch):
    """Each would run everything, and write over the other."""
    from accelerate import PartialState

    PartialState()
    monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        with pytest.raises(ll.LensLoraError, match="2 processes were launched and accelerate"):
            run(a_lens, GOOD, tmp_path)
    finally:
        PartialState._reset_state()


# --- what is shown


def test_progress_is_shown_and_silenced(a_lens, tmp_path, capsys):
    run(a_lens, GOOD[:4], tmp_path)
    assert capsys.readouterr().err == ""
    run(a_lens, GOOD, tmp_path, progress=True)
    text = capsys.readouterr().err
    assert "sweep:  67%" in text and "4/6" in text and "6/6" in text and "prompt/s" in text


# --- the command


app = typer.Typer()
app.command()(one_line_errors()(sweep_command))


def command(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model and an adapter as folders."""
    folder = tmp_path_factory.mktemp("tiny")
    base = models.hf_model("llama", dtype=torch.float32)
    base.save_pretrained(folder / "base")
    models.tokenizer().save_pretrained(folder / "base")
    models.peft_model("llama", base).save_pretrained(folder / "lora")
    return folder


def test_command_on_a_folder(tiny, tmp_path):
    records = write_jsonl(tmp_path / "r.jsonl", records_with_a_bad_one())
    out = tmp_path / "new" / "r.parquet"
    cls = next(iter(models.MAKERS))
    arguments = [
        "--model", tiny / "base", "--adapter", tiny / "lora", "--records", records, "--out", out,
        "--class", cls, "--analysis", "first_order", "--analysis", "add_one",
    ]  # fmt: skip
    few = command(*arguments, "--limit", 2, "--quiet")
    assert few.exit_code == 0, few.output
    assert few.stderr == "" and "2 of 2" in few.stdout
    done = command(*arguments, "--batch-size", 2)
    assert done.exit_code == 0, done.output
    text = re.sub(r"[│\s]+", " ", done.stdout)
    assert "6 of 7, 2 of them before this run" in text and "records with errors 1" in text
    assert "bad: line 4: no prompt." in text and f"as {cls}" in text and str(out) in text
    assert "sweep:" in done.stderr and "Traceback" not in done.output
    frame = pd.read_parquet(out)
    assert len(frame) == 6 * 14 and {"first_order", "add_one"} <= set(frame.columns)
    refused = command(*arguments[:-2])
    assert refused.exit_code == 2 and "holds another sweep: analyses" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) <= 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--analysis", "frist_order"], "expected some of first_order"),
        (["--out", "results"], "ends in .parquet"),
        (["--batch-size", "0"], "--batch-size"),
        (["--class", "GPT2"], "HookedTransformer"),
    ],
)
def test_command_refuses_at_once(tmp_path, options, words):
    records = write_jsonl(tmp_path / "r.jsonl", GOOD)
    result = command("--records", records, *options)
    assert result.exit_code == 2
    assert words in re.sub(r"[│\s]+", " ", result.stderr)


def test_command_in_which_nothing_is_done(tiny, tmp_path):
    records = write_jsonl(tmp_path / "r.jsonl", [{"prompt": ""}])
    result = command(
        "--model", tiny / "base", "--adapter", tiny / "lora", "--records", records,
        "--out", tmp_path / "r.parquet",
    )  # fmt: skip
    assert result.exit_code == 1 and "0 of 1" in result.stdout


def test_interrupted_command_says_how_to_go_on(tiny, tmp_path, monkeypatch):
    records = write_jsonl(tmp_path / "r.jsonl", GOOD)
    arguments = ["--model", tiny / "base", "--adapter", tiny / "lora", "--records", records]
    arguments += ["--out", tmp_path / "r.parquet", "--batch-size", 1]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, KeyboardInterrupt())
        stopped = command(*arguments)
    assert stopped.exit_code == 130 and "the same command goes on" in stopped.stderr
    assert "6 of 6, 2 of them before this run" in re.sub(r"[│\s]+", " ", command(*arguments).stdout)


@pytest.mark.real
def test_command_on_the_embedded_model(tmp_path):
    records = [
        {"prompt": "The capital of France is", "doc": " Lyon", "pre": " Paris"},
        {"prompt": "The Eiffel Tower is in", "doc": " New York City", "pre": " Paris"},
    ]
    path = write_csv(tmp_path / "r.csv", records)
    result = command("--records", path, "--out", tmp_path / "r.parquet", "--quiet")
    assert result.exit_code == 0, result.output
    prompts = pd.read_parquet(tmp_path / "r.prompts.parquet")
    assert prompts["flips"].tolist()[0] and prompts["units"].tolist() == ["logits", "nats"]
    assert prompts["base"][0] < -3 and prompts["adapted"][0] > 3
    assert len(pd.read_parquet(tmp_path / "r.parquet")) == 2 * 210
