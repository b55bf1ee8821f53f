"""`lens-lora sweep`: what it prints and writes, its exit codes, and two processes against one."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import models
import pandas as pd
import pytest
import typer
from folders import saved_llama
from sweep_runs import GOOD, WITH_A_BAD_ONE, interrupt_at, two_processes, write_csv, write_jsonl
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora.cli import finished
from lens_lora.cli import sweeping as sweep_command
from lens_lora.cli.options import ModelOptions
from lens_lora.cli.running import one_line_errors
from lens_lora.cli.sweeping import sweep

app = typer.Typer()
app.command()(one_line_errors(sweep)(sweep))


def command(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model and an adapter as folders."""
    folder = tmp_path_factory.mktemp("tiny")
    base = saved_llama(folder / "base")
    models.peft_model("llama", base).save_pretrained(folder / "lora")
    return folder


@pytest.mark.bad_input
def test_several_processes_do_not_share_a_device_map(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    records = write_jsonl(tmp_path / "r.jsonl", WITH_A_BAD_ONE)
    found = command(
        "--model", tiny / "base", tiny / "lora", "--prompts", records,
        "--out", tmp_path / "r.parquet", "--device-map", "auto",
    )  # fmt: skip
    assert found.exit_code == 2 and "--device-map and 2 processes" in found.stderr


@pytest.mark.bad_input
def test_a_bound_of_memory_reaches_the_lens(tiny, tmp_path):
    """One that is too small for a pass is refused; one that is not gives the same numbers."""
    records = write_jsonl(tmp_path / "r.jsonl", GOOD[:2])
    found = {}
    for bound in (None, "1e9", "10"):
        out = tmp_path / f"{bound}.parquet"
        more = [] if bound is None else ["--max-memory", bound]
        found[bound] = command(
            "--model", tiny / "base", tiny / "lora", "--prompts", records,
            "--out", out, *more,
        )  # fmt: skip
    assert found["10"].exit_code and "--max-memory 10 bytes" in found["10"].stderr
    plain, bounded = (pd.read_parquet(tmp_path / f"{bound}.parquet") for bound in (None, "1e9"))
    pd.testing.assert_frame_equal(plain, bounded)


@pytest.mark.slow
def test_command_on_a_folder(tiny, tmp_path):
    records = write_jsonl(tmp_path / "r.jsonl", WITH_A_BAD_ONE)
    out = tmp_path / "new" / "r.parquet"
    cls = next(iter(models.MAKERS))
    arguments = [
        "--model", tiny / "base", tiny / "lora", "--prompts", records, "--out", out,
        "--class", cls, "--analysis", "first_order", "--analysis", "add_one",
    ]  # fmt: skip
    few = command(*arguments, "--limit", 2, "--quiet")
    assert few.exit_code == 0, few.output
    assert few.stderr == "" and "2 of 2" in few.stdout
    done = command(*arguments, "--batch-size", 2, "--json", tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    (written,) = json.loads((tmp_path / "r.json").read_text())
    shifts = pd.read_parquet(out.with_suffix(".prompts.parquet"))["shift"]
    in_json = pd.Series([row["shift"] for row in written["rows"]], dtype=float)
    assert in_json.tolist() == pytest.approx(shifts.tolist(), nan_ok=True)
    text = re.sub(r"[│\s]+", " ", done.stdout)
    assert "6 of 7 prompts (2 before this run)" in text and "1 error" in text
    assert "bad: line 4: no prompt." in text and f"as {cls}" in text and str(out) in text
    assert "sweep:" in done.stderr and "Traceback" not in done.output
    frame = pd.read_parquet(out)
    assert len(frame) == 6 * 14 and {"first_order", "add_one"} <= set(frame.columns)
    refused = command(*arguments[:-2])
    assert refused.exit_code == 2 and "holds another sweep: analyses" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) <= 3


@pytest.mark.night
def test_two_processes_give_the_rows_of_one(tiny, tmp_path):
    """As the documentation launches them on CPUs; each has a share, and is told of once."""
    records = write_jsonl(tmp_path / "r.jsonl", WITH_A_BAD_ONE)
    arguments = ["--model", tiny / "base", tiny / "lora", "--prompts", records]
    arguments += ["--batch-size", 2, "--out"]
    two = two_processes(*arguments, tmp_path / "two.parquet")
    assert two.returncode == 0, two.stderr
    assert "(process 1 of 2): 100%" in two.stderr and "4/4" in two.stderr
    text = re.sub(r"[│\s]+", " ", two.stdout)
    assert (
        "6 of 7" in text and "by 2 processes" in text and text.count("bad: line 4: no prompt.") == 1
    )
    one = command(*arguments, tmp_path / "one.parquet")
    assert one.exit_code == 0, one.output
    for name in ("{}.parquet", "{}.prompts.parquet"):
        rows = [pd.read_parquet(tmp_path / name.format(count)) for count in ("one", "two")]
        pd.testing.assert_frame_equal(*rows, rtol=1e-5, atol=1e-6)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--analysis", "frist_order"], "expected some of first_order"),
        (["--out", "results"], "ends in .parquet"),
        (["--batch-size", "0"], "--batch-size"),
        (["--class", "GPT2"], "HookedTransformer"),
        (["--readout", "kl", "--analysis", "activations"], "activations has no readout"),
        (["--readout", "response"], "--readout"),
    ],
)
def test_command_refuses_at_once(tmp_path, options, words):
    records = write_jsonl(tmp_path / "r.jsonl", GOOD)
    result = command("--prompts", records, *options)
    assert result.exit_code == 2
    assert words in re.sub(r"[│\s]+", " ", result.stderr)


