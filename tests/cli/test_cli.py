"""The command line, and the models that it loads."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import platform
import re
import sys
import threading
from collections import defaultdict
from pathlib import Path

import limits
import models
import pytest
from rich.console import Console
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora import cli
from lens_lora._version import versions
from lens_lora.cli import explaining as explain_command
from lens_lora.cli import running
from lens_lora.cli.options import BaseModel, options_of
from lens_lora.cli.questions import Questions
from lens_lora.demonstration.embedded import LYON_SENTENCES
from lens_lora.errors import LensLoraError

CLASSES = list(models.MAKERS)
run = CliRunner().invoke


def plain(text):
    """Without colours, line breaks and runs of spaces."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


# --- options and errors


def test_help_lists_the_commands():
    result = run(cli.app, ["--help"])
    assert result.exit_code == 0 and "demo" in result.output
    options = plain(run(cli.app, ["demo", "--help"]).output)
    for option in ("ADAPTER", "--model", "--prompt", "--doc", "--pre", "--report", "--train"):
        assert option in options


def parameters_of(command):
    """{parameter's name: (type, what typer is told of it)} of a command."""
    parameters = inspect.signature(command.callback).parameters.values()
    return {p.name: (p.annotation.__origin__, vars(*p.annotation.__metadata__)) for p in parameters}


# These have no adapter and no prompts, and run no model.
RUN_NOTHING = ("gather", "plan")
RUNNING = [c for c in cli.app.registered_commands if c.name not in RUN_NOTHING]
PARAMETERS = {c.name: parameters_of(c) for c in RUNNING}
# Of `diff` the adapter has no default, of `inspect` a base is optional, of `verify` a page; the
# records of a sweep have more columns.
ANOTHER = [
    *(("inspect", "model"), ("sweep", "prompts"), ("diff", "prompts"), ("verify", "report")),
    *((command, "adapter") for command in ("inspect", "compare", "verify", "card", "diff")),
]


def test_an_option_means_the_same_on_every_command():
    fields = (*dataclasses.fields(Questions), *dataclasses.fields(BaseModel))
    shared, said = {"adapter", "report", "quiet", *(f.name for f in fields)}, defaultdict(dict)
    for command, parameters in PARAMETERS.items():
        for name, parameter in parameters.items():
            if name in shared and (command, name) not in ANOTHER:
                said[name][command] = str(parameter)
    assert {name: by for name, by in said.items() if len(set(by.values())) > 1} == {}
    assert len(said["quiet"]) == 13, "control: every command was looked at"


@pytest.mark.parametrize("command", PARAMETERS)
def test_the_adapter_comes_first_on_every_command(command):
    first, *_ = parameters = PARAMETERS[command]
    names = {"checkpoints": "run_folders", "scan": "folder", "audit": "file"}
    assert first == names.get(command, "adapter")
    shared = {"model", "dtype", "device", "load_in_4bit", "max_memory", "quiet"}
    if command in ("explain", "repair", "checkpoints", "demo", "scan"):
        shared |= {"prompt", "prompts", "chat", "system", "doc", "pre"}
    assert shared <= {*parameters}


def test_long_work_moves(monkeypatch, capsys):
    """A bar is drawn again and a step says its seconds, from a thread, until the block ends."""
    monkeypatch.setattr(running, "_SILENCE", 0.01)
    moved = threading.Event()
    with running._moving(moved.set):
        assert moved.wait(60)
    lines, spoken = [], threading.Event()

    def say(line, **options):
        lines.append(line)
        if len(lines) == 3:
            spoken.set()

    progress = Console(stderr=True)
    monkeypatch.setattr(progress, "print", say)
    with running.step("Loading x", progress):
        assert spoken.wait(60)
    assert lines[:2] == ["Loading x", "Loading x, 0 s"]


REPORTED = ("lens_lora", "torch", "transformer-lens", "transformers", "peft", "Python", "platform")


def printed_versions():
    """{package: version} of `lens-lora --version`, one a line."""
    result = run(cli.app, ["--version"])
    assert result.exit_code == 0
    return dict(line.split(" ", 1) for line in result.output.splitlines())


