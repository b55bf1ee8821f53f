"""Every name in the package's code exists. Ruff's own check of it is off, for it takes the axes of
jaxtyping's shapes, which are strings, for names; here what stands within a string is left out.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]


def unknown_names(*paths: Path) -> list[str]:
    """'file:line name' of each name that ruff cannot find and that is not within a string."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821"]
    run = subprocess.run(
        [*command, "--output-format", "json", *map(str, paths)], capture_output=True, text=True
    )
    found = []
    for fault in json.loads(run.stdout):
        path, at = Path(fault["filename"]), fault["location"]
        if not is_in_string(path.read_text(encoding="utf-8"), at["row"], at["column"] - 1):
            found.append(f"{path.name}:{at['row']} {fault['message']}")
    return found


def is_in_string(text: str, row: int, column: int) -> bool:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.STRING and token.start <= (row, column) < token.end:
            return True
    return False


def test_every_name_exists():
    assert not unknown_names(ROOT / "lens_lora", ROOT / "tests", ROOT / "benchmarks")


def test_an_unknown_name_is_seen(tmp_path):
    path = tmp_path / "planted.py"
    path.write_text(
        "from jaxtyping import Float\nfrom torch import Tensor\n\n\n"
        'def f(x: Float[Tensor, "row site"]) -> Float[Tensor, "row"]:\n    return x + missing\n'
    )
    assert unknown_names(path) == ["planted.py:6 Undefined name `missing`"]
