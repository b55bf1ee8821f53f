"""Measure from what strength on an adapter breaks the model, on the audit's adapters.

    python -m benchmarks.audit.broken --adapters FOLDER [--most 4]   # measures what is missing
    python -m benchmarks.audit.broken --table                        # writes the table of all

1. `ll.what_changed(lens, nulls=0, fast=True)` runs on each adapter at 1, 3 and 8 times its
   strength. Its brief has the entropy of the next token, and the share of its answers that repeats
   itself.
2. These numbers are stored, with whether the verdict says that the adapter breaks the model, and
   with one answer, for a person to judge.

The numbers of an adapter are in docs/audit_broken.json as soon as it is done, so a run may be
interrupted and called again. An adapter takes half a minute of one core. The table stands in
docs/auditing_data.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import lens_lora as ll
from benchmarks import marks
from benchmarks.audit.teach import every_adapter
from benchmarks.evidence.results import DOCS
from benchmarks.evidence.results import rounded as rounded_number
from lens_lora._version import versions
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.hosts.build import hooked_model

PAGE = DOCS / "auditing_data.md"
NUMBERS = DOCS / "audit_broken.json"
STRENGTHS = (1, 3, 8)
SAYS = "It breaks the model"


def known() -> dict[str, Any]:
    """The numbers of docs/audit_broken.json so far."""
    return json.loads(NUMBERS.read_text()) if NUMBERS.is_file() else {"adapters": {}}


def brief_of(model: Any, adapter: ll.Adapter) -> dict[str, Any]:
    """The numbers of the brief of one adapter at one strength."""
    # With a BOS before each text, as the stored briefs were made.
    lens = ll.LoraLens(model, adapter, prepend_bos=True)
    brief = ll.what_changed(lens, nulls=0, fast=True, progress=False).brief()
    return {
        "mean_kl": rounded_number(brief.mean_kl),
        "entropies": [rounded_number(value) for value in brief.entropies],
        "repeated": [rounded_number(value) for value in brief.repeated],
        "is_broken": SAYS in brief.verdict,
        "answer": brief.answers[0].adapted,
    }


def table(numbers: dict[str, Any]) -> str:
    """A row for each strength: how many are said to break the model, and the numbers' range."""
    heads = ["strength", "called broken", "mean KL", "entropy, of the base's", "repeats, beyond it"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for strength in STRENGTHS:
        runs = [by_strength[str(strength)] for by_strength in numbers["adapters"].values()]
        broken = sum(run["is_broken"] for run in runs)
        kl = [run["mean_kl"] for run in runs]
        # The base's number comes first in each pair.
        ratios = [run["entropies"][1] / run["entropies"][0] for run in runs]
        more = [run["repeated"][1] - run["repeated"][0] for run in runs]
        cells = [
            f"{strength} ×",
            f"{broken} of {len(runs)}",
            f"{min(kl):.2g} to {max(kl):.2g} nats",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            f"{min(more):+.2f} to {max(more):+.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="When an adapter breaks the model.")
    parser.add_argument("--adapters", type=Path, help="teach.py's folder")
    parser.add_argument("--most", type=int, default=24, help="so many in this call")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    if options.table:
        marks.write(PAGE, {"broken": table(known())})
        return
    if options.adapters is None:
        parser.error("--adapters: the folder that teach.py wrote.")
    measured = known()["adapters"]
    names = [adapter.name for adapter in every_adapter() if adapter.control is None]
    missing = [name for name in names if name not in measured]
    model, _ = hooked_model(*load_embedded(), kind="TransformerBridge")
    for name in missing[: options.most]:
        adapter = ll.load_adapter(options.adapters / name)
        runs = {}
        for strength in STRENGTHS:
            runs[str(strength)] = brief_of(model, adapter.scaled(strength))
        numbers = known()
        numbers["versions"] = versions()
        numbers["adapters"][name] = runs
        NUMBERS.write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
        for strength, run in runs.items():
            print(name, strength, run["is_broken"], run["entropies"], run["repeated"], flush=True)


if __name__ == "__main__":
    main()
