"""Shards: jobs that know nothing of one another write what one process writes, bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sweep_runs
from sweep_runs import GOOD, WITH_A_BAD_ONE, interrupt_at, run, write_jsonl
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora import cli
from lens_lora.errors import ArgumentError, SweepError

# More prompts than a batch, one of them twice under two ids.
RECORDS = [
    *({"id": i, "prompt": f"w{i} w7 w{i + 1}", "doc": "w8", "pre": "w9"} for i in range(4, 17)),
    {"id": 40, "prompt": "w5 w7 w6", "doc": "w8", "pre": "w9"},
]


@pytest.fixture
def lens(float64) -> ll.LoraLens:
    return sweep_runs.a_lens()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", None])
def test_a_damaged_plan_is_named(content: bytes | None, lens, tmp_path):
    """A plan that was cut, or another program's file in its place."""
    run(lens, RECORDS, tmp_path, batch_size=8, shard=(1, 1))
    out = tmp_path / "r.parquet"
    plan = tmp_path / "r.shards" / "1-of-1" / "plan"
    if content is None:
        pq.write_table(pa.table({"a": [1]}), plan)
    else:
        plan.write_bytes(content)
    with pytest.raises(SweepError, match="plan"):
        ll.gather(out)


@pytest.mark.sample(1)
@pytest.mark.parametrize("names", [["first_order"], ["first_order_at_1", "add_one"]])
def test_gathered_shards_are_what_one_process_writes(names: list[str], lens, tmp_path):
    """Both files, byte for byte, whatever the order of the shards; the model is not needed."""
    whole = run(lens, RECORDS, tmp_path / "whole", *names, batch_size=4)
    for index in (3, 1, 2):
        part = run(lens, RECORDS, tmp_path / "parts", *names, batch_size=4, shard=(index, 3))
        assert isinstance(part, ll.results.SweepShard)
        assert part.shard == (index, 3)
    assert not list((tmp_path / "parts").glob("*.parquet"))
    found = ll.gather(tmp_path / "parts" / "r.parquet")
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    assert (found.sites, found.readout, found.units) == (whole.sites, whole.readout, whole.units)
    assert (found.records, found.flips, found.errors) == (len(RECORDS), whole.flips, whole.errors)
    assert found.meta == whole.meta
    assert (found.attribution(names[0]).values == whole.attribution(names[0]).values).all()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_killed_shard_goes_on_and_changes_no_bit(batch: int, lens, tmp_path):
    """Its batches are made of all records, so each prompt runs beside the same others again."""
    run(lens, RECORDS, tmp_path / "whole", batch_size=3)
    run(lens, RECORDS, tmp_path / "parts", batch_size=3, shard=(2, 2))
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, batch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(lens, RECORDS, tmp_path / "parts", batch_size=3, shard=(1, 2))
    with pytest.raises(SweepError, match=r"shard 1 of 2 of .* not finished.*shard=\(1, 2\)"):
        ll.gather(tmp_path / "parts" / "r.parquet")
    part = run(lens, RECORDS, tmp_path / "parts", batch_size=3, shard=(1, 2))
    assert part.resumed == 3 * (batch - 1)
    ll.gather(tmp_path / "parts" / "r.parquet")
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def test_an_interrupted_sweep_of_one_process_changes_no_bit_either(lens, tmp_path, monkeypatch):
    run(lens, RECORDS, tmp_path / "whole", batch_size=4)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(lens, RECORDS, tmp_path / "again", batch_size=4)
    run(lens, RECORDS, tmp_path / "again", batch_size=4)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "whole")


def test_bad_records_are_in_every_plan_and_in_the_result(lens, tmp_path):
    whole = run(lens, WITH_A_BAD_ONE, tmp_path / "whole", batch_size=2)
    for index in (1, 2):
        part = run(lens, WITH_A_BAD_ONE, tmp_path / "parts", batch_size=2, shard=(index, 2))
        assert [identity for identity, _ in part.errors] == ["bad"]
    found = ll.gather(tmp_path / "parts" / "r.parquet")
    assert found.errors == whole.errors
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def test_more_shards_than_batches_are_finished_at_once(lens, tmp_path):
    for index in range(1, 5):
        run(lens, GOOD[:2], tmp_path, shard=(index, 4))
    assert ll.gather(tmp_path / "r.parquet").done == 2


