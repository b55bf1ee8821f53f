"""The commands and the terminal: Ctrl-C at any moment, any encoding, files before words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

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
ADAPTER = ["{files}/run/checkpoint-2"]
COMMANDS = {
    "explain": [*MARGIN, *ADAPTER, "--fast", "--report", "{out}/page.html"],
    "response": ["--prompt", "w5 w6", "--response", "w7", *ADAPTER, "--report", "{out}/page.html"],
    "demo": [*MARGIN, *ADAPTER, "--report", "{out}/page.html"],
    "diff": ["{files}/run/checkpoint-2", "--texts", "{files}/texts.txt", "--nulls", "0", "--fast",
             "--report", "{out}/page.html", "--save", "{out}/numbers.csv"],
    "checkpoints": ["{files}/run", *MARGIN, "--report", "{out}/page.html"],
    "repair": [*MARGIN, *ADAPTER, "--drop", "{files}/texts.txt", "--steps", "1", "--out",
               "{out}/fixed", "--report", "{out}/page.html"],
    "sweep": ["--prompts", "{files}/r.jsonl", *ADAPTER, "--out", "{out}/r.parquet"],
    "inspect": ["{files}/run/checkpoint-2", "--model", "{files}/base"],
    "verify": ["{files}/run/checkpoint-2", "--report", "{out}/page.html"],
    "forms": ["--prompt", "w5 w6 w7", *ADAPTER, "--form", "merged NF4", "--csv", "{out}/t.csv"],
}  # fmt: skip
WRITTEN = {
    "diff": ["page.html", "numbers.csv"],
    "repair": ["fixed/adapter_model.safetensors", "page.html"],
}
WRITTEN |= {
    "forms": ["t.csv"],
    "sweep": ["r.parquet", "r.prompts.parquet", "r.command.json"],
    "inspect": [],
}


def arguments_of(command: str, files: Path, out: Path) -> list[str]:
    name = "explain" if command == "response" else command
    return [name, *(part.format(files=files, out=out) for part in COMMANDS[command]), "--quiet"]


# --- encodings


ENCODINGS = [(command, "ascii") for command in COMMANDS]
ENCODINGS += [("explain", "cp1252"), ("explain", "latin-1")]


@pytest.mark.sample(1)
@pytest.mark.parametrize(("command", "encoding"), ENCODINGS)
def test_a_terminal_that_is_not_utf8(files, tmp_path, command, encoding):
    """Everything is written and printed, and no number loses its sign."""
    runner, wide = CliRunner(charset=encoding), {"COLUMNS": "200"}
    arguments = arguments_of(command, files, tmp_path)
    with runner.isolation(env=wide) as streams:
        print_in_any_encoding()
        cli.app(arguments, standalone_mode=False)
        sys.stdout.flush()
        shown = streams[0].getvalue().decode(encoding)
    assert all((tmp_path / name).is_file() for name in WRITTEN.get(command, ["page.html"]))
    assert not re.search(r"\?\d", shown), shown
    signs = {sign: len(re.findall(rf"[{sign}]\d", shown)) for sign in "+-"}
    whole = CliRunner().invoke(cli.app, arguments, env=wide).stdout
    assert signs == {sign: len(re.findall(rf"[{sign}]\d", whole.translate(MINUS))) for sign in "+-"}


# Lines that wrap by themselves.
WHOLE = ("Model:", "Adapter:", "Report:", "Numbers:", "Table:", "One row")


@pytest.mark.sample(2)
@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_printed_fits_the_terminal(files, tmp_path, command, width):
    arguments = arguments_of(command, files, tmp_path)
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": str(width)})
    lines = [line for line in result.stdout.splitlines() if not line.startswith(WHOLE)]
    assert result.exit_code == 0 and len(lines) > 3, result.output
    assert [line for line in lines if cell_len(line) > width] == []
    assert [line for line in lines if len("".join(line.split())) == 1] == []


MINUS = str.maketrans("−–—", "---")


@pytest.mark.sample(2)
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "diff"])
def test_files_are_written_before_words(files, tmp_path, monkeypatch, command):
    """What cannot be printed costs nothing that was computed.

    `diff` prints its first screen while most of its work is still to come.
    """

    def fail(console, *what, **how):
        if not console.stderr and not str(what[0] if what else "").startswith(HEADS):
            raise UnicodeEncodeError("ascii", "ε", 0, 1, "none")

    monkeypatch.setattr(Console, "print", fail)
    result = CliRunner().invoke(cli.app, arguments_of(command, files, tmp_path))
    assert isinstance(result.exception, UnicodeEncodeError)
    assert all((tmp_path / name).is_file() for name in WRITTEN.get(command, ["page.html"]))


def test_the_outcome_of_verify_is_below_its_table(files, tmp_path):
    """It is what remains on a small screen."""
    result = CliRunner().invoke(cli.app, arguments_of("verify", files, tmp_path))
    shown = " ".join(result.stdout.split())
    assert shown.index("every check that was asked for passed") > shown.index("loads on the base")


HEADS = ("Model:", "Adapter:", "Strings:")  # before the work


def process(*arguments: object, code: str | None = None, **environment: str):
    how = ["-m", "lens_lora"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *how, *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", **environment},
        capture_output=True,
    )


@pytest.mark.night
@pytest.mark.parametrize(
    "arguments", [["sweep", "--help"], ["inspect", "{files}/run/checkpoint-1", "--quiet"]]
)
def test_a_process_whose_output_is_not_utf8(files, arguments):
    done = process(*(a.format(files=files) for a in arguments), PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.decode("ascii")


# --- Ctrl-C

INTERRUPTED = """
import os, signal, sys

