"""When does an adapter break the model? The audit's adapters as trained, and many times as strong.

    python benchmarks/audit/broken.py --adapters FOLDER [--most 4]   # as often as needed; goes on
    python benchmarks/audit/broken.py --table                        # writes the table of all

1. `ll.what_changed(lens, nulls=0, fast=True)` of each adapter at 1, 3 and 8 times its strength; the
   brief has the entropy of the next token and the share of its answers that repeats itself.
2. Kept are those numbers, whether the verdict says that it breaks the model, and one answer, for a
   person to judge.

Numbers go to docs/audit_broken.json as each adapter is done. Half a minute of one core each.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1]))
sys.path.insert(2, str(Path(__file__).parents[1] / "evidence"))

import marks
from results import DOCS
from results import rounded as rounded_number
from teach import every_adapter

import lens_lora as ll
from lens_lora._version import versions
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.hosts.build import hooked_model

PAGE = DOCS / "auditing.md"
NUMBERS = DOCS / "audit_broken.json"
STRENGTHS = (1, 3, 8)
SAYS = "It breaks the model"


def known() -> dict[str, Any]:
    return json.loads(NUMBERS.read_text()) if NUMBERS.is_file() else {"adapters": {}}


def brief_of(model: Any, adapter: ll.Adapter) -> dict[str, Any]:
    """What the brief says of an adapter at one strength."""
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
    for strength in map(str, STRENGTHS):
        runs = [runs[strength] for runs in numbers["adapters"].values()]
        kl = sorted(run["mean_kl"] for run in runs)
        ratios = sorted(run["entropies"][1] / run["entropies"][0] for run in runs)
        more = sorted(run["repeated"][1] - run["repeated"][0] for run in runs)
        cells = [
            f"{strength} ×",
            f"{sum(run['is_broken'] for run in runs)} of {len(runs)}",
            f"{kl[0]:.2g} to {kl[-1]:.2g} nats",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            f"{more[0]:+.2f} to {more[-1]:+.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="When an adapter breaks the model.")
    parser.add_argument("--adapters", type=Path, help="teach.py's folder")
    parser.add_argument("--most", type=int, default=24, help="so many in this call")
    parser.add_argument("--table", action="store_true", help="only write the table")
    given = parser.parse_args()
    if given.table:
        marks.write(PAGE, {"broken": table(known())})
        return
    if given.adapters is None:
        parser.error("--adapters: the folder that teach.py wrote.")
    names = [adapter.name for adapter in every_adapter() if adapter.control is None]
    left = [name for name in names if name not in known()["adapters"]][: given.most]
    model, _ = hooked_model(*load_embedded(), kind="TransformerBridge")
    for name in left:
        adapter = ll.load_adapter(given.adapters / name)
        runs = {str(k): brief_of(model, adapter.scaled(k)) for k in STRENGTHS}
        numbers = known()
        numbers["versions"] = versions()
        numbers["adapters"][name] = runs
        NUMBERS.write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
        said = {k: (run["is_broken"], run["entropies"], run["repeated"]) for k, run in runs.items()}
        print(name, said, flush=True)


if __name__ == "__main__":
    main()
