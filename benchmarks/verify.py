"""What `lens-lora verify` says of mistakes that do nothing, or something else, in silence; and what
a right merge in bfloat16 keeps of the demo's adapter.

    python benchmarks/verify.py            prints the table
    python benchmarks/verify.py --write    puts it into docs/your_model.md

Each mistake of tests/lib/no_ops.py is made on a tiny Llama, and verified by the command.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "lib")]
PAGE = ROOT / "docs" / "your_model.md"
_LONGEST = 190  # characters of a cell


def rows() -> list[str]:
    """A line of the table for each mistake."""
    from no_ops import NO_OPS, ship
    from typer.testing import CliRunner

    from lens_lora.cli import app

    lines: list[str] = []
    for mistake in NO_OPS.values():
        with tempfile.TemporaryDirectory() as folder:
            out = ship(Path(folder) / "out")
            checks = Path(folder) / "checks.json"
            options = ["--quiet", "--json", str(checks), *mistake.make(out)]
            result = CliRunner().invoke(app, ["verify", str(out / "adapter"), *options])
            said = " ".join(result.output.split())
            if checks.is_file():
                verification = json.loads(checks.read_text())
                outcome = verification["outcome"]
                due = next(c for c in verification["checks"] if c["outcome"] == outcome)
                said = f"{due['name']}: {due['measured']}"
                said += f"; {due['where']}" if due["where"] else ""
            said = said.replace(f"{out}/", "").replace("|", "\\|")
        said = said if len(said) <= _LONGEST else f"{said[:_LONGEST].rsplit(' ', 1)[0]} …"
        lines.append(f"| {mistake.what} | {result.exit_code} | {said} |")
    return lines


def rounding() -> str:
    """c of each tensor of the demo's adapter, merged by PEFT in bfloat16."""
    import statistics

    import torch
    from peft import PeftModel

    from lens_lora.core.adapter.adapter import load_adapter
    from lens_lora.demonstration import embedded
    from lens_lora.ship.merged_folder import MergedFolder
    from lens_lora.ship.merged_tensors import compared

    folder_of_lyon = Path(embedded.__file__).parent / "lyon_adapter"
    base, _ = embedded.load_embedded()
    half, _ = embedded.load_embedded()
    with tempfile.TemporaryDirectory() as folder:
        merged = PeftModel.from_pretrained(
            half.to(torch.bfloat16), folder_of_lyon
        ).merge_and_unload()
        merged.save_pretrained(folder)
        tensors = list(compared(MergedFolder(Path(folder)), load_adapter(folder_of_lyon), base))
    kept = [tensor.ratio for tensor in tensors if tensor.ratio == tensor.ratio]
    middle = statistics.median(kept)
    least = min(kept)
    return (
        f"On the demo's adapter, merged by PEFT in bfloat16, c is {middle:.2f} in the median "
        f"tensor and {least:.2f} in the least: by this measure {1 - middle:.0%} of the update is "
        f"gone, and {1 - least:.0%} there.".replace("%", " %")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="into the page")
    arguments = parser.parse_args()
    table = "\n".join(["| mistake | exit | what `verify` says |", "| --- | --- | --- |", *rows()])
    if arguments.write:
        from marks import write

        write(PAGE, {"mistakes": table, "rounding": rounding()})
    else:
        print(table, rounding(), sep="\n\n")


if __name__ == "__main__":
    main()
