"""The commands and the terminal: Ctrl-C at any moment, any encoding, files before words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from folders import adapter_of, saved_llama
from rich.cells import cell_len
from rich.console import Console
from sweep_runs import GOOD, write_jsonl
from terminal import plain
from typer.testing import CliRunner

from lens_lora import cli
from lens_lora.__main__ import print_in_any_encoding
from lens_lora.cli.files import lines_of
from lens_lora.errors import LensLoraError

LIB = Path(__file__).parents[1] / "lib"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, a run of two checkpoints, and texts."""
    folder = tmp_path_factory.mktemp("terminal")
    base = saved_llama(folder / "base")
    adapter = adapter_of(base, folder / "base")
    for step in (1, 2):
        adapter.scaled(step / 2).save(folder / "run" / f"checkpoint-{step}")
    (folder / "texts.txt").write_text("w5 w6 w7 w8\nw9 w10 w11\n")
    write_jsonl(folder / "r.jsonl", GOOD)
    return folder


MARGIN = ["--prompt", "w5 w6 w7", "--doc", "w9", "--pre", "w26"]
ADAPTER = "{files}/run/checkpoint-2"
# The arguments of every command, by its name. `response` is `explain` with a response.
COMMANDS = {
    "explain": [*MARGIN, ADAPTER, "--fast", "--report", "{out}/page.html"],
    "response": ["--prompt", "w5 w6", "--response", "w7", ADAPTER, "--report", "{out}/page.html"],
    "demo": [*MARGIN, ADAPTER, "--report", "{out}/page.html"],
    "diff": [ADAPTER, "--texts", "{files}/texts.txt", "--nulls", "0", "--fast",
             "--report", "{out}/page.html", "--save", "{out}/numbers.csv"],
    "checkpoints": ["{files}/run", *MARGIN, "--report", "{out}/page.html"],
    "repair": [*MARGIN, ADAPTER, "--drop", "{files}/texts.txt", "--steps", "1", "--out",
               "{out}/fixed", "--report", "{out}/page.html"],
    "sweep": ["--prompts", "{files}/r.jsonl", ADAPTER, "--out", "{out}/r.parquet"],
    "inspect": [ADAPTER, "--model", "{files}/base"],
    "verify": [ADAPTER, "--report", "{out}/page.html"],
    "forms": ["--prompt", "w5 w6 w7", ADAPTER, "--form", "merged NF4", "--csv", "{out}/t.csv"],
}  # fmt: skip
# The files that each command writes with these arguments, within {out}.
OUTPUTS = {
    "explain": ["page.html"],
    "response": ["page.html"],
    "demo": ["page.html"],
    "diff": ["page.html", "numbers.csv"],
    "checkpoints": ["page.html"],
    "repair": ["fixed/adapter_model.safetensors", "page.html"],
    "sweep": ["r.parquet", "r.prompts.parquet", "r.command.json"],
    "inspect": [],
    "verify": ["page.html"],
    "forms": ["t.csv"],
}
# What commands print before their work, and files are written after it.
HEADS = ("Model:", "Adapter:", "Strings:")
# The beginnings of lines that are printed in one piece: a terminal wraps them by itself.
UNWRAPPED = ("Model:", "Adapter:", "Report:", "Numbers:", "Table:", "One row")


def filled_in(arguments: list[str], files: Path, out: Path) -> list[str]:
    """Put the folders of inputs and outputs into arguments."""
    return [argument.format(files=files, out=out) for argument in arguments]


def arguments_of(command: str, files: Path, out: Path) -> list[str]:
    """The command line that runs a command on these files, without the program's name."""
    name = "explain" if command == "response" else command
    return [name, *filled_in(COMMANDS[command], files, out), "--quiet"]


def missing_outputs(command: str, out: Path) -> list[str]:
    """The files that a command should have written and has not."""
    return [name for name in OUTPUTS[command] if not (out / name).is_file()]


# --- Encodings and widths


WIDE = {"COLUMNS": "200"}
ENCODINGS = [(command, "ascii") for command in COMMANDS]
ENCODINGS += [("explain", "cp1252"), ("explain", "latin-1")]
# Signs and dashes that an encoding may lack are printed as a hyphen.
TO_HYPHENS = str.maketrans("−–—", "---")


def printed_in(encoding: str, arguments: list[str]) -> str:
    """What a command prints in a terminal of this encoding."""
    runner = CliRunner(charset=encoding)
    with runner.isolation(env=WIDE) as streams:
        print_in_any_encoding()
        cli.app(arguments, standalone_mode=False)
        sys.stdout.flush()
        stdout = streams[0]
        return stdout.getvalue().decode(encoding)


def count_of_signs(text: str) -> Counter[str]:
    """How many numbers have a plus, and how many a hyphen, just before them."""
    return Counter(re.findall(r"[+-](?=\d)", text))


