"""`lens-lora scan`: a folder of adapters, what is printed and written, and its exit codes."""

from __future__ import annotations

import json
import shutil

import models
import pandas as pd
import pytest
import typer
from folders import saved_llama
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora.cli.running import one_line_errors
from lens_lora.cli.sweeping import scan

app = typer.Typer()
app.command()(one_line_errors()(scan))
ASKED = ["--prompt", "w5 w6 w7", "--prompt", "w9 w10", "--doc", "w5", "--pre", "w9"]


def command(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model, and a folder with two adapters and two that cannot be read."""
    folder = tmp_path_factory.mktemp("tiny")
    base = saved_llama(folder / "base")
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base))
    for number in (1, 2):
        adapter.scaled(number).save(folder / "adapters" / f"a{number}")
    (folder / "adapters" / "bad").mkdir()
    (folder / "adapters" / "bad" / "adapter_config.json").write_text("{}")
    (folder / "adapters" / "headless").mkdir()
    weights = folder / "adapters" / "a1" / "adapter_model.safetensors"
    shutil.copy(weights, folder / "adapters" / "headless")
    return folder


@pytest.mark.parametrize("cls", models.MAKERS)
def test_command_on_a_folder(tiny, tmp_path, cls: str):
    """The table is the one of Python; the largest come first, and what is bad says why."""
    out = tmp_path / "new" / "scan.parquet"
    how = ["--model", tiny / "base", "--class", cls, *ASKED, "--out", out, "--group", "kind"]
    done = command(tiny / "adapters", *how, "--json", tmp_path / "scan.json")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert "of 2 adapters" in lines[1]
    assert lines[2].endswith("  a2") and lines[3].endswith("  a1")
    assert "headless: AdapterError" in done.stdout and "no adapter_config.json" in done.stdout
    assert "bad: AdapterError" in done.stdout and "2 adapters cannot be used" in done.stdout
    table = pd.read_parquet(out)
    (written,) = json.loads((tmp_path / "scan.json").read_text())
    totals = pd.Series([row["total"] for row in written["rows"]], dtype=float)
    assert totals.tolist() == pytest.approx(table["total"].tolist(), nan_ok=True)
    lens = ll.load(str(tiny / "base"), str(tiny / "adapters" / "a2"), kind=cls)
    expected = ll.first_order(lens, ["w5 w6 w7", "w9 w10"], ll.Margin("w5", "w9"))
    rows = table[table["adapter"] == "a2"].pivot(index="kind", columns="prompt", values="value")
    sums = expected.sum("kind")
    assert rows.loc[sums.index].to_numpy() == pytest.approx(sums.to_numpy(), rel=1e-4, abs=1e-5)
    again = command(tiny / "adapters", *how, "--quiet")
    said = again.stderr.splitlines()
    assert again.exit_code == 0 and all(line.startswith("Warning: ") for line in said)
    pd.testing.assert_frame_equal(pd.read_parquet(out), table)


@pytest.mark.bad_input
def test_what_the_command_refuses(tiny, tmp_path):
    how = ["--model", tiny / "base", *ASKED]
    for arguments, code, words in (
        ([tiny / "adapters", *how, "--out", tmp_path / "scan.csv"], 2, "ends in .parquet"),
        ([tiny / "base", *how, "--out", tmp_path / "s.parquet"], 2, "none in it has an"),
        ([tmp_path / "nowhere", *how], 2, "no such folder"),
        ([tiny / "adapters", "--model", tiny / "base"], 2, "which prompt?"),
        (
            [tiny / "adapters" / "bad", *how, "--out", tmp_path / "b.parquet"],
            1,
            "1 adapter cannot",
        ),
    ):
        found = command(*arguments)
        assert found.exit_code == code, found.output
        assert words in " ".join(found.output.replace("│", " ").split()), found.output


@pytest.mark.bad_input
def test_adapters_of_two_bases_are_not_run_on_one(tiny, tmp_path):
    """Without --model the base is the one that all name, and two are refused."""
    shutil.copytree(tiny / "adapters", tmp_path / "adapters")
    how = [tmp_path / "adapters", *ASKED, "--out", tmp_path / "scan.parquet"]
    for name in ("a1", "a2"):
        names_base(tmp_path / "adapters" / name, tiny / "base")
    done = command(*how)
    assert done.exit_code == 0 and "of 2 adapters" in done.stdout, done.output
    names_base(tmp_path / "adapters" / "a2", "another/base")
    refused = " ".join(command(*how).output.split())
    assert "a1 names the base" in refused and "a2 'another/base'; scan the adapters of" in refused
    again = command(*how, "--model", tiny / "base")
    assert again.exit_code == 0 and "of 2 adapters" in again.stdout, again.output


def names_base(folder, base: object) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(config))
