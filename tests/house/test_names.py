"""A name that does not exist is an error of ruff and of pyright, with the project's settings."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLANTED = (
    '"""A forgotten import."""\n\nfrom jaxtyping import Float\nfrom torch import Tensor\n\n\n'
    'def f(x: Float[Tensor, "row site"], y: Float[Tensor, " row"]) -> Float[Tensor, " row"]:\n'
    '    """A sum."""\n    return x.sum(1) + y + missing\n'
)


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A module with a name that is not there, and the project's own settings beside it."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "lens_lora" / "planted.py"
    path.parent.mkdir()
    path.write_text(PLANTED)
    return path


def run(command: list[str | Path]) -> str:
    """What it prints, in the planted project's folder."""
    folder = Path(command[-1]).parents[1]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout


def test_ruff_sees_a_missing_name_and_takes_no_axis_for_one(planted: Path):
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "json"]
    printed = run([*command, planted])
    assert [(fault["code"], fault["message"]) for fault in json.loads(printed)] == [
        ("F821", "Undefined name `missing`")
    ]


@pytest.mark.slow
def test_pyright_sees_a_missing_name_and_takes_no_axis_for_one(planted: Path):
    pytest.importorskip("pyright")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    printed = run([*command, planted])
    faults = json.loads(printed)["generalDiagnostics"]
    assert [fault["rule"] for fault in faults if fault["severity"] == "error"] == [
        "reportUndefinedVariable"
    ], printed
