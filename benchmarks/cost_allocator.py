"""What glibc's way with freed memory costs: the same calls with it given back, and kept.

By default the memory of a tensor of more than 32 MiB is given back to the system when it is freed,
and the next one is taken anew, page by page. `KEEP` are the variables that keep it. Each column is
a process of its own over the embedded model as a TransformerBridge, on one thread; times are CPU
seconds, medians of three turns after one that is not counted; by token and layer is run once.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

__all__ = ["KEEP", "allocator_table", "keeps_memory"]

KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
TURNS = 3


def keeps_memory() -> bool:
    """Whether this process was started with `KEEP`."""
    return all(os.environ.get(name) == value for name, value in KEEP.items())


def allocator_table() -> None:
    """Run both processes; print their times, and what keeping leaves of them."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    columns = []
    for extra in ({}, KEEP):
        done = subprocess.run(
            [sys.executable, __file__], env={**plain, "OMP_NUM_THREADS": "1", **extra},
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        columns.append(json.loads(done.stdout.splitlines()[-1]))
    print("| work | freed memory given back | kept | share |\n| --- | --- | --- | --- |")
    for name, back in columns[0].items():
        kept = columns[1][name]
        print(f"| {name} | {back:.2f} s | {kept:.2f} s | {kept / back:.2f} |")


def times() -> dict[str, float]:
    """CPU seconds of each work in this process."""
    import cost_responses

    import lens_lora as ll

    lens, found = ll.demo(), {}
    for tokens in (60, 512):
        of = cost_responses.Row(lens, tokens)
        works = {
            "F": of.forward,
            "one readout, all sites": of.one,
            "activations, all sites": lambda of=of: ll.activations(lens, of.row),
            "by token and layer": lambda of=of: of.by_token(group="layer"),
        }
        for name, work in works.items():
            turns = 1 if name == "by token and layer" else TURNS
            taken = [cost_responses.seconds(work) for _ in range(turns + (turns > 1))][-turns:]
            found[f"{name}, {cost_responses.PROMPT} + {tokens} tokens"] = statistics.median(taken)
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    print(json.dumps(times()))
