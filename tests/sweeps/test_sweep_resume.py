"""Sweeps that are interrupted, killed, resumed and grown: no prompt is lost, none run twice."""

from __future__ import annotations

import os
from pathlib import Path

import limits
import pandas as pd
import pytest
import sweep_runs
import torch
from sweep_runs import GOOD, interrupt_at, run, same

import lens_lora as ll
from lens_lora.errors import SweepError
from lens_lora.sweeps.batches import VALUES


@pytest.fixture
def a_lens(float64) -> ll.LoraLens:
    return sweep_runs.a_lens()


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The prompts that first order was asked for, in order."""
    seen: list[str] = []
    plain = VALUES["first_order"]

    def counted(g):
        rows = [g.prompts.row(i).tokens[0].tolist() for i in range(g.prompts.batch)]
        seen.extend(" ".join(f"w{i}" for i in row if i > 3) for row in rows)
        return plain(g)

    monkeypatch.setitem(VALUES, "first_order", counted)
    return seen


def test_an_interrupted_run_goes_on_without_repeating(a_lens, tmp_path, monkeypatch, calls):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(a_lens, GOOD, tmp_path, batch_size=2)
    assert len(calls) == 2
    assert not (tmp_path / "r.parquet").exists()
    resumed = run(a_lens, GOOD, tmp_path, batch_size=3)
    assert sorted(calls) == sorted(r["prompt"] for r in GOOD)
    assert resumed.resumed == 2
    assert sorted(p.name for p in tmp_path.glob("r*")) == ["r.parquet", "r.prompts.parquet"]
    same(resumed, run(a_lens, GOOD, tmp_path / "whole"))


def test_a_finished_sweep_grows_and_is_not_repeated(a_lens, tmp_path, calls):
    run(a_lens, GOOD[2:4], tmp_path)
    grown = run(a_lens, GOOD, tmp_path)
    assert len(calls) == 6
    assert grown.resumed == 2
    again = run(a_lens, GOOD, tmp_path)
    assert len(calls) == 6
    assert again.resumed == 6
    same(again, run(a_lens, GOOD, tmp_path / "whole"))


@pytest.mark.parametrize("name", ["first_order", "activations"])
def test_numbers_without_other_directions_are_another_sweep_s(a_lens, tmp_path, name: str):
    one, other = torch.eye(16, dtype=torch.float64)[[0, 5]]
    with a_lens.ablate_directions(one):
        run(a_lens, GOOD[2:4], tmp_path, name)
    with a_lens.ablate_directions(other), pytest.raises(SweepError, match="another sweep: hooks"):
        run(a_lens, GOOD, tmp_path, name)
    with a_lens.ablate_directions(one):
        run(a_lens, GOOD[2:4], tmp_path, name)


def test_a_result_does_not_read_the_file_of_another_one(a_lens, tmp_path):
    """Its labels would be those of the first adapter."""
    other = a_lens.with_adapter(a_lens.adapter.scaled(2.0))
    for name in ("first_order", "activations"):
        results = [run(lens, GOOD, tmp_path, name, resume=False) for lens in (a_lens, other)]
        reads = [("to_frame", ()), ("prompts", ()), ("attribution", (name,))]
        if name == "activations":
            reads = [("mean", ()), ("spread", ()), ("bad", ()), ("top", (a_lens.sites[0].name,))]
        for read, arguments in reads:
            with pytest.raises(SweepError, match=r"parquet was replaced after this"):
                getattr(results[0], read)(*arguments)
            assert getattr(results[1], read)(*arguments) is not None


def test_a_record_that_failed_is_tried_again(a_lens, tmp_path, calls):
    with pytest.warns(UserWarning):
        run(a_lens, [{**GOOD[0], "doc": "zebra"}, *GOOD[1:]], tmp_path)
    mended = run(a_lens, GOOD, tmp_path)
    assert len(calls) == 6
    assert not mended.errors
    same(mended, run(a_lens, GOOD, tmp_path / "whole"))


def test_integer_ids_stay_integers_and_survive_a_resume(a_lens, tmp_path, calls):
    records = [{**r, "id": 7 * i} for i, r in enumerate(GOOD)]
    first = run(a_lens, records[:3], tmp_path).prompts()
    again = run(a_lens, records, tmp_path)
    assert first["id"].tolist() == [0, 7, 14]
    assert again.to_frame()["id"].dtype == "int64"
    assert len(calls) == 6


def test_starting_over(a_lens, tmp_path, calls):
    run(a_lens, GOOD, tmp_path)
    over = run(a_lens, GOOD[:2], tmp_path, resume=False)
    assert len(calls) == 8
    assert (over.records, over.resumed) == (2, 0)


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
    changed = [{**r, "doc": "w33 w34"} if r["id"] in ("long", "d") else r for r in GOOD]
    gone = [r for r in GOOD if r["id"] not in ("long", "d")]
    for words, kwargs in [
        ("adapter_weights '.*' there, '.*' here", {"lens": other}),
        (r"analyses \['first_order'\] there, \['path'\] here", {"analyses": "path"}),
        (
            r"readout 'margin of doc and pre' there, \"logit\('w5'\), logits, \w+\" here",
            {"readout": ll.Logit("w5")},
        ),
        ("the doc of id .* is 'w.*' in .*, but 'w33 w34' in the records", {"records": changed}),
        ("hold the id .*, but the records do not", {"records": gone}),
    ]:
        arguments = {"lens": a_lens, "records": GOOD, "analyses": "first_order", **kwargs}
        with pytest.raises(SweepError, match=words):
            ll.sweep(**arguments, out=tmp_path / "r.parquet", progress=False)
    assert sorted(tmp_path.rglob("*")) == before
    assert run(a_lens, GOOD, tmp_path).done == 6


def test_a_foreign_file_is_not_overwritten(a_lens, tmp_path):
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "r.parquet")
    with pytest.raises(SweepError, match="not the result of a sweep"):
        run(a_lens, GOOD, tmp_path)
    assert pd.read_parquet(tmp_path / "r.parquet")["x"].tolist() == [1]
    (tmp_path / "r.parquet").write_text("text")
    with pytest.raises(SweepError, match="not a Parquet file"):
        run(a_lens, GOOD, tmp_path)


class Killed(BaseException):
    """What no handler of errors catches."""


@pytest.mark.sample(2)
@pytest.mark.parametrize("renames", range(1, 7))
def test_a_crash_at_any_write_loses_nothing(a_lens, tmp_path, monkeypatch, calls, renames):
    """After each file in turn: the parts, the one result, the other; and at the removal."""
    replace = os.replace
    made = []

    def crash(source, target):
        if len(made) == renames - 1:
            raise Killed
        made.append(target)
        replace(source, target)

    def no_removal(self):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", crash)
        limits.parts_of_runs_are_removed_by(patch, no_removal)
        run(a_lens, GOOD[:4], tmp_path, batch_size=2)
    finished = len([path for path in made if Path(path).parent.name == "r.parts"])
    assert len(calls) <= 4
    before = len(calls)
    result = run(a_lens, GOOD[:4], tmp_path, batch_size=2)
    # The first part has two prompts, the second the other one of one token, the third the prompt
    # whose answers have several tokens.
    prompts_of_parts = [2, 1, 1]
    assert result.resumed == sum(prompts_of_parts[:finished])
    assert len(calls) - before == 4 - result.resumed
    same(result, run(a_lens, GOOD[:4], tmp_path / "whole"))


@pytest.mark.sample(2)
@pytest.mark.parametrize("renames", range(1, 6))
def test_a_crash_while_a_finished_sweep_grows_mixes_nothing(
    a_lens, tmp_path, monkeypatch, calls, renames
):
    """Two prompts change their ids meanwhile: the one result is new and the other is old."""
    run(a_lens, GOOD[:3], tmp_path)
    ids = ["several", "long", *(r["id"] for r in GOOD[2:])]
    renamed = [{**r, "id": identity} for r, identity in zip(GOOD, ids, strict=True)]
    replace = os.replace
    made = []

    def crash(source, target):
        if len(made) == renames - 1:
            raise Killed
        made.append(target)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", crash)
        run(a_lens, renamed[:4], tmp_path, batch_size=2)
        raise Killed  # A fifth file is never written: here the run ended, and nothing crashed.
    result = run(a_lens, renamed, tmp_path)
    assert result.resumed >= 3
    assert len(calls) <= 7
    same(result, run(a_lens, renamed, tmp_path / "whole"))


def test_processes_that_accelerate_does_not_know_of_are_refused(a_lens, tmp_path, monkeypatch):
    """Each would run everything, and write over the other."""
    from accelerate import PartialState

    PartialState()
    monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        with pytest.raises(
            ll.errors.LensLoraError, match="2 processes were launched, but accelerate"
        ):
            run(a_lens, GOOD, tmp_path)
    finally:
        PartialState._reset_state()


def test_progress_is_shown_and_silenced(a_lens, tmp_path, capsys):
    run(a_lens, GOOD[:4], tmp_path)
    assert capsys.readouterr().err == ""
    run(a_lens, GOOD, tmp_path, progress=True)
    text = capsys.readouterr().err
    assert "sweep:  67%" in text
    assert "4/6" in text
    assert "6/6" in text
    assert " prompt/s" in text


def test_progress_of_a_resumed_sweep_counts_a_repeated_record_once(a_lens, tmp_path, capsys):
    """Its total was that of the records before, and of distinct prompts from then on."""
    repeated = [{**GOOD[0], "id": f"again {number}"} for number in range(3)]
    run(a_lens, [*GOOD[:4], *repeated], tmp_path)
    capsys.readouterr()
    run(a_lens, [*GOOD, *repeated], tmp_path, progress=True)
    _, _, bar = capsys.readouterr().err.partition("sweep:")
    assert "4/6" in bar
    assert "6/6" in bar
    assert "/9" not in bar
