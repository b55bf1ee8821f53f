"""Tabulate what `lens-lora verify` says of mistakes that other tools pass over in silence.

    python -m benchmarks.verify            # prints the table
    python -m benchmarks.verify --write    # puts it into docs/shipping_data.md

Each mistake of tests/lib/no_ops.py is made on a tiny Llama, and the command verifies it. A sentence
below the table says how much of the demo's adapter a correct merge in bfloat16 keeps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from typer.testing import CliRunner

import lens_lora as ll
from benchmarks.marks import write
from benchmarks.of_tests import no_ops
from lens_lora.cli import app
from lens_lora.demonstration import shipped_adapter
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.ship.merged_folder import MergedFolder
from lens_lora.ship.merged_tensors import compared

PAGE = Path(__file__).parents[1] / "docs" / "shipping_data.md"
# The most characters of a cell.
LONGEST = 190


def table() -> str:
    """A row for each mistake."""
    rows = ["| mistake | exit | what `verify` says |", "| --- | --- | --- |"]
    rows += [row(mistake) for mistake in no_ops.NO_OPS.values()]
    return "\n".join(rows)


def row(mistake: no_ops.NoOp) -> str:
    """Make a mistake and verify it; return the row of the table, with the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        out = no_ops.ship(Path(folder) / "out")
        checks = Path(folder) / "checks.json"
        options = ["--quiet", "--json", str(checks), *mistake.make(out)]
        result = CliRunner().invoke(app, ["verify", str(out / "adapter"), *options])
        if checks.is_file():
            said = decisive_check(json.loads(checks.read_text()))
        else:
            said = " ".join(result.output.split())
    said = said.replace(f"{out}/", "").replace("|", "\\|")
    if len(said) > LONGEST:
        said = f"{said[:LONGEST].rsplit(' ', 1)[0]} …"
    return f"| {mistake.what} | {result.exit_code} | {said} |"


def decisive_check(verification: dict) -> str:
    """The first check whose outcome is that of the whole verification, in words."""
    outcome = verification["outcome"]
    check = next(check for check in verification["checks"] if check["outcome"] == outcome)
    said = f"{check['name']}: {check['measured']}"
    return f"{said}; {check['where']}" if check["where"] else said


def rounding() -> str:
    """A sentence on c of the demo's adapter, merged by PEFT in bfloat16.

    The merged weight of a tensor holds c ΔW: c is 1 if nothing was lost to rounding.
    """
    base, _ = load_embedded()
    half, _ = load_embedded()
    half = half.to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        merged = PeftModel.from_pretrained(half, shipped_adapter()).merge_and_unload()
        merged.save_pretrained(folder)
        adapter = ll.load_adapter(shipped_adapter())
        tensors = list(compared(MergedFolder(Path(folder)), adapter, base))
    # A tensor that the adapter does not change has no ratio.
    ratios = [tensor.ratio for tensor in tensors if tensor.ratio == tensor.ratio]
    middle = statistics.median(ratios)
    least = min(ratios)
    return (
        f"On the demo's adapter, merged by PEFT in bfloat16, c is {middle:.2f} in the median "
        f"tensor and {least:.2f} in the least: by this measure {1 - middle:.0%} of the update is "
        f"gone, and {1 - least:.0%} there.".replace("%", " %")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="into the page")
    arguments = parser.parse_args()
    tables = {"mistakes": table(), "rounding": rounding()}
    if arguments.write:
        write(PAGE, tables)
    else:
        print(*tables.values(), sep="\n\n")


if __name__ == "__main__":
    main()
