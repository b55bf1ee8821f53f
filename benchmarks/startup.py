"""How long answers take that need no model, as a share of `import transformer_lens`.

    python benchmarks/startup.py

Each command is run RUNS times in a fresh process, in turn with the others so that all see the same
load, and its median is divided by that of the import. What may be expected: the command line's own
answers under 10 %, `import lens_lora` under 60 %. `python -X importtime -m lens_lora --help` shows
where the time goes.
"""

from __future__ import annotations

import importlib.metadata
import os
import statistics
import subprocess
import sys
import time

RUNS = 5
CLI = ["-m", "lens_lora"]
ASKED = ["explain", "--prompt", "a", "--doc", " X"]
COMMANDS = {
    "import transformer_lens": ["-c", "import transformer_lens"],
    "import lens_lora": ["-c", "import lens_lora"],
    "every public name of lens_lora": ["-c", "from lens_lora import *"],
    "--help": [*CLI, "--help"],
    "explian": [*CLI, "explian"],
    "explain --promt": [*CLI, "explain", "--promt", "a"],
    "inspect nowhere": [*CLI, "inspect", "nowhere"],
    "sweep --prompts nowhere.jsonl": [*CLI, "sweep", "--prompts", "nowhere.jsonl"],
    "explain, two equal answers": [*CLI, *ASKED, "--pre", " X"],
}


def seconds(arguments: list[str]) -> float:
    """One run in a fresh process, whatever its exit code."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        check=False,
    )
    return time.perf_counter() - started


def main() -> None:
    """Measure and print the table."""
    for arguments in COMMANDS.values():  # byte code is compiled, files are read once
        seconds(arguments)
    taken = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, arguments in COMMANDS.items():
            taken[name].append(seconds(arguments))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    whole = medians["import transformer_lens"]
    print(f"transformer-lens {importlib.metadata.version('transformer-lens')}, medians of {RUNS}")
    for name, median in medians.items():
        print(f"{median:7.2f} s {median / whole:6.1%}  {name}")


if __name__ == "__main__":
    main()