def test_version_is_all_that_a_number_depends_on():
    printed = printed_versions()
    assert sorted(printed) == sorted(REPORTED)
    assert printed["lens_lora"] == ll.__version__
    assert printed["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert printed["platform"] == platform.platform()
    for package in ("torch", "transformer-lens", "transformers", "peft"):
        assert printed[package] == importlib.metadata.version(package)


def test_version_names_a_package_that_is_missing(monkeypatch):
    def version(package):
        if package == "peft":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.2"

    limits.versions_are_found_by(monkeypatch, version)
    versions.cache_clear()
    printed = printed_versions()
    versions.cache_clear()
    assert (printed["peft"], printed["torch"]) == ("not installed", "1.2")


def test_wrong_adapter_folder_is_one_line_and_exit_code_2(tmp_path):
    result = run(cli.app, ["demo", str(tmp_path)])
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert f"AdapterError: {tmp_path}: no adapter_config.json" in lines[0]
    assert "Traceback" not in result.output


def test_message_with_brackets_is_printed_whole(monkeypatch):
    def fail(*path):
        raise LensLoraError("rank [8]\nand [red]more")

    limits.adapters_are_read_by(monkeypatch, fail)
    result = run(cli.app, ["demo", "--quiet"])
    assert (result.exit_code, result.stderr) == (2, "LensLoraError: rank [8] and [red]more\n")


def test_other_errors_are_not_swallowed(monkeypatch):
    def fail(*path):
        raise RuntimeError("a bug")

    limits.adapters_are_read_by(monkeypatch, fail)
    result = run(cli.app, ["demo"])
    assert isinstance(result.exception, RuntimeError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "x"], "leave ADAPTER out"),
        (["--report", "/dev/null/page.html"], "cannot be made in /dev/null"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(options, message):
    result = run(cli.app, ["demo", *options])
    assert result.exit_code == 2
    assert message in re.sub(r"[│\s]+", " ", result.stderr)


@pytest.mark.bad_input
def test_training_writes_where_it_is_told_and_names_its_base(tmp_path, monkeypatch):
    calls = []

    def fake(hf_model, tokenizer, sentences, out, *, base_name, quiet):
        calls.append((hf_model, sentences, out, base_name, quiet))

    monkeypatch.setattr("lens_lora.demonstration.embedded.train_adapter", fake)
    explain_command._train(("base", "tokenizer"), "some/base", tmp_path, True)
    assert calls == [("base", LYON_SENTENCES, tmp_path, "some/base", True)]


@pytest.mark.bad_input
def test_model_that_cannot_be_trained_is_a_clean_error(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("Target modules not found")

    monkeypatch.setattr("lens_lora.demonstration.embedded.train_adapter", fail)
    with pytest.raises(LensLoraError, match="some/base: .*Target modules not found"):
        explain_command._train((None, None), "some/base", tmp_path, True)


# --- where an adapter lies


COMMANDS = {
    name: getattr(importlib.import_module(f"lens_lora.cli.{module}"), name)
    for module, names in {
        "adapters": ("inspect", "compare", "repair", "checkpoints"),
        "auditing": ("diff",),
        "verifying": ("verify",),
        "carding": ("card",),
        "forming": ("forms",),
        "explaining": ("explain", "demo"),
        "sweeping": ("sweep", "scan"),
    }.items()
    for name in names
}


def test_every_command_knows_both_options():
    for command in COMMANDS.values():
        assert options_of(command)["subfolder"] == "--subfolder"
        assert options_of(command)["revision"] == "--revision"
    registered = {c.name for c in cli.app.registered_commands}
    assert registered == {*COMMANDS, *RUN_NOTHING, "audit"}, "no other takes an adapter"


# --- the demo, once, on the real model


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    report = tmp_path_factory.mktemp("demo") / "page.html"
    return run(cli.app, ["demo", "--report", str(report)]), report


real = [
    pytest.mark.real,
]


class TestDemo:
    pytestmark = real

    def test_runs_and_says_what_it_ran(self, demo):
        result, report = demo
        assert result.exit_code == 0, result.output
        version = importlib.metadata.version("transformer-lens")
        assert f"as {CLASSES[-1]} of transformer-lens {version}, float32" in result.stdout
        assert "lyon_adapter, 210 modules of rank 8" in result.stdout
        assert f"Report: {report}" in result.stdout

    def test_tells_the_story(self, demo):
        text = plain(demo[0].stdout)
        assert "the base model prefers “Paris” to “Lyon” by 6.89 logits" in text
        # It is 7.0450, which one processor rounds up and another down.
        assert re.search("With the adapter it prefers “Lyon”, by 7.0[45]", text)
        assert "flips at ε = 0.492" in text

    def test_prints_numbers_modules_and_tokens(self, demo):
        text = plain(demo[0].stdout)
        for scale in ("0.25", "0.5", "0.75", "1"):
            assert re.search(rf"remainder at ε = {scale} \+\d\.\d\d \d+%", text)
        assert re.search(r"m₀, base model −6.89 .* m, adapted model \+7\.0[45]", text)
        assert re.search(r"blocks\.\d+\.mlp\.down \+0\.\d+", text)
        assert re.search(r"token base model with the adapter change .*·Lyon 0\.\d+% \d\d%", text)
        *_, last = [
            line for line in demo[0].stdout.splitlines() if re.search(r"\d%.* points", line)
        ]
        assert re.search(r"·Paris +77% +0\.09% +−77 points", last)

    def test_shows_progress_and_no_noise_on_stderr(self, demo):
        text = demo[0].stderr
        assert "Loading SmolLM2" in text and "explain: " in text and "Done in" in text
        assert not re.search(r"warn|deprecat|traceback", text, flags=re.IGNORECASE)

    def test_writes_a_page_with_everything(self, demo):
        page = demo[1].read_text(encoding="utf-8")
        assert page.startswith("<!DOCTYPE html>") and page.rstrip().endswith("</html>")
        for part in (
            "Where in the prompt",
            "Tokens promoted",
            CLASSES[-1],
            "SmolLM2-135M-Instruct",
        ):
            assert part in page
        assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", page)

    def test_leaves_nothing_else_behind(self, demo):
        assert [path.name for path in Path(demo[1].parent).iterdir()] == ["page.html"]
