"""What `sweeps` makes public, for the tests of every call."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from shared_questions import QUIET
from sweep_runs import GOOD
from torch import Tensor

import lens_lora as ll

# --- Calls, and the numbers that come back


def _swept_values(lens: ll.LoraLens, tokens: Tensor) -> Tensor:
    del tokens
    record = {"prompt": "w5 w6", "doc": " w5", "pre": " w9"}
    with tempfile.TemporaryDirectory() as folder:
        found = ll.sweep(lens, [record], "first_order", out=f"{folder}/r.parquet", **QUIET)
        return found.attribution("first_order").values


CALLS = {"sweep": _swept_values}


# --- Calls that show a bar


def _sweep_with_bar(tiny: Any, folder: Path, **options: Any) -> ll.results.SweepResult:
    records = [{**row, "doc": "w8", "pre": "w9"} for row in GOOD]
    return ll.sweep(tiny.lens, records, out=folder / "r.parquet", resume=False, **options)


WITH_BAR = {"sweep": _sweep_with_bar}
