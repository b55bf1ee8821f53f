"""What the tests of sweeps share: records, files of them, a run, and a stop in its middle."""

from __future__ import annotations

import csv
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cases
import models
import pandas as pd
import pytest

import lens_lora as ll
from lens_lora.sweeps.batches import VALUES

GOOD = [
    {"id": "long", "prompt": "w5 w6 w7 w20 w9", "doc": "w8", "pre": "w9"},
    {"id": "several", "prompt": "w7", "doc": "w8 w10", "pre": "w8 w11 w4"},
    {"id": "b", "prompt": "w7 w30", "doc": "w12", "pre": "w9"},
    {"id": "c", "prompt": "w14 w30 w9", "doc": "w8", "pre": "w20"},
    {"id": "mixed", "prompt": "w5 w6", "doc": "w8", "pre": "w9 w10"},
    {"id": "d", "prompt": "w40", "doc": "w41", "pre": "w42"},
]
WITH_A_BAD_ONE = [*GOOD[:3], {"id": "bad", "prompt": ""}, *GOOD[3:]]


def a_lens() -> ll.LoraLens:
    """The lens of a tiny Llama, on the first class of hooked model that is there."""
    return cases.case("llama", next(iter(models.MAKERS)), "raw").lens


def run(
    lens: ll.LoraLens, records: Any, folder: Path, *names: str, **options: Any
) -> ll.results.SweepResult:
    """Sweep the records into a folder, without a bar.

    Args:
        lens: the adapter over the model.
        records: as `ll.sweep` takes them.
        folder: where the file is written.
        names: the analyses; without one, first order.
        options: other options of `ll.sweep`.
    """
    options = {"progress": False, **options}
    return ll.sweep(lens, records, names or "first_order", out=folder / "r.parquet", **options)


def same(one: ll.results.SweepResult, other: ll.results.Sweep) -> None:
    """Fail unless both hold the same numbers and the same prompts."""
    pd.testing.assert_frame_equal(one.to_frame(), other.to_frame(), rtol=1e-10, atol=1e-12)
    pd.testing.assert_frame_equal(one.prompts(), other.prompts(), rtol=1e-10, atol=1e-12)


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """Write a record a line, and return the path."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


def write_csv(path: Path, records: Iterable[dict[str, str]]) -> Path:
    """Write a table with a row a record, and return the path."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "prompt", "doc", "pre"])
        writer.writeheader()
        writer.writerows(records)
    return path


def interrupt_at(monkeypatch: pytest.MonkeyPatch, batch: int, error: BaseException) -> None:
    """Raise this error in the n-th batch of first order."""
    plain = VALUES["first_order"]
    batches = itertools.count(1)

    def values(*args: Any) -> Any:
        if next(batches) == batch:
            raise error
        return plain(*args)

    monkeypatch.setitem(VALUES, "first_order", values)


def two_processes(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`lens-lora sweep` as the documentation launches it on two CPU processes."""
    with socket.socket() as probe:
        # The system picks a port that is free.
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    launch = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu",
        "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", port, "-m", "lens_lora", "sweep",
    ]  # fmt: skip
    return subprocess.run(
        [str(part) for part in [*launch, *arguments]],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
