"""Measure a sweep of many prompts in one process, and in two that accelerate launches.

1. The prompts are passages of about `LENGTH` tokens, written to a JSONL file.
2. `lens-lora sweep` computes first order and the exact shift of each, in one process and then in
   `PROCESSES` that share the prompts. Imports and loading the model are part of what is measured.
3. Both have to write the same files, byte for byte.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import lens_lora as ll
from benchmarks.measuring import MARGIN, load_average, text_prompts

__all__ = ["rank_table"]

# About how many tokens a prompt has.
LENGTH = 8
# How many processes accelerate launches.
PROCESSES = 2


class Taken(NamedTuple):
    """The seconds that a command took.

    Attributes:
        clock: by the clock.
        cpu: of processor time, over all its processes.
    """

    clock: float
    cpu: float


def rank_table(lens: ll.LoraLens, count: int) -> None:
    """Print what a sweep of so many prompts takes in one process, and in several.

    Args:
        lens: over the embedded model, whose tokenizer writes the prompts.
        count: the number of prompts.

    Raises:
        SystemExit: the two runs wrote different files.
    """
    with tempfile.TemporaryDirectory() as place:
        prompts = Path(place) / "prompts.jsonl"
        write_prompts(lens, count, prompts)
        one = Path(place) / "one"
        several = Path(place) / "several"
        rows = {
            "one process": taken_by([sys.executable], prompts, one),
            f"{PROCESSES} processes of accelerate": taken_by(launcher(), prompts, several),
        }
        if contents(one) != contents(several):
            raise SystemExit("one process and several wrote different files")
    print(
        f"| first order of {count:,} prompts of {LENGTH} tokens | by the clock | processor time |"
    )
    print("| --- | --- | --- |")
    for name, taken in rows.items():
        print(f"| {name} | {taken.clock:.0f} s | {taken.cpu:.0f} s |")
    print(f"\nEach ran once, and both wrote the same files, byte for byte ({load_average()}).")


def write_prompts(lens: ll.LoraLens, count: int, path: Path) -> None:
    """Write so many prompts, each with the words of the margin."""
    ids = text_prompts(lens, count, LENGTH).tokens
    lines: list[str] = []
    for number, prompt in enumerate(lens.model.tokenizer.batch_decode(ids)):
        record = {"id": number, "prompt": prompt, "doc": MARGIN.doc, "pre": MARGIN.pre}
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def launcher() -> list[str]:
    """The beginning of a command that accelerate runs in several processes of the CPU."""
    with socket.socket() as probe:
        # Port 0 makes the system choose a free one.
        probe.bind(("localhost", 0))
        _, port = probe.getsockname()
    # `--multi_gpu` selects torch's launcher, on CPUs too.
    options = {
        "--num_processes": PROCESSES,
        "--num_machines": 1,
        "--mixed_precision": "no",
        "--dynamo_backend": "no",
        "--main_process_port": port,
    }
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    for name, value in options.items():
        command += [name, str(value)]
    return command


def taken_by(launch: Sequence[str], prompts: Path, folder: Path) -> Taken:
    """Run the sweep, and return what it took.

    Args:
        launch: what comes before `-m lens_lora`.
        prompts: the file of prompts.
        folder: where the results are written.
    """
    folder.mkdir()
    out = folder / "results.parquet"
    sweep = ["-m", "lens_lora", "sweep", "--model", "embedded", "--quiet"]
    files = ["--prompts", str(prompts), "--out", str(out)]
    start = time.monotonic()
    start_of_cpu = cpu_of_children()
    subprocess.run(
        [*launch, *sweep, *files],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return Taken(clock=time.monotonic() - start, cpu=cpu_of_children() - start_of_cpu)


def cpu_of_children() -> float:
    """Processor seconds of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
