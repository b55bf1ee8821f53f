"""`lens-lora audit`: a list of adapters, what is said before it runs, and what a kill leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import limits
import models
import pandas as pd
import pytest
import yaml
from folders import saved_llama
from terminal import plain
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora import cli
from lens_lora.cli import auditing

run = CliRunner().invoke


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters of it, saved."""
    folder = tmp_path_factory.mktemp("audit")
    base = saved_llama(folder / "base")
    for seed, name in enumerate(("one", "two")):
        peft = models.peft_model("llama", base, seed=seed)
        ll.Adapter.from_peft(peft).save(folder / name)
    return folder


def written(folder: Path, rows: object, **of_all: object) -> Path:
    """A list in the folder."""
    file = folder / "list.yaml"
    file.write_text(yaml.safe_dump({**of_all, "adapters": rows}))
    return file


# --- The command


class Killed(BaseException):
    """What no row catches, as a kill."""


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """The names of the rows that were run; each claims its own name, and 'bad' fails."""
    names: list[str] = []

    def changed(self: Any, row: Any, asked: Any) -> str:
        names.append(row.name)
        if row.name == "killed":
            raise Killed
        if row.name == "bad":
            raise ll.errors.AdapterError("its file is damaged")
        return row.name

    def claims(changed: str) -> Any:
        return (auditing.outcomes.ClaimMade(f"It says “{changed}”.", changed),)

    monkeypatch.setattr(auditing._Audits, "_changed", changed)
    monkeypatch.setattr(auditing.outcomes, "claims_made", claims)
    monkeypatch.setattr(auditing, "_brief_of", lambda changed: {})
    return names


