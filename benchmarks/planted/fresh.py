"""Compare two forms of a warning on plants of new seeds, on which neither was chosen.

    python -m benchmarks.planted.fresh --out docs/planted_fresh.json

`ll.reliability` corrects the effect e_l of each module, once at gate 0 and once at gate 1. If the
adapter's effects add up, either sum is the shift. The warning is the worse error of the two,

    max(|Σ e at 0 − shift|, |Σ e at 1 − shift|) / D,

and is given above a threshold. Which D is better?

1. The larger sum of sizes, max(Σ |e| at 0, Σ |e| at 1, |shift|): `judged.sums_off`. Its threshold
   was chosen on the plants of docs/planted.json (`alarms.on_fresh`).
2. The largest single effect, max(max |e| at 0, max |e| at 1, |shift|). It was found on the smooth
   plants (`alarms.by_largest_effect`), and its threshold is `alarms.INTERACTS`.

Here both are computed on one or two plants of each kind, of seeds that no other table uses, and
nothing is chosen. The file has a line for each plant; plants that are in it already are left alone.
It takes about ten minutes of one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.evidence.bases import load_base
from benchmarks.planted.judged import ENDS, SCORES, question_of, screened, sums_off
from benchmarks.planted.kinds import planted
from benchmarks.planted.plants import Bed, Recipe
from lens_lora.core import Evaluations
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
# The scores from which `screened` computes the corrected effects.
SCORES_OF_CORRECTED = ("first_order@0", "first_order@1", "add_one", "leave_one_out")
DIGITS = 3


def measured_plant(bed: Bed, recipe: Recipe) -> dict[str, Any]:
    """A plant's kind, whether it enters, and three numbers for each of its questions.

    These are its interaction, which interventions measured, and the warning by each divisor. The
    list of questions, `cases`, is empty for a plant that does not enter.
    """
    plant = planted(bed, recipe)
    if not plant.enters:
        return {"kind": recipe.kind, "enters": False, "cases": []}
    g = question_of(bed, plant)
    scores = {key: SCORES[key](g) for key in SCORES_OF_CORRECTED}
    corrected = [screened(g, how, gate, scores).corrected for how, gate in ENDS.items()]
    cases: list[dict[str, float]] = []
    for row, confirmed in enumerate(plant.confirmed):
        numbers = {
            "interaction": confirmed["interaction"],
            "by sizes": sums_off(g, row, corrected),
            "by largest": off_by_largest(g, row, corrected),
        }
        cases.append({key: round(value, DIGITS) for key, value in numbers.items()})
    return {"kind": recipe.kind, "enters": True, "cases": cases}


def off_by_largest(g: Evaluations, row: int, corrected: Sequence[Tensor]) -> float:
    """The error of the worse of two sums, over the largest single effect or the shift.

    Args:
        g: the questions, one a row.
        row: the question.
        corrected: the effects at gate 0 and those at gate 1, each [question, module].
    """
    effects = torch.stack([values[row] for values in corrected])
    shift = (g.ends[1, row] - g.ends[0, row]).double()
    error = (effects.sum(1).double() - shift).abs().max()
    largest = effects.abs().max().double()
    return float(error / torch.maximum(largest, shift.abs()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Both divisors, on plants of other seeds.")
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    plants = json.loads(out.read_text()) if out.is_file() else {}
    bed = Bed.of(*load_base(EMBEDDED_NAME))
    to_do = [recipe for recipe in FRESH if recipe.name not in plants]
    for recipe in tqdm(to_do):
        plants[recipe.name] = measured_plant(bed, recipe)
        lines = [f"{json.dumps(name)}: {json.dumps(plant)}" for name, plant in plants.items()]
        out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
