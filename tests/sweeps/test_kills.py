"""Kills at random moments, on one process and on two: nothing lost, repeated or mixed.

The laws and the killing are in tests/sweeps/kills.py, which takes any number: CONTRIBUTING.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import kills
import pytest

# By the number of processes.
KILLS = {1: 6, 2: 3}


@pytest.mark.night
def test_killed_at_random_moments():
    """In one process, from which each run is forked."""
    kills_each = map(str, KILLS.values())
    counts = map(str, KILLS)
    done = subprocess.run(
        [sys.executable, kills.__file__, "--kills", *kills_each, "--processes", *counts],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for line, (count, wanted) in zip(done.stdout.splitlines(), KILLS.items(), strict=True):
        made = json.loads(line)
        assert made["processes"] == count
        assert made["kills"] >= wanted
        assert made["sweeps"] >= 1


def test_a_repetition_is_seen(tmp_path: Path):
    """Negative control."""
    log = tmp_path / "log"
    log.write_text("begun\tw5\nbegun\tw6\nkept\tw5\nbegun\tw6\nkept\tw6\n")
    assert kills.require_no_repetition(log) == 3
    log.write_text("begun\tw5\nkept\tw5\nbegun\tw6\nbegun\tw5\n")
    with pytest.raises(kills.Broken, match="'w5' was kept, and was run again"):
        kills.require_no_repetition(log)
