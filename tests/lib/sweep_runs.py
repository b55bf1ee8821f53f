"""What the tests of sweeps share: records, files of them, a run, and a stop in its middle."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import cases
import models
import pandas as pd

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
    return cases.case("llama", next(iter(models.MAKERS)), "raw").lens


def run(lens, records, folder, *names, **options):
    options = {"progress": False, **options}
    return ll.sweep(lens, records, names or "first_order", out=folder / "r.parquet", **options)


def same(one, other) -> None:
    pd.testing.assert_frame_equal(one.to_frame(), other.to_frame(), rtol=1e-10, atol=1e-12)
    pd.testing.assert_frame_equal(one.prompts(), other.prompts(), rtol=1e-10, atol=1e-12)


def write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


def write_csv(path: Path, records) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "prompt", "doc", "pre"])
        writer.writeheader()
        writer.writerows(records)
    return path


def interrupt_at(monkeypatch, call: int, error: BaseException) -> None:
    """Raise in the n-th batch."""
    plain = VALUES["first_order"]
    made = []

    def values(*args):
        made.append(None)
        if len(made) == call:
            raise error
        return plain(*args)

    monkeypatch.setitem(VALUES, "first_order", values)


def two_processes(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`lens-lora sweep` as the documentation launches it on two CPU processes."""
    with socket.socket() as probe:
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