@pytest.mark.sample(1)
@pytest.mark.parametrize(("command", "encoding"), ENCODINGS)
def test_a_terminal_that_is_not_utf8(files, tmp_path, command, encoding):
    """Everything is written and printed, and no number loses its sign."""
    arguments = arguments_of(command, files, tmp_path)
    printed = printed_in(encoding, arguments)
    assert missing_outputs(command, tmp_path) == []
    assert not re.search(r"\?\d", printed), printed
    in_utf8 = CliRunner().invoke(cli.app, arguments, env=WIDE).stdout
    assert count_of_signs(printed) == count_of_signs(in_utf8.translate(TO_HYPHENS))


@pytest.mark.sample(2)
@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_printed_fits_the_terminal(files, tmp_path, command, width):
    """No line is wider than the terminal, and none holds one letter alone."""
    arguments = arguments_of(command, files, tmp_path)
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": str(width)})
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if not line.startswith(UNWRAPPED)]
    assert len(lines) > 3, result.output
    assert [line for line in lines if cell_len(line) > width] == []
    letters = ["".join(line.split()) for line in lines]
    assert [line for line in letters if len(line) == 1] == []


@pytest.mark.sample(2)
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "diff"])
def test_files_are_written_before_words(files, tmp_path, monkeypatch, command):
    """What cannot be printed costs nothing that was computed.

    `diff` prints its first screen while most of its work is still to come.
    """

    def print_heads_alone(console, *objects, **options):
        first = objects[0] if objects else ""
        is_head = str(first).startswith(HEADS)
        if not console.stderr and not is_head:
            raise UnicodeEncodeError("ascii", "ε", 0, 1, "none")

    monkeypatch.setattr(Console, "print", print_heads_alone)
    result = CliRunner().invoke(cli.app, arguments_of(command, files, tmp_path))
    assert isinstance(result.exception, UnicodeEncodeError)
    assert missing_outputs(command, tmp_path) == []


def test_the_outcome_of_verify_is_below_its_table(files, tmp_path):
    """The outcome is what a small screen still shows at the end."""
    result = CliRunner().invoke(cli.app, arguments_of("verify", files, tmp_path))
    shown = " ".join(result.stdout.split())
    outcome = shown.index("every check that was asked for passed")
    row_of_table = shown.index("loads on the base")
    assert outcome > row_of_table


# --- Processes of their own


# What every process of these tests has in its environment.
QUIET = {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


def run_python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run Python with these arguments, and wait for its end."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **QUIET, **environment},
        capture_output=True,
    )


@pytest.mark.night
@pytest.mark.parametrize(
    "arguments", [["sweep", "--help"], ["inspect", "{files}/run/checkpoint-1", "--quiet"]]
)
def test_a_process_whose_output_is_not_utf8(files, tmp_path, arguments):
    """The program itself prints in ASCII, and has no error to tell."""
    command = filled_in(arguments, files, tmp_path)
    ended = run_python("-m", "lens_lora", *command, PYTHONIOENCODING="ascii")
    assert ended.stderr == b""
    assert ended.returncode == 0
    assert ended.stdout.decode("ascii")


# --- Ctrl-C


# A moment as tests/lib/interrupted.py is told it, and the command that is interrupted then.
MOMENTS = {
    "the command line is imported": ("import:typer:1", "sweep"),
    "the records are read": ("open:r.jsonl:1", "sweep"),
    "the adapter's config is read": ("open:adapter_config.json:1", "inspect"),
    "torch is imported": ("import:torch.nn:1", "sweep"),
    "transformers is imported": ("import:transformers:1", "diff"),
}
BATCH_WAS_WRITTEN = "open:r.parts:1"
AFTER_IMPORTS = {
    "the tokenizer is read": ("open:tokenizer_config.json:1", "sweep"),
    "a batch was written": (BATCH_WAS_WRITTEN, "sweep"),
    "the page is written": ("open:page.html:2", "checkpoints"),
    "all is done": ("end::1", "inspect"),
}


class Ended(NamedTuple):
    """How a command ended: its exit code, and what it wrote to stderr."""

    code: int
    stderr: str


def interrupted(moment: str, arguments: list[str]) -> Ended:
    """Interrupt a command in a process of its own, which has imported nothing before."""
    ended = run_python(LIB / "interrupted.py", moment, *arguments)
    return Ended(ended.returncode, ended.stderr.decode())


