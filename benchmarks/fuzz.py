"""Run mutated input: count what is read correctly, what is refused by an error of ours, and faults.

    python -m benchmarks.fuzz --cases 10000 [--first 0] [--write]

The input is adapter folders, result files, records, files of half-finished sweeps, prompts, tokens,
gates and users' hooks. It is made from a seed: the same number gives the same case. Each case runs
within 10 seconds and 1 GB, with sockets, processes and unpickling trapped. What is read is compared
with PEFT and Hugging Face in float64.

The cases themselves are in tests/house/fuzz, and a few hundred of them run in the test suite; the
nightly job runs new numbers. `--write` puts the table into docs/precision_data.md. The exit code is
1 if there is a fault.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import marks, of_tests

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "precision_data.md"
TABLE = "fuzz"


def main() -> int:
    """Run the cases; return the exit code."""
    asked = arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    fuzz = of_tests.fuzz_cases()

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        run = fuzz.Fuzz(Path(folder))
        done = run.run(asked.cases, asked.first, start + asked.seconds)
    seconds = time.monotonic() - start
    table = fuzz.table(run.counts)
    text = f"{done:,} cases, numbers {asked.first:,} to {asked.first + done - 1:,}."
    print(f"{table}\n\n{text} {seconds:.0f} s.")
    for fault in run.faults[: asked.shown]:
        print(f"\n{fault}", file=sys.stderr)
    if asked.write:
        marks.write(PAGE, {TABLE: f"{text}\n\n{table}"})
    return bool(run.faults)


def arguments() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--shown", type=int, default=20, help="faults that are shown in full")
    parser.add_argument("--write", action="store_true", help="into docs/precision_data.md")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
