"""docs/shipping.md: its commands, its workflow and its test are run on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import models
import no_ops
import peft
import pytest
import yaml
from loopback import Engine, served
from peft import PeftModel
from typer.testing import CliRunner

from benchmarks.exports import by_others
from benchmarks.exports import table as exports
from lens_lora import cli

PAGE = Path(__file__).parents[2] / "docs" / "shipping.md"
DATA = PAGE.with_name("shipping_data.md")
SNIPPETS = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def snippets(language: str) -> str:
    return "\n".join(text for kind, text in SNIPPETS if kind == language)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    """The two folders of the page, by its names."""
    out = no_ops.ship(tmp_path_factory.mktemp("shipped"))
    (out / "adapter").rename(out / "my-adapter")
    (out / "merged").rename(out / "my-merged-model")
    return out


def exit_code(command: str) -> int:
    program, *arguments = shlex.split(command)
    assert program == "lens-lora"
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code is not None, result.output
    return result.exit_code


@pytest.mark.slow
def test_the_commands_pass(shipped, monkeypatch):
    """Each line of a shell, in the page's order; the server is one of ours."""
    monkeypatch.chdir(shipped)
    commands = snippets("bash").strip().splitlines()
    assert [line.split()[1] for line in commands if line] == ["verify", "verify", "card", "verify"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(no_ops.base_of(shipped), "my-adapter").eval()
    with served(Engine(model, models.tokenizer())) as (url, _):
        for command in filter(None, commands):
            asked = command.replace("http://127.0.0.1:8000", url)
            assert exit_code(f"{asked} --quiet") == 0, command


@pytest.mark.slow
def test_the_steps_of_the_workflow_pass(shipped, monkeypatch):
    """Those that run lens-lora, after a card was written; another merge stops it."""
    monkeypatch.chdir(shipped)
    assert exit_code("lens-lora card my-adapter --merged my-merged-model --quiet") == 0
    workflow, _ = (yaml.safe_load(text) for kind, text in SNIPPETS if kind == "yaml")
    (job,) = workflow["jobs"].values()
    runs = [step["run"] for step in job["steps"] if "run" in step]
    commands = [run for run in runs if run.startswith("lens-lora")]
    assert len(commands) == 2
    assert [exit_code(command) for command in commands] == [0, 0]
    assert (shipped / "checks.xml").is_file()


def test_the_hook_before_each_commit_is_a_command_that_there_is():
    _, repositories = (yaml.safe_load(text) for kind, text in SNIPPETS if kind == "yaml")
    (hook,) = repositories[0]["hooks"]
    program, command, *_ = hook["entry"].split()
    assert (program, command) == ("lens-lora", "verify")
    assert hook["language"] == "system"
    assert not hook["pass_filenames"]


@pytest.mark.parametrize("code", [pytest.param(0, marks=pytest.mark.slow), 1, 3])
def test_the_test_of_the_page(code: int, shipped, monkeypatch):
    """It passes on 0 alone."""
    called = []

    def call(command):
        called.append(command)
        return code

    names: dict = {}
    exec(snippets("python"), names)
    monkeypatch.setattr(subprocess, "call", call)
    if code:
        with pytest.raises(AssertionError):
            names["test_the_merge_is_what_was_trained"]()
    else:
        names["test_the_merge_is_what_was_trained"]()
        monkeypatch.chdir(shipped)
        assert exit_code(f"{shlex.join(called[0])} --quiet") == 0


def test_the_exit_codes_of_the_page():
    """Those that the command's own help states."""
    codes = re.findall(r"^\| (\d) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert codes == ["0", "1", "2", "3"]
    help_text = CliRunner().invoke(cli.app, ["verify", "--help"]).output
    assert "Exit 0 passed, 1 failed, 2 unreadable, 3 undecided" in " ".join(help_text.split())


# --- what it was tried on


def test_no_broken_export_passes_and_no_right_one_fails():
    """In the table that benchmarks/exports has measured, and in its sentence."""
    page = DATA.read_text(encoding="utf-8")
    table = page.partition("<!-- exports -->")[2].partition("<!-- end of exports -->")[0]
    rows = [row.split(" | ") for row in table.strip().splitlines()[2:]]
    broken = [row for row in rows if row[3] == "no"]
    right = [row for row in rows if row[3] == "yes"]
    assert len(broken) + len(right) == len(rows)
    assert len(broken) >= 20
    assert len(right) >= 20
    assert [row for row in broken if row[4] == "0"] == []
    assert [row for row in right if row[4] == "1"] == []
    assert f"Of {len(broken)} broken ones 0 pass; of {len(right)} right ones 0 fail" in (
        PAGE.read_text(encoding="utf-8")
    )


OF_PEFT = [
    "PiSSA, converted",
    "LoKr by `save_as_lora`",
    "`add_weighted_adapter`, cat",
    "merged in float16, saved in float32",
    "another checkpoint as base",
    "saved beside an adapter called `mlp`",
]


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("name", OF_PEFT)
def test_exports_of_peft_again(name: str):
    """Some of the table's rows that need no other library, made and verified anew."""
    if "save_as_lora" in name and not hasattr(peft, "save_as_lora"):
        pytest.skip("this PEFT converts nothing to LoRA")
    (export,) = (export for export in exports.EXPORTS if export.what == name)
    result = exports.tried(export)
    assert result.code == int(exports.is_broken(result)), result.says


# --- the makers of exports


def test_a_converter_that_fails_silently_is_an_error_that_names_it():
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(RuntimeError, match=r"failed \(3\): no output"):
        by_others.run_converter(command)


def test_a_server_that_ends_is_not_waited_for(monkeypatch):
    with socket.socket() as free:
        free.bind((by_others.HOST, 0))
        _, port = free.getsockname()
    monkeypatch.setattr(by_others, "PORT", port)
    with pytest.raises(RuntimeError, match="ended with 3 before it answered"):
        by_others.start_server([sys.executable, "-c", "raise SystemExit(3)"])


def test_another_program_at_the_port_is_not_taken_for_the_server(monkeypatch):
    with socket.create_server((by_others.HOST, 0)) as other:
        _, port = other.getsockname()
        monkeypatch.setattr(by_others, "PORT", port)
        with pytest.raises(RuntimeError, match="another program listens"):
            by_others.start_server([sys.executable, "-c", "raise SystemExit(3)"])


def test_the_config_is_put_back_if_a_conversion_fails(tmp_path, monkeypatch):
    config = tmp_path / "adapter" / "adapter_config.json"
    config.parent.mkdir()
    config.write_text('{"lora_alpha": 5}')

    def fail(command: list[str]) -> None:
        assert json.loads(config.read_text()) == {"lora_alpha": 3}
        raise RuntimeError("the script failed")

    monkeypatch.setattr(by_others, "converters", lambda: tmp_path)
    monkeypatch.setattr(by_others, "run_converter", fail)
    make = by_others.lora_to_gguf_misread(lora_alpha=3)
    with pytest.raises(RuntimeError, match="the script failed"):
        make(tmp_path)
    assert json.loads(config.read_text()) == {"lora_alpha": 5}
