"""What a user can mend at once is refused before anything is fetched, read or computed.

Each command is given an adapter, a run or a folder that is not there. Looking for it is refused as
well, so a refusal that names the option came before.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import get_args

import pytest
from terminal import plain
from typer.testing import CliRunner

from lens_lora import cli
from lens_lora.cli.options import options_of

ASKED = ["--prompt", "a", "--doc", " X", "--pre", " Y"]
NOWHERE = "./nowhere"
# A file that nobody can write, and a folder that nobody can make.
NO_FILE = "/dev/null/file"
CANNOT_BE_MADE = "cannot be made in /dev/null"


def refusal(*arguments: str) -> str:
    """What a command that is refused prints."""
    result = CliRunner().invoke(cli.app, [*arguments])
    assert result.exit_code == 2, result.output
    return plain(result.stderr)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with files that commands read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("w5 w6\n")
    (tmp_path / "list.yaml").write_text(f"adapters: [{{adapter: {NOWHERE}, name: row}}]\n")
    (tmp_path / "no_brief.json").write_text("[]")
    (tmp_path / "no_margins.jsonl").write_text("{}\n")
    (tmp_path / "asked.jsonl").write_text('{"prompt": "w7", "doc": " w8", "pre": " w9"}\n')
    (tmp_path / "said.jsonl").write_text('{"prompt": "w7", "response": "w8"}\n')
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "results" / "row.html").mkdir(parents=True)
    return tmp_path


SWEEP = ["sweep", NOWHERE, "--prompts", "asked.jsonl"]
REPAIR = ["repair", NOWHERE, *ASKED, "--drop", "texts.txt"]
OUTPUTS = {
    "checkpoints, page": ["checkpoints", NOWHERE, *ASKED, "--report", NO_FILE],
    "checkpoints, JSON": ["checkpoints", NOWHERE, *ASKED, "--json", NO_FILE],
    "scan, table": ["scan", NOWHERE, *ASKED, "--out", f"{NO_FILE}.parquet"],
    "scan, JSON": ["scan", NOWHERE, *ASKED, "--json", NO_FILE],
    "card, block": ["card", NOWHERE, "--out", NO_FILE],
    "card, JSON": ["card", NOWHERE, "--json", NO_FILE],
    "demo, adapter": ["demo", "--train", "--model", NOWHERE, "--train-out", NO_FILE],
    "diff, Jacobian": ["diff", NOWHERE, "--jacobian", NO_FILE],
    "audit, folder": ["audit", "list.yaml", "--out", NO_FILE],
    "compare, JSON": ["compare", NOWHERE, NOWHERE, "--json", NO_FILE],
    "explain, page": ["explain", NOWHERE, *ASKED, "--report", NO_FILE],
    "forms, table": ["forms", NOWHERE, *ASKED, "--csv", NO_FILE],
    "gather, JSON": ["gather", "nowhere.parquet", "--json", NO_FILE],
    "inspect, JSON": ["inspect", NOWHERE, "--json", NO_FILE],
    "plan, JSON": ["plan", "--model", NOWHERE, "--json", NO_FILE],
    "repair, adapter": [*REPAIR, "--out", NO_FILE],
    "repair, page": [*REPAIR, "--out", "fixed", "--report", NO_FILE],
    "sweep, table": [*SWEEP, "--out", f"{NO_FILE}.parquet"],
    "sweep, JSON": [*SWEEP, "--json", NO_FILE],
    "verify, page": ["verify", NOWHERE, "--report", NO_FILE],
}


@pytest.mark.parametrize("command", OUTPUTS.values(), ids=OUTPUTS)
def test_an_output_that_cannot_be_written_is_refused_first(folder: Path, command: list[str]):
    assert CANNOT_BE_MADE in refusal(*command)


ARGUMENTS = {
    "checkpoints, no prompt": (["checkpoints", NOWHERE], "which prompt?"),
    "checkpoints, a run twice": (["checkpoints", NOWHERE, NOWHERE, *ASKED], "named twice"),
    "repair, share": ([*REPAIR, "--out", "fixed", "--keep-share", "0"], "a share above 0"),
    "scan, no prompt": (["scan", NOWHERE], "which prompt?"),
    "scan, name": (["scan", NOWHERE, *ASKED, "--out", "scan.csv"], "ends in .parquet"),
    "scan, shard": (["scan", NOWHERE, *ASKED, "--shard", "3/2"], "expected i/n"),
    "card, no file": (["card", "owner/repo"], "owner/repo is no folder here"),
    "card, brief": (["card", NOWHERE, "--brief", "no_brief.json"], "no brief of lens-lora diff"),
    "card, margins": (["card", NOWHERE, "--expect", "no_margins.jsonl"], "no_margins.jsonl"),
    "sweep, name": ([*SWEEP, "--out", "sweep.csv"], "ends in .parquet"),
    "sweep, KL": (["sweep", NOWHERE, "--prompts", "said.jsonl", "--readout", "kl"], "is not read"),
    "verify, server": (["verify", NOWHERE, "--served", "ftp://a"], "ftp://a"),
    "audit, page": (["audit", "list.yaml", "--out", "results"], "row.html cannot be written"),
}  # fmt: skip


@pytest.mark.parametrize(("command", "words"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_an_argument_that_cannot_be_used_is_refused_first(
    folder: Path, command: list[str], words: str
):
    assert words in refusal(*command)


# The commands that run on several processes, each with a model of its own.
ON_SEVERAL_PROCESSES = {"sweep": SWEEP, "scan": ["scan", NOWHERE, *ASKED]}


@pytest.mark.parametrize("command", ON_SEVERAL_PROCESSES.values(), ids=ON_SEVERAL_PROCESSES)
def test_a_device_map_for_several_processes_is_refused_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--device-map and 2 processes" in refusal(*command, "--device-map", "auto")


# Each command that has an option whose value is a number with a fraction.
COMMANDS = {
    "audit": ["audit", "list.yaml"],
    "card": ["card", NOWHERE],
    "checkpoints": ["checkpoints", NOWHERE, *ASKED],
    "compare": ["compare", NOWHERE, NOWHERE],
    "demo": ["demo", NOWHERE],
    "diff": ["diff", NOWHERE],
    "explain": ["explain", NOWHERE, *ASKED],
    "forms": ["forms", NOWHERE, *ASKED],
    "inspect": ["inspect", NOWHERE],
    "plan": ["plan", "--model", NOWHERE],
    "repair": [*REPAIR, "--out", "fixed"],
    "scan": ["scan", NOWHERE, *ASKED],
    "sweep": SWEEP,
    "verify": ["verify", NOWHERE],
}


def options_for_numbers() -> list[tuple[str, str]]:
    """Each command with each of its options whose value may be a float."""
    found: list[tuple[str, str]] = []
    for command in cli.app.registered_commands:
        assert command.callback is not None
        written = options_of(command.callback)
        signature = inspect.signature(command.callback, eval_str=True)
        for name, parameter in signature.parameters.items():
            type_of_value, *_ = get_args(parameter.annotation)
            if float in (type_of_value, *get_args(type_of_value)):
                found.append((command.callback.__name__, written[name]))
    return found


@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize(("command", "option"), options_for_numbers())
def test_a_number_that_is_not_finite_is_refused_first(
    folder: Path, command: str, option: str, number: str
):
    """Some versions of typer refuse NaN by the option's bound, others let it pass."""
    assert option in refusal(*COMMANDS[command], option, number)


