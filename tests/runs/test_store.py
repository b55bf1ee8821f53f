"""Damage, a full disk and a second writer: errors of ours, and nothing finished is lost."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import sweep_runs
from sweep_runs import GOOD, interrupt_at, run, same

import lens_lora as ll
from lens_lora.errors import SweepError
from lens_lora.runs import processes as lock
from lens_lora.runs import store as files

WRITES = 5  # of GOOD in batches of two: three parts and two results


@pytest.fixture
def a_lens(float64) -> ll.LoraLens:
    return sweep_runs.a_lens()


@pytest.fixture
def stopped(a_lens, tmp_path, monkeypatch) -> list[Path]:
    """The parts of a sweep that was stopped before its last batch."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 6, KeyboardInterrupt())
        run(a_lens, GOOD, tmp_path, batch_size=1)
    parts = sorted((tmp_path / "r.parts").iterdir())
    assert len(parts) == 5
    return parts


# --- damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path, at: int = 200) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def replaced(path: Path) -> None:
    pd.DataFrame({"x": [1]}).to_parquet(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def renamed(path: Path) -> None:
    path.rename(path.with_name("another.parquet"))


@pytest.mark.sample(2)
@pytest.mark.parametrize("damage", [cut, emptied, flipped, replaced, a_folder, renamed])
def test_a_damaged_part_is_named_and_its_prompt_runs_again(a_lens, tmp_path, stopped, damage):
    damage(stopped[1])
    with pytest.warns(UserWarning, match=r"1 files of .* run again:\n.*r\.parts/.*\.parquet: "):
        result = run(a_lens, GOOD, tmp_path)
    assert result.resumed == 4
    assert len(result.damaged) == 1
    assert sorted(p.name for p in tmp_path.glob("r*")) == ["r.parquet", "r.prompts.parquet"]
    same(result, run(a_lens, GOOD, tmp_path / "whole"))


def test_a_damaged_part_is_set_aside_while_the_sweep_runs(a_lens, tmp_path, stopped, monkeypatch):
    cut(stopped[0])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 1, KeyboardInterrupt())
        run(a_lens, GOOD, tmp_path)
    assert stopped[0].with_name(stopped[0].name + ".damaged").exists()
    result = run(a_lens, GOOD, tmp_path)
    assert not result.damaged
    assert result.resumed == 4


def test_a_part_of_another_sweep_is_refused(a_lens, tmp_path, stopped):
    other = ll.LoraLens(a_lens.model, a_lens.adapter.scaled(0.5))
    with pytest.raises(SweepError, match=r"r\.parts holds another sweep: .*adapter_weights"):
        run(other, GOOD, tmp_path)
    whole = run(other, GOOD, tmp_path, resume=False)
    same(whole, run(other, GOOD, tmp_path / "whole"))


def test_what_else_lies_in_the_folder_of_parts_is_left_alone(a_lens, tmp_path, stopped):
    """Also a table of contents that an earlier version wrote, cut short."""
    (tmp_path / "r.parts" / "about.json").write_text('{"adapter": ')
    (tmp_path / "r.parts" / ".unfinished").write_bytes(b"PAR1")
    result = run(a_lens, GOOD, tmp_path)
    assert result.resumed == 5
    assert not result.damaged


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in ("r.parquet", "r.prompts.parquet") for damage in (cut, emptied)]
    + [("r.prompts.parquet", a_folder)],  # in place of out itself it is refused before
)
def test_damaged_results_are_refused_by_name(a_lens, tmp_path, name, damage):
    run(a_lens, GOOD, tmp_path)
    damage(tmp_path / name)
    with pytest.raises(SweepError, match=rf"{name}: .*damaged"):
        run(a_lens, GOOD, tmp_path)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["r.parquet", "r.prompts.parquet"])