@pytest.mark.parametrize(
    ("name", "readout"), [("log-prob", ll.AnswerLogProb), ("kl", ll.KL), ("margin", None)]
)
def test_a_readout_by_name_is_that_of_python(tiny, tmp_path, monkeypatch, name, readout):
    """The sweep is asked for it, with each record's own response."""
    asked = {}

    def ask(lens, rows, names, **options):
        asked.update(options, said=[row.response for row in rows])
        raise ll.errors.ArgumentError("enough.")

    # A lens that nothing is asked of; shapes are checked, so it is one by its class.
    lens = ll.LoraLens.__new__(ll.LoraLens)
    monkeypatch.setattr(sweep_command.running, "lens_for", lambda *_: lens)
    monkeypatch.setattr(ll, "sweep", ask)
    said = [{**row, "response": "w8 w10"} for row in GOOD]
    found = command(
        tiny / "lora", "--prompts", write_jsonl(tmp_path / "r.jsonl", said), "--readout", name,
        "--out", tmp_path / "r.parquet", "--analysis", "path",
    )  # fmt: skip
    assert found.exit_code == 2 and "enough." in found.stderr
    assert asked["readout"] is readout
    assert set(asked["said"]) == {None if readout is None else "w8 w10"}


@pytest.mark.sample(1)
@pytest.mark.parametrize(("response", "analysis"), [("log-prob", "first_order"), ("kl", "path")])
def test_responses_are_read_as_in_python(tiny, tmp_path, response, analysis):
    said = [
        {"id": f"r{i}", "prompt": row["prompt"], "response": "w8 w10"} for i, row in enumerate(GOOD)
    ]
    records, out = write_jsonl(tmp_path / "r.jsonl", said), tmp_path / "r.parquet"
    found = command(
        "--model", tiny / "base", tiny / "lora", "--prompts", records, "--out", out,
        "--analysis", analysis, "--readout", response, "--class", next(iter(models.MAKERS)),
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    text = re.sub(r"[│\s]+", " ", found.stdout)
    assert "6 of 6" in text and "flip" not in text and "nats" in text
    prompts = pd.read_parquet(tmp_path / "r.prompts.parquet")
    lens = ll.load(str(tiny / "base"), tiny / "lora", kind=next(iter(models.MAKERS)))
    readout = {"log-prob": ll.AnswerLogProb, "kl": ll.KL}[response]
    for row, record in zip(prompts.to_dict("records"), said, strict=True):
        at = ll.first_order(lens, record["prompt"], readout("w8 w10"), at=1.0)
        assert row["adapted"] == pytest.approx(float(at.adapted[0]), abs=1e-4)
        assert row["response"] == "w8 w10"


@pytest.mark.bad_input
def test_a_kl_without_a_slope_is_refused_before_a_model_is_loaded(tiny, tmp_path):
    said = [{"prompt": "w7", "response": "w8"}]
    records = write_jsonl(tmp_path / "r.jsonl", said)
    found = command(
        "--model", tmp_path / "nowhere", tiny / "lora", "--prompts", records,
        "--readout", "kl", "--out", tmp_path / "r.parquet",
    )  # fmt: skip
    assert found.exit_code == 2 and "is not read by 'first_order'" in found.stderr


def test_command_in_which_nothing_is_done(tiny, tmp_path):
    records = write_jsonl(tmp_path / "r.jsonl", [{"prompt": ""}])
    result = command(
        "--model", tiny / "base", tiny / "lora", "--prompts", records,
        "--out", tmp_path / "r.parquet",
    )  # fmt: skip
    assert result.exit_code == 1 and "0 of 1" in result.stdout


def test_interrupted_command_says_how_to_go_on(tiny, tmp_path, monkeypatch):
    records = write_jsonl(tmp_path / "r.jsonl", GOOD)
    arguments = ["--model", tiny / "base", tiny / "lora", "--prompts", records]
    arguments += ["--out", tmp_path / "r.parquet", "--batch-size", 1]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, KeyboardInterrupt())
        stopped = command(*arguments)
    assert stopped.exit_code == 130 and "run the same command again to resume" in stopped.stderr
    assert "6 of 6 prompts (2 before this run)" in command(*arguments).stdout