def test_the_options_for_numbers_are_found():
    """Control: the search in the commands' annotations meets the options that are known."""
    options = {option for _, option in options_for_numbers()}
    assert options >= {"--max-memory", "--max-kl", "--timeout", "--keep-share"}


OVERWRITING = {
    "audit": ["audit", "list.yaml", "--json", "list.yaml"],
    "gather": ["gather", "results.parquet", "--json", "results.parquet"],
    "plan": ["plan", "--model", "config.json", "--json", "config.json"],
    "plan, folder": ["plan", "--model", ".", "--json", "config.json"],
}


@pytest.mark.parametrize("command", OVERWRITING.values(), ids=OVERWRITING)
def test_a_result_overwrites_no_file_that_is_read(folder: Path, command: list[str]):
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert "name another place" in refusal(*command) or "name the same file" in refusal(*command)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_an_adapter_that_is_not_there_is_refused_without_another_fault(folder: Path):
    """Control: the cases above fail by what is named besides the adapter."""
    assert "no such folder" in refusal("checkpoints", NOWHERE, *ASKED)
    assert "no such folder" in refusal("scan", NOWHERE, *ASKED)
    assert "no such folder" in refusal(*SWEEP)
    assert "no such folder" in refusal("card", NOWHERE)
    assert "nor a hub id" in refusal("card", "nowhere")