def test_flipped_bytes_of_results_change_no_number(a_lens, tmp_path, name):
    """Refused, or without effect: a result never holds other numbers than were computed."""
    whole = run(a_lens, GOOD, tmp_path)
    path = tmp_path / name
    refused = 0
    files = {file: file.read_bytes() for file in (tmp_path / "r.parquet", whole.prompts_path)}
    expected = whole.to_frame(), whole.prompts()
    for at in range(0, path.stat().st_size, path.stat().st_size // 16):
        for file, content in files.items():
            file.write_bytes(content)
        flipped(path, at)
        try:
            again = run(a_lens, GOOD, tmp_path)
        except SweepError as error:
            refused += 1
            assert name.split(".")[0] in str(error)
        else:
            for found, wanted in zip((again.to_frame(), again.prompts()), expected, strict=True):
                pd.testing.assert_frame_equal(found, wanted)
    assert refused > 4


def test_a_changed_number_in_a_result_is_refused(a_lens, tmp_path):
    """The file is in order, but for one number of one site."""
    result = run(a_lens, GOOD, tmp_path)
    table = pq.read_table(result.path)
    values = table["first_order"].to_numpy().copy()
    values[3] += 1e-9
    column = table.schema.get_field_index("first_order")
    pq.write_table(table.set_column(column, "first_order", [values]), result.path)
    with pytest.raises(SweepError, match="damaged, .*rows were changed"):
        run(a_lens, GOOD, tmp_path)


def test_results_of_two_runs_are_not_put_together(a_lens, tmp_path):
    """One file of this sweep beside one of another run: nothing is taken from either."""
    run(a_lens, GOOD[:3], tmp_path)
    run(a_lens, GOOD[1:4], tmp_path / "other")
    os.replace(tmp_path / "other" / "r.parquet", tmp_path / "r.parquet")
    result = run(a_lens, GOOD, tmp_path)
    assert result.resumed == 0
    same(result, run(a_lens, GOOD, tmp_path / "whole"))


# --- a disk that is full


def full(*args):
    raise OSError(28, "No space left on device")


@pytest.mark.sample(3)
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("after", range(WRITES))
def test_a_full_disk_at_any_write(a_lens, tmp_path, monkeypatch, call, after):
    """Each time an error of ours, and a resumed run that is whole."""
    plain = getattr(os, call)
    made = []

    def filled(*args):
        made.append(args)
        return full() if len(made) > after * (2 if call == "fsync" else 1) else plain(*args)

    lasting = "No space left.*run the same sweep again, which goes on"
    with monkeypatch.context() as patch, pytest.raises(SweepError, match=lasting):
        patch.setattr(files.os, call, filled)
        run(a_lens, GOOD, tmp_path, batch_size=2)
    assert not list(tmp_path.glob("r.parts/.*"))
    result = run(a_lens, GOOD, tmp_path, batch_size=2)
    same(result, run(a_lens, GOOD, tmp_path / "whole"))


def test_a_file_system_that_takes_no_more(a_lens, tmp_path):
    """The system's own error, from a limit of the size of files."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
    try:
        with pytest.raises(SweepError, match="cannot be written.*File too large"):
            run(a_lens, GOOD, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert run(a_lens, GOOD, tmp_path).done == len(GOOD)


# --- two writers


def test_a_second_writer_is_refused(a_lens, tmp_path):
    with lock.only_writer(tmp_path / "r.parquet"):
        with pytest.raises(SweepError, match="is being written by another sweep, which holds"):
            run(a_lens, GOOD, tmp_path)
        assert run(a_lens, GOOD[:1], tmp_path / "elsewhere").done == 1
    assert run(a_lens, GOOD, tmp_path).done == len(GOOD)
    assert not list(tmp_path.glob("r.parts"))


HOLDER = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from lens_lora.runs.processes import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_dead_process_holds_no_lock(a_lens, tmp_path):
    """Another process, alive and then killed; its file is left behind and taken over."""
    out = tmp_path / "r.parquet"
    code = [sys.executable, "-c", HOLDER, str(out), str(Path(ll.__file__).parents[1])]
    with subprocess.Popen(code, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(SweepError, match="written by another sweep"):
                run(a_lens, GOOD, tmp_path)
        finally:
            holder.send_signal(signal.SIGKILL)
    assert (tmp_path / ".r.parquet.lock").exists()
    assert run(a_lens, GOOD, tmp_path).done == len(GOOD)


def test_a_file_system_without_locks_is_refused(a_lens, tmp_path, monkeypatch):
    """Two sweeps could write there at once, and nothing would tell."""
    import fcntl

    def none(*args):
        raise OSError(38, "Function not implemented")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", none)
        with pytest.raises(SweepError, match="Function not implemented.*give another out"):
            run(a_lens, GOOD, tmp_path)
    assert run(a_lens, GOOD, tmp_path).done == len(GOOD)