def begun(lens: ll.LoraLens, folder: Path, index: int, count: int, **options: object) -> None:
    run(lens, RECORDS, folder, shard=(index, count), **options)


def test_what_does_not_belong_together_is_refused(lens, tmp_path):
    """Shards that are missing, of another division, other records, batch size or adapter."""
    out = tmp_path / "r.parquet"
    with pytest.raises(SweepError, match=r"holds no shards.*shard=\(i, n\)"):
        ll.gather(out)
    begun(lens, tmp_path, 1, 2)
    with pytest.raises(SweepError, match=r"shard 2 of 2 of .* not begun.*shard=\(2, 2\)"):
        ll.gather(out)
    begun(lens, tmp_path, 2, 2, batch_size=5)
    with pytest.raises(SweepError, match="their records or batch sizes differ"):
        ll.gather(out)
    with pytest.raises(SweepError, match="another batch size"):
        begun(lens, tmp_path, 2, 2)
    begun(lens, tmp_path, 2, 2, resume=False)
    assert ll.gather(out).done == len(RECORDS)
    other = ll.LoraLens(lens.model, lens.adapter.scaled(0.5))
    with pytest.raises(SweepError, match="holds another sweep: adapter_weights"):
        begun(other, tmp_path, 2, 2)
    begun(other, tmp_path, 2, 2, resume=False)
    with pytest.raises(SweepError, match="of different runs: adapter_weights"):
        ll.gather(out)
    shutil.rmtree(tmp_path / "r.shards" / "2-of-2")
    begun(lens, tmp_path, 2, 3)
    with pytest.raises(SweepError, match="shards of 2 and 3"):
        ll.gather(out)


def test_a_damaged_part_is_named_and_its_shard_runs_again(lens, tmp_path):
    for index in (1, 2):
        begun(lens, tmp_path, index, 2, batch_size=4)
    part = min((tmp_path / "r.shards" / "2-of-2").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(SweepError, match="shard 2 of 2 .* 4 prompts"):
        ll.gather(tmp_path / "r.parquet")
    with pytest.warns(UserWarning, match="could not be read"):
        begun(lens, tmp_path, 2, 2, batch_size=4)
    assert ll.gather(tmp_path / "r.parquet").done == len(RECORDS)


@pytest.mark.bad_input
@pytest.mark.parametrize("shard", [(0, 2), (3, 2), (1,), 2, "1/2", (True, 2), (1.0, 2)])
def test_bad_shards_are_refused(shard: object, lens, tmp_path):
    with pytest.raises(ArgumentError, match=r"shard.*expected \(i, n\)"):
        run(lens, GOOD, tmp_path, shard=shard)
    with pytest.raises(SweepError, match="has no shards"):
        run(lens, GOOD, tmp_path, "activations", shard=(1, 2))


@pytest.mark.night
def test_shards_that_are_killed_at_random_moments():
    """Each shard, and what gathers them, in forks of one process (`kill_shards.py`)."""
    script = Path(__file__).parent / "kill_shards.py"
    done = subprocess.run(
        [sys.executable, script, "--kills", "6"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1


@pytest.mark.parametrize("given", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2"])
def test_bad_shards_on_the_command_line_are_refused(given: str, tmp_path):
    records = write_jsonl(tmp_path / "r.jsonl", GOOD)
    asked = ["sweep", "--prompts", str(records), "--shard", given]
    result = CliRunner().invoke(cli.app, asked)
    assert result.exit_code == 2
    assert "expected i/n, shard i of n" in " ".join(result.stderr.replace("│", " ").split())


def test_the_command_gathers(lens, tmp_path):
    """The same lines as at the end of a sweep; what is missing is one line, with what to do."""
    for index in (1, 2):
        begun(lens, tmp_path, index, 2)
    out = str(tmp_path / "r.parquet")
    result = CliRunner().invoke(cli.app, ["gather", out])
    assert result.exit_code == 0, result.stderr
    assert f"{len(RECORDS)} of {len(RECORDS)} prompts" in result.stdout
    shutil.rmtree(tmp_path / "r.shards" / "1-of-2")
    result = CliRunner().invoke(cli.app, ["gather", out])
    assert result.exit_code == 2
    assert "--shard 1/2" in result.stderr