@pytest.fixture(scope="module")
def interrupted_in_fork(tmp_path_factory):
    """Interrupts a command in a fork of a process that has imported everything."""
    stderr = tmp_path_factory.mktemp("forks") / "stderr"
    with subprocess.Popen(
        [sys.executable, str(LIB / "forking.py")],
        env={**os.environ, **QUIET, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def run(moment: str, arguments: list[str]) -> Ended:
            stderr.unlink(missing_ok=True)
            server.stdin.write(json.dumps([moment, arguments, str(stderr)]) + "\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
            return Ended(code, stderr.read_text())

        yield run
        server.stdin.close()


def the_line_of(ended: Ended) -> str:
    """The one line that an interrupted command writes, warnings aside; its exit code is 130."""
    assert ended.code == 130, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("Warning: ")]
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("Interrupted.")
    return lines[0]


@pytest.mark.sample(1)
@pytest.mark.parametrize("moment, command", MOMENTS.values(), ids=MOMENTS)
def test_ctrl_c_is_one_line_and_130(files, tmp_path, moment, command):
    ended = interrupted(moment, arguments_of(command, files, tmp_path))
    assert "run the same command again" not in the_line_of(ended)


@pytest.mark.night  # a process of its own, which imports everything
@pytest.mark.parametrize("moment, command", AFTER_IMPORTS.values(), ids=AFTER_IMPORTS)
def test_ctrl_c_after_the_imports_is_one_line_and_130(
    files, tmp_path, moment, command, interrupted_in_fork
):
    """A sweep that has written a batch says how to go on; nothing else does."""
    ended = interrupted_in_fork(moment, arguments_of(command, files, tmp_path))
    says_how_to_go_on = "run the same command again" in the_line_of(ended)
    assert says_how_to_go_on == (moment == BATCH_WAS_WRITTEN)


# --- Outputs and inputs


def contents(folder: Path) -> dict[Path, bytes]:
    """The bytes of every file in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def training_arguments(files: Path, out: Path) -> list[str]:
    """The arguments of a `demo` that is to train an adapter instead of reading one."""
    (adapter,) = filled_in([ADAPTER], files, out)
    others = [argument for argument in arguments_of("demo", files, out) if argument != adapter]
    return [*others, "--model", str(files / "base")]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("repair", ["--out", "{files}/run/checkpoint-2"]),
        ("repair", ["--out", "{files}/run/../run/checkpoint-2/."]),
        ("repair", ["--out", "{out}/link"]),
        ("repair", ["--out", "{files}/base"]),
        ("explain", ["--report", "{files}/run/checkpoint-2/adapter_config.json"]),
        ("explain", ["--prompts", "{files}/r.jsonl", "--report", "{files}/r.jsonl"]),
        ("demo", ["--report", "{files}/base/model.safetensors"]),
        ("demo", ["--train", "--train-out", "{files}/base"]),
        ("diff", ["--report", "{files}/texts.txt"]),
        ("diff", ["--save", "{files}/run/checkpoint-2/adapter_model.safetensors"]),
        ("diff", ["--unrelated", "{files}/run/checkpoint-1", "--save",
                  "{files}/run/checkpoint-1/adapter_model.safetensors"]),
        ("checkpoints", ["--report", "{files}/run/checkpoint-1/adapter_config.json"]),
        ("sweep", ["--out", "{out}/linked.parquet"]),
    ],
)  # fmt: skip
def test_an_output_that_is_an_input_is_refused(files, tmp_path, monkeypatch, command, options):
    """It is refused before a model is loaded, and no file has changed."""
    # A command that loads a model fails: None cannot be called.
    monkeypatch.setattr("lens_lora.cli.running.load_model", None)
    (tmp_path / "link").symlink_to(files / "run" / "checkpoint-2")
    (tmp_path / "linked.parquet").symlink_to(files / "r.jsonl")
    before = contents(files)
    arguments = arguments_of(command, files, tmp_path)
    if "--train" in options:
        arguments = training_arguments(files, tmp_path)
    # Of an option that is given twice, the last one holds.
    arguments += filled_in(options, files, tmp_path)
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2, result.output
    assert "is what this command reads" in plain(result.stderr)
    assert contents(files) == before


def test_two_outputs_are_two_files(files, tmp_path):
    """One file under two paths is refused."""
    arguments = arguments_of("diff", files, tmp_path)
    (tmp_path / "folder").mkdir()
    arguments += ["--report", f"{tmp_path}/x.csv", "--save", f"{tmp_path}/folder/../x.csv"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2, result.output
    assert "they name the same file" in plain(result.stderr)


@pytest.mark.slow
def test_a_page_in_the_adapters_folder_may_be_written_again(files, tmp_path):
    page = files / "run" / "checkpoint-2" / "page.html"
    arguments = [*arguments_of("explain", files, tmp_path), "--report", str(page)]
    first = CliRunner().invoke(cli.app, arguments)
    assert first.exit_code == 0, first.output
    second = CliRunner().invoke(cli.app, arguments)
    assert second.exit_code == 0, second.output
    page.unlink()


# --- Text files


# Python's `splitlines` ends a line at each of these.
CUTS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_lines_end_at_newlines_alone(tmp_path, newline):
    """No other character ends a line. Blank lines and a byte order mark are left out."""
    lines = [f"w5{cut}w6" for cut in CUTS]
    text = "\ufeff" + newline.join([*lines, " ", ""])
    path = tmp_path / "texts.txt"
    path.write_bytes(text.encode())
    assert lines_of(path) == lines


@pytest.mark.sample(1)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_utf16_is_named(tmp_path, encoding):
    """A file in UTF-16 is refused with what to do, with and without a byte order mark."""
    path = tmp_path / "texts.txt"
    path.write_text("w5\n", encoding=encoding)
    with pytest.raises(LensLoraError, match=r"texts\.txt is UTF-16; save it as UTF-8"):
        lines_of(path)