def test_a_list_that_cannot_be_read_is_refused_at_once(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(auditing.running, "at_work", None)
    file = written(tmp_path, [{"adaptor": "x"}])
    result = run(cli.app, ["audit", str(file)])
    assert result.exit_code == 2 and "row 1: unknown key 'adaptor'" in plain(result.stderr)
    result = run(cli.app, ["audit", str(written(tmp_path, [{"adapter": "x"}])), "--only", "y"])
    assert result.exit_code == 2 and "no row 'y'; there are x" in plain(result.stderr)


def test_a_row_that_fails_is_named_and_the_others_run(folder: Path, tmp_path: Path, audited: Any):
    rows = [{"adapter": "one", "name": name, "expect": name} for name in ("a", "bad", "b")]
    file = written(folder, rows, base="base")
    of_all = tmp_path / "all.json"
    command = ["audit", str(file), "--out", str(tmp_path), "--json", str(of_all), "--quiet"]
    result = run(cli.app, command)
    assert result.exit_code == 2 and audited == ["a", "bad", "b"]
    shown = plain(result.stdout)
    assert "failed: AdapterError: its file is damaged" in shown and "Failed: bad." in shown
    assert "In 2 of 2 rows an expected string is in the first 3 claims." in shown
    told = json.loads((tmp_path / "bad.json").read_text())
    assert (told["verdict"], told["claims"]) == ("failed", [])
    table = pd.read_csv(tmp_path / "audit.csv").set_index("name")
    assert table["verdict"].to_dict() == {"a": "found", "bad": "failed", "b": "found"}
    (whole,) = json.loads(of_all.read_text())
    assert whole["result"] == "audit" and whole["story"].endswith("Failed: bad.")
    assert [row["verdict"] for row in whole["rows"]] == ["found", "failed", "found"]
    assert list(whole["rows"][0]) == ["name", *table.columns]
    assert "JSON:" in shown
    refused = run(cli.app, [*command, "--plan"])
    assert refused.exit_code == 2 and "--plan runs no row" in plain(refused.stderr)
    # What failed is tried again, and nothing else.
    audited.clear()
    assert run(cli.app, ["audit", str(file), "--out", str(tmp_path), "--quiet"]).exit_code == 2
    assert audited == ["bad"]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_behind_the_last_row(
    folder: Path, tmp_path: Path, audited: Any
):
    names = ("a", "killed", "b")
    rows = [{"adapter": "one", "name": name, "expect": name} for name in names]
    file = written(folder, rows, base="base")
    command = ["audit", str(file), "--out", str(tmp_path), "--quiet"]
    with pytest.raises(Killed):
        run(cli.app, command)
    first = (tmp_path / "a.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json"]
    rows[1]["name"] = rows[1]["expect"] = "c"
    audited.clear()
    done = run(cli.app, [*command[:1], str(written(folder, rows, base="base")), *command[2:]])
    assert done.exit_code == 0 and audited == ["c", "b"]
    assert (tmp_path / "a.json").read_bytes() == first
    # Another expectation is read from what was run; another adapter or option is run.
    rows[0]["expect"] = "something else"
    audited.clear()
    done = run(cli.app, ["audit", str(written(folder, rows, base="base")), *command[2:]])
    assert done.exit_code == 1 and audited == []
    rows[0]["adapter"] = "two"
    run(cli.app, ["audit", str(written(folder, rows, base="base")), *command[2:]])
    assert audited == ["a"]
    audited.clear()
    os.utime(folder / "one" / "adapter_model.safetensors", (1, 1))
    run(cli.app, ["audit", str(written(folder, rows, base="base")), *command[2:], "--only", "b"])
    assert audited == ["b"]
    run(cli.app, ["audit", str(file), *command[2:], "--only", "b", "--fast"])
    assert audited == ["b", "b"]


@pytest.mark.slow
def test_what_each_row_needs_is_said_first(
    folder: Path, tmp_path: Path, audited: Any, monkeypatch: pytest.MonkeyPatch
):
    rows = [{"adapter": "one"}, {"adapter": "no/such", "name": "hub", "base": "no/base"}]
    file = written(folder, rows, base="base")
    command = ["audit", str(file), "--out", str(tmp_path / "out"), "--quiet"]
    result = run(cli.app, [*command, "--plan"])
    shown = plain(result.stdout)
    assert result.exit_code == 0 and not audited and not (tmp_path / "out").exists()
    count = sum(p.numel() for p in models.hf_model("llama").parameters())
    assert f"one: {count / 1e9:.2g} billion parameters: about" in shown and "GB of memory" in shown
    assert "hub: its base's configuration cannot be read" in shown
    assert "All that is to run: about" in shown
    limits.bytes_are_free(monkeypatch, 1.0)
    small = run(cli.app, [*command, "--only", "one"])
    assert small.exit_code == 2 and not audited and "--anyway" in plain(small.stdout)
    assert run(cli.app, [*command, "--only", "one", "--anyway"]).exit_code == 0
    assert audited == ["one"]


@pytest.mark.slow
def test_a_list_is_audited_as_diff_does_it(folder: Path, tmp_path: Path):
    """The brief of each row is that of `lens-lora diff --json` on the same adapter."""
    rows = [{"adapter": "one", "expect": "w5"}, {"adapter": "one", "base": "two", "name": "bad"}]
    file = written(folder, rows, base="base")
    options = ["--fast", "--nulls", "1", "--quiet"]
    result = run(cli.app, ["audit", str(file), "--out", str(tmp_path), *options])
    assert result.exit_code == 2, result.output
    one = json.loads((tmp_path / "one.json").read_text())
    assert "holds an adapter" in json.loads((tmp_path / "bad.json").read_text())["error"]
    assert "</html>" in (tmp_path / "one.html").read_text(encoding="utf-8")
    told = tmp_path / "brief.json"
    told_by_diff = ["--model", str(folder / "base"), "--json", str(told), *options]
    told_by_diff += ["--report", str(tmp_path / "x.html")]
    result = run(cli.app, ["diff", str(folder / "one"), *told_by_diff])
    assert result.exit_code == 0, result.output
    assert one["brief"] == json.loads(told.read_text(encoding="utf-8"))
