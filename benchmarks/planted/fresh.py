"""Test two divisors of a warning on plants of fresh seeds, on which neither was chosen.

    python -m benchmarks.planted.fresh --out docs/planted_fresh.json

The warning compares sums of `corrected` with the shift (`alarms.py`). Its second divisor,
`alarms.by_largest_effect`, was found on the smooth plants of `plants.py`. Here both warnings are
computed on one or two plants of each kind, of seeds that no other table uses. Nothing is chosen on
them: the first threshold is that of the page, the second is the definition of *interacts*.

Plants that are in the file already are left alone. It takes about ten minutes of one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.evidence.bases import load_base
from benchmarks.planted.judged import ENDS, SCORES, question_of, screened, sums_off
from benchmarks.planted.kinds import planted
from benchmarks.planted.plants import Bed, Recipe
from lens_lora.demonstration.embedded import EMBEDDED_NAME

FRESH = (
    Recipe("confined", 10),
    Recipe("confined", 11),
    Recipe("two facts", 11),
    Recipe("redundant", 10),
    Recipe("masked", 7),
    Recipe("opposed", 5),
    Recipe("gated", 10),
    Recipe("constant", 11),
    Recipe("constant", 12),
    Recipe("additive", 6),
    Recipe("loud conjunction", 6),
    Recipe("loud conjunction", 7),
)
NEEDED = ("first_order@0", "first_order@1", "add_one", "leave_one_out")
DIGITS = 3


def warned(bed: Bed, recipe: Recipe) -> dict[str, Any]:
    """A plant's kind, whether it enters, and `cases`, with three numbers of each question.

    These are its interaction, by interventions, and the warning with each divisor.
    """
    plant = planted(bed, recipe)
    if not plant.enters:
        return {"kind": recipe.kind, "enters": False, "cases": []}
    g = question_of(bed, plant)
    scores = {key: SCORES[key](g) for key in NEEDED}
    corrected = [screened(g, how, at, scores).corrected for how, at in ENDS.items()]
    cases = []
    for row, check in enumerate(plant.confirmed):
        shift = float(g.ends[1, row] - g.ends[0, row])
        off = max(abs(float(values[row].sum()) - shift) for values in corrected)
        largest = max(float(values[row].abs().max()) for values in corrected)
        numbers = {
            "interaction": check["interaction"],
            "by sizes": sums_off(g, row, corrected),
            "by largest": off / max(abs(shift), largest),
        }
        cases.append({key: round(value, DIGITS) for key, value in numbers.items()})
    return {"kind": recipe.kind, "enters": True, "cases": cases}


def main() -> None:
    parser = argparse.ArgumentParser(description="Both divisors, on plants of other seeds.")
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    stored = json.loads(out.read_text()) if out.is_file() else {}
    bed = Bed.of(*load_base(EMBEDDED_NAME))
    to_do = [recipe for recipe in FRESH if recipe.name not in stored]
    for recipe in tqdm(to_do):
        stored[recipe.name] = warned(bed, recipe)
        lines = [f"{json.dumps(name)}: {json.dumps(plant)}" for name, plant in stored.items()]
        out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
