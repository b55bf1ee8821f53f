"""A figure as PNG or SVG: without kaleido the error names the one package to install."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LIB = Path(__file__).parents[1] / "lib"
# A name that is None in sys.modules cannot be imported.
WITHOUT_KALEIDO = """
import sys
sys.modules["kaleido"] = None
sys.path.insert(0, sys.argv[1])
import by_folder
training = by_folder.made_public("two_adapters").checkpoints()
training.plot().write_image(sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", [pytest.param("svg", marks=pytest.mark.night), "png"])
def test_without_kaleido_the_error_names_the_package(ending: str, tmp_path: Path):
    picture = tmp_path / f"figure.{ending}"
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_KALEIDO, str(LIB), str(picture)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert found.returncode != 0
    assert not picture.exists()
    assert re.search(r"pip install .*kaleido", found.stderr), found.stderr[-500:]