# In the background of a shell it is ignored, and then it stays so.
signal.signal(signal.SIGINT, signal.default_int_handler)
event, name, times = sys.argv.pop(1).split(":")
seen = []

def interrupt(kind="end", arguments=("",)):
    if kind == event and str(arguments[0]).endswith(name):
        seen.append(kind)
        if len(seen) == int(times):
            os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(interrupt)
from lens_lora.__main__ import main
try:
    main()
finally:
    interrupt()
"""
# Started once for the moments at which everything has been imported: each command is a fork of it.
FORKING = f"""
import json, os, sys
import lens_lora as ll
from lens_lora import cli, loading
from lens_lora.cli import adapters, sweeping as sweep
from lens_lora.show import page
from lens_lora.sweeps import batches, sweep as sweeps
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
for name in dir(ll):
    getattr(ll, name)

for line in sys.stdin:
    arguments, said = json.loads(line)
    child = os.fork()
    if not child:
        sys.argv[1:] = arguments
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(1, 0)
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
{INTERRUPTED}
"""


@pytest.fixture(scope="module")
def forking():
    """Runs a command in a fork: its exit code, and what it writes to stderr."""
    with subprocess.Popen(
        [sys.executable, "-c", FORKING],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def run(said: Path, *arguments: str) -> tuple[int, str]:
            server.stdin.write(json.dumps([arguments, str(said)]) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline()), said.read_text()

        yield run
        server.stdin.close()


# An event of Python's, what its argument ends in, and the how-manieth of them is interrupted.
MOMENTS = {
    "the command line is imported": ("import:typer:1", "sweep"),
    "the records are read": ("open:r.jsonl:1", "sweep"),
    "the adapter's config is read": ("open:adapter_config.json:1", "inspect"),
    "torch is imported": ("import:torch.nn:1", "sweep"),
    "transformers is imported": ("import:transformers:1", "diff"),
}
AFTER_IMPORTS = {
    "the tokenizer is read": ("open:tokenizer_config.json:1", "sweep"),
    "a batch was written": ("open:r.parts:1", "sweep"),
    "the page is written": ("open:page.html:2", "checkpoints"),
    "all is done": ("end::1", "inspect"),
}


def one_line(code: int, stderr: str) -> str:
    """What a command said when it was interrupted; its exit code is 130."""
    said = [line for line in stderr.splitlines() if not line.startswith("Warning: ")]
    assert (code, len(said)) == (130, 1), stderr
    assert said[0].startswith("Interrupted.")
    return said[0]


@pytest.mark.sample(1)
@pytest.mark.parametrize("moment, command", MOMENTS.values(), ids=MOMENTS)
def test_ctrl_c_is_one_line_and_130(files, tmp_path, moment, command):
    done = process(moment, *arguments_of(command, files, tmp_path), code=INTERRUPTED)
    said = one_line(done.returncode, done.stderr.decode())
    assert "run the same command again" not in said


@pytest.mark.night  # a process of its own, which imports everything
@pytest.mark.parametrize("moment, command", AFTER_IMPORTS.values(), ids=AFTER_IMPORTS)
def test_ctrl_c_after_the_imports_is_one_line_and_130(files, tmp_path, moment, command, forking):
    arguments = arguments_of(command, files, tmp_path)
    said = one_line(*forking(tmp_path / "stderr", moment, *arguments))
    assert ("run the same command again" in said) == (moment == "open:r.parts:1")


# --- outputs and inputs


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
    """Before a model is loaded, and nothing has changed."""
    monkeypatch.setattr("lens_lora.cli.running.load_model", None)
    (tmp_path / "link").symlink_to(files / "run" / "checkpoint-2")
    (tmp_path / "linked.parquet").symlink_to(files / "r.jsonl")
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    arguments = arguments_of(command, files, tmp_path)
    if "--train" in options:
        arguments = [a for a in arguments if a not in ADAPTER and "checkpoint-2" not in a]
        options = [*options, "--model", str(files / "base")]
    result = CliRunner().invoke(
        cli.app, [*arguments, *(part.format(files=files, out=tmp_path) for part in options)]
    )
    assert result.exit_code == 2 and "is what this command reads" in plain(result.stderr)
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before


def test_two_outputs_are_two_files(files, tmp_path):
    arguments = arguments_of("diff", files, tmp_path)
    same = ["--report", str(tmp_path / "x.csv"), "--save", str(tmp_path / "." / "x.csv")]
    result = CliRunner().invoke(cli.app, [*arguments, *same])
    assert result.exit_code == 2 and "they name the same file" in plain(result.stderr)


@pytest.mark.slow
def test_a_page_in_the_adapters_folder_may_be_written_again(files, tmp_path):
    page = files / "run" / "checkpoint-2" / "page.html"
    for _ in range(2):
        options = ["--report", str(page)]
        result = CliRunner().invoke(cli.app, [*arguments_of("explain", files, tmp_path), *options])
        assert result.exit_code == 0, result.output
    page.unlink()


# --- text files

CUTS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_lines_end_at_newlines_alone(tmp_path, newline):
    lines = [f"w5{cut}w6" for cut in CUTS]
    path = tmp_path / "texts.txt"
    path.write_bytes(("\ufeff" + newline.join([*lines, " ", ""])).encode())
    assert lines_of(path) == lines


@pytest.mark.sample(1)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_utf16_is_named(tmp_path, encoding):
    path = tmp_path / "texts.txt"
    path.write_text("w5\n", encoding=encoding)
    with pytest.raises(LensLoraError, match=r"texts\.txt is UTF-16; save it as UTF-8"):
        lines_of(path)


# --- one process of several
