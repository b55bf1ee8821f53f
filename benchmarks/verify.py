"""What `lens-lora verify` says of mistakes that do nothing, or something else, in silence.

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
            out, checks = ship(Path(folder) / "out"), Path(folder) / "checks.json"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="into the page")
    arguments = parser.parse_args()
    table = "\n".join(["| mistake | exit | what `verify` says |", "| --- | --- | --- |", *rows()])
    if arguments.write:
        from marks import write

        write(PAGE, {"mistakes": table})
    else:
        print(table)


if __name__ == "__main__":
    main()
