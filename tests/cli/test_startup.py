"""What needs no model is answered without importing torch, transformers, pandas or scipy."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from real import ADAPTER

HEAVY = ("torch", "transformers", "transformer_lens", "peft", "pandas", "scipy", "pyarrow")
ASK = f"""
import json, sys
from lens_lora.cli import app

code = None
try:
    app(sys.argv[1:], prog_name="lens-lora")
except SystemExit as stop:
    code = stop.code
loaded = [name for name in {HEAVY} if name in sys.modules]
print("\\n" + json.dumps([code, loaded]))
"""
EXPLAIN = ["explain", "--prompt", "a"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "200"}


def answer(*arguments: object, code: str = ASK):
    """(exit code, heavy modules that were imported, stdout, stderr) of a command in a process."""
    process = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(process, env=ENVIRONMENT, capture_output=True, text=True)
    return told(done.stdout, done.stderr)


def told(stdout: str, stderr: str):
    assert stdout, stderr
    *said, last = stdout.rstrip().splitlines()
    return (*json.loads(last), "\n".join(said), stderr)


FORKING = """
import json, os, sys
import lens_lora.cli

for line in sys.stdin:
    code, arguments, folder, *said = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        for stream, path in enumerate(said, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.argv[1:] = arguments
        break
    print(os.waitpid(child, 0)[1], flush=True)
else:
    sys.exit()
exec(code)
"""


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """`answer` by a fork of one process, which has imported the command line and nothing more."""
    said = [str(tmp_path_factory.mktemp("said") / name) for name in ("stdout", "stderr")]
    with subprocess.Popen(
        [sys.executable, "-c", FORKING],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def run(*arguments: object, code: str = ASK):
            asked = [code, [str(argument) for argument in arguments], os.getcwd(), *said]
            server.stdin.write(json.dumps(asked) + "\n")
            server.stdin.flush()
            server.stdout.readline()
            return told(*(Path(path).read_text("utf-8") for path in said))

        yield run
        server.stdin.close()


@pytest.fixture
def files(tmp_path):
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "doc": " X", "pre": " Y"}\n')
    (tmp_path / "bad.csv").write_text("text\na\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/adapter_config.json").write_text("{}")
    (tmp_path / "pickled/adapter_model.bin").write_text("")
    return tmp_path


@pytest.mark.slow
def test_help_and_version_load_nothing(forked):
    for arguments in (["--help"], *([name, "--help"] for name in ("explain", "sweep", "demo"))):
        code, loaded, said, _ = forked(*arguments)
        assert (code, loaded) == (0, []) and "Usage: lens-lora" in said
    assert answer("--version")[:2] == (0, [])


SWEEP = ["sweep", "--prompts", "{files}/good.jsonl", "--out", "{files}/r.parquet"]
REFUSED = {
    "command": (["explian"], "No such command 'explian'"),
    "option": (["explain", "--promt", "a"], "No such option: --promt"),
    "nothing asked": (["explain"], "which prompt?"),
    "equal answers": ([*EXPLAIN, "--doc", " X", "--pre", " X"], "doc and pre are both ' X'"),
    "equal answers of the demo": (["demo", "--doc", "X", "--pre", "X"], "doc and pre are both 'X'"),
    "one random adapter": ([*EXPLAIN, "--nulls", "1"], "at least 2 random adapters"),
    "no folder for the page": ([*EXPLAIN, "--report", "/dev/null/x.html"], "cannot be made"),
    "no file of prompts": (["explain", "--prompts", "nowhere.txt"], "'nowhere.txt' does not exist"),
    "no file of records": (["sweep", "--prompts", "nowhere.jsonl"], "'nowhere.jsonl' does not"),
    "bad file of records": (["sweep", "--prompts", "{files}/bad.csv"], "lacks prompt, doc, pre"),
    "name of the result": ([*SWEEP, "--out", "r.csv"], "ends in .parquet"),
    "analysis": ([*SWEEP, "--analysis", "frist_order"], "'frist_order': expected some of"),
    "place of the result": ([*SWEEP, "--out", "{files}/bad.csv/r.parquet"], "cannot be made in"),
    "adapter": (["inspect", "nowhere"], "nowhere: no such folder, nor a hub id"),
    "adapter's folder": (["inspect", "./nowhere"], "./nowhere: no such folder"),
    "folder without adapter": ([*SWEEP, "{files}/empty"], "no adapter_config.json"),
    "pickled adapter": (["demo", "{files}/pickled"], "pickled weights are not read"),
}  # fmt: skip


@pytest.mark.sample(4)
@pytest.mark.parametrize("arguments, words", REFUSED.values(), ids=REFUSED)
def test_refusal_loads_nothing(forked, files, monkeypatch, arguments, words):
    monkeypatch.chdir(files)
    code, loaded, _, error = forked(*(part.format(files=files) for part in arguments))
    assert (code, loaded) == (2, []), error
    assert words in " ".join(error.replace("│", " ").split()) and "Traceback" not in error


FIRST_WORDS = """
import io, json, sys
from lens_lora.cli import app

said = []
def listen(event, arguments):
    if event == "import" and arguments[0] in LATER and not said:
        said.append(sys.stderr.getvalue())
        raise KeyboardInterrupt

sys.stderr, shown = io.StringIO(), sys.stderr
sys.addaudithook(listen)
try:
    app(sys.argv[1:], prog_name="lens-lora")
except BaseException:
    pass
sys.stderr = shown
print("\\n" + json.dumps([0, said]))
"""
ASKED = ["--prompt", "a", "--doc", " X", "--pre", " Y"]
WORKING = {
    "demo": [],
    "explain": ["--prompt", "a"],
    "forms": ["--prompt", "a"],
    "diff": ["{adapter}"],
    "verify": ["{adapter}"],
    "inspect": ["{adapter}"],
    "sweep": ["--prompts", "{files}/good.jsonl", "--out", "{files}/r.parquet"],
    "repair": [*ASKED, "--drop", "{files}/good.jsonl", "--out", "{files}/x"],
    "checkpoints": ["{files}/run", *ASKED],
}


SAY_HOW_LONG = ("demo", "explain", "diff", "verify")


@pytest.mark.sample(2)
@pytest.mark.parametrize("command", WORKING)
def test_a_command_speaks_before_torch_is_imported(forked, files, monkeypatch, command):
    monkeypatch.chdir(files)
    for step in (1, 2):
        shutil.copytree(ADAPTER, files / "run" / f"checkpoint-{step}")
    places = {"files": files, "adapter": ADAPTER}
    arguments = [part.format(**places) for part in WORKING[command]]
    before_torch = f"LATER = ['torch']\n{FIRST_WORDS}"
    _, said, *_ = forked(command, *arguments, code=before_torch)
    (first,) = said
    *foretold, loading = first.splitlines()
    assert loading == "Loading torch and transformers"
    if command in SAY_HOW_LONG:
        does, takes = foretold
        assert re.fullmatch(r"This will .+\.", does)
        assert re.fullmatch(r"It takes about (a|\d+) (second|minute|hour)s?\.", takes)
    else:
        assert foretold == []


@pytest.mark.sample(2)
@pytest.mark.parametrize("command", ["explain", "diff", "verify"])
def test_a_command_says_what_it_will_do_before_it_finds_out_how_long(
    forked, files, monkeypatch, command
):
    """Finding the base imports the hub's library, which takes as long as all that came before."""
    monkeypatch.chdir(files)
    arguments = [part.format(adapter=ADAPTER) for part in WORKING[command]]
    before_the_hub = f"LATER = ['huggingface_hub', 'numpy', 'torch']\n{FIRST_WORDS}"
    _, said, *_ = forked(command, *arguments, code=before_the_hub)
    assert re.fullmatch(r"This will .+\.\n", *said)


IMPORT = f"""
import json, sys
import lens_lora as ll
version, names = ll.__version__, dir(ll)
loaded = [name for name in {HEAVY} if name in sys.modules]
print("\\n" + json.dumps([0, loaded]))
"""
USE = IMPORT.replace("import lens_lora as ll", "import lens_lora as ll; ll.Adapter")


def test_import_loads_nothing():
    assert answer(code=IMPORT)[1] == []


MODULES = (
    "core.readout.readout",
    "core.readout.prompts",
    "core.function.tree",
    "core.results.axes",
    "core.results.storage",
    "responses.generate",
)


# What the host libraries import, once: each module of ours is the first in a fork.
IMPORT_FIRST = """
import importlib, os, sys
import numpy, pandas, peft, scipy, torch, transformer_lens

assert "lens_lora" not in sys.modules
failed = []
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        importlib.import_module(f"lens_lora.{name}")
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
sys.exit(" ".join(failed))
"""


def imported_first(*names: str):
    code = [sys.executable, "-c", IMPORT_FIRST, *names]
    return subprocess.run(code, stderr=subprocess.PIPE, text=True)


@pytest.mark.night
def test_a_module_may_be_imported_first():
    """A module that lacks a name asks the package for it, which imports nothing to answer."""
    done = imported_first(*MODULES, "of no such name")
    assert done.stderr.splitlines()[-1] == "of no such name", done.stderr


@pytest.mark.slow
def test_what_is_loaded_would_be_seen():
    """Control: a name that is used loads its module, and torch with it."""
    assert "torch" in answer(code=USE)[1]


BROKEN = """
import lens_lora.cli
from lens_lora import __main__

def broken(**named):
    raise ValueError("a defect")

lens_lora.cli.app = broken
__main__.main()
"""


@pytest.mark.slow
def test_an_error_that_nobody_foresaw_is_no_failed_check():
    """Its traceback, and a code that no check has."""
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True)
    assert done.returncode == 70
    assert "ValueError: a defect" in done.stderr
    assert "Traceback" in done.stderr