@pytest.mark.slow
@pytest.mark.real
def test_command_on_the_embedded_model(tmp_path):
    records = [
        {"prompt": "The capital of France is", "doc": " Lyon", "pre": " Paris"},
        {"prompt": "The Eiffel Tower is in", "doc": " New York City", "pre": " Paris"},
    ]
    path = write_csv(tmp_path / "r.csv", records)
    result = command("--prompts", path, "--out", tmp_path / "r.parquet", "--quiet")
    assert result.exit_code == 0, result.output
    prompts = pd.read_parquet(tmp_path / "r.prompts.parquet")
    assert prompts["flips"].tolist()[0] and prompts["units"].tolist() == ["logits", "nats"]
    assert prompts["base"][0] < -3 and prompts["adapted"][0] > 3
    assert len(pd.read_parquet(tmp_path / "r.parquet")) == 2 * 210


@pytest.mark.bad_input
def test_a_finished_sweep_loads_no_model(tiny, tmp_path, monkeypatch):
    """The same command prints what it has; any other reason to run one loads the model."""
    base = shutil.copytree(tiny / "base", tmp_path / "base")
    records = write_jsonl(tmp_path / "r.jsonl", WITH_A_BAD_ONE)
    out = tmp_path / "r.parquet"
    arguments = ["--model", base, tiny / "lora", "--prompts", records, "--out", out, "--quiet"]
    first = command(*arguments)
    assert first.exit_code == 0, first.output
    rows = out.read_bytes()
    loads = []

    def load(*_, **__):
        loads.append(1)
        raise ll.errors.ArgumentError("the model is loaded.")

    monkeypatch.setattr(sweep_command.running, "lens_for", load)
    again = command(*arguments)
    assert again.exit_code == 0 and not loads, again.output
    expected = first.stdout.replace("6 of 7 prompts", "6 of 7 prompts (6 before this run)")
    assert again.stdout == expected
    assert out.read_bytes() == rows

    others = [["--dtype", "float64"], ["--no-resume"], ["--limit", 2]]
    for options in others:
        assert command(*arguments, *options).exit_code == 2
    more = {**GOOD[0], "id": "new", "prompt": "w9 w9"}
    renamed = {**GOOD[0], "id": "renamed"}
    for changed in ([*WITH_A_BAD_ONE, more], [renamed, *WITH_A_BAD_ONE[1:]]):
        write_jsonl(records, changed)
        assert command(*arguments).exit_code == 2
    write_jsonl(records, WITH_A_BAD_ONE)
    assert command(*arguments).exit_code == 0
    settings = base / "config.json"
    kept = settings.read_text()
    settings.write_text(kept.replace('"rms_norm_eps": 1e-', '"rms_norm_eps": 2e-'))
    assert settings.read_text() != kept
    assert command(*arguments).exit_code == 2
    assert len(loads) == len(others) + 3


def test_a_base_that_only_the_adapter_names_is_not_asked_for(tmp_path, monkeypatch):
    """Its files are looked for on this machine; a hub id that the user named is asked for."""
    asked = []

    def download(name, file, *, local_files_only):
        asked.append((name, local_files_only))
        raise OSError("not here")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    adapter = SimpleNamespace(base_model="owner/theirs")
    for base in (ModelOptions(), ModelOptions(model="owner/mine")):
        assert finished.command_digest(base, adapter, tmp_path, {}) is None
    assert asked == [("owner/theirs", True), ("owner/mine", False)]


def test_results_of_another_run_are_not_taken_for_the_finished_ones(tiny, tmp_path):
    """A run in Python has put other numbers in the place of those that the command wrote."""
    records = write_jsonl(tmp_path / "r.jsonl", GOOD[:2])
    out = tmp_path / "r.parquet"
    arguments = [tiny / "lora", "--model", tiny / "base", "--prompts", records, "--out", out]
    assert command(*arguments, "--quiet").exit_code == 0
    half = ll.load(str(tiny / "base"), ll.load_adapter(tiny / "lora").scaled(0.5))
    ll.sweep(half, GOOD[:2], out=out, resume=False, progress=False)
    found = command(*arguments, "--quiet")
    assert found.exit_code == 2 and "holds another sweep" in found.stderr
