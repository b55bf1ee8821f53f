"""Count right and false alarms: which warnings notice plants whose effects do not add up.

All counts come from the stored numbers of docs/planted.json; `told.py` puts them into the page.

A question of a plant is *broken* if its interaction, which interventions measured, is above
`INTERACTS`. Thresholds are chosen on plants of even seeds and confirmed on plants of odd seeds, all
of them of kinds that are trained at corners. Smooth plants take no part in the choice: they judge
the thresholds that were chosen (`on_smooth`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from scipy.stats import binomtest

from benchmarks.evidence.tables import markdown
from benchmarks.evidence.violent import Counts, confusion

Plants = Mapping[str, Mapping[str, Any]]
INTERACTS = 0.5
KINDS = {
    "confined": "(a) confined",
    "two facts": "(b) two facts",
    "redundant": "(c) redundant",
    "masked": "(d) masked",
    "opposed": "(d) opposed",
    "gated": "(e) gate and writer",
    "constant": "(f) constants",
    "additive": "control: additive",
}
CONJUNCTION = "smooth conjunction"
LOUD = "loud conjunction"
SUM = "smooth sum"
SMOOTH_KINDS = {
    CONJUNCTION: "(g) smooth conjunction",
    LOUD: "(h) loud conjunction",
    SUM: "control: smooth sum",
}
SIGNALS = {
    "screened": "Σ of what `ll.reliability` corrects off the shift, by the larger sum of sizes",
    "ends_off": "Σ first order at 0 or at 1 off the shift, by the larger sum of sizes",
    "gap": "first order at 1 and at 0 apart, by the larger sum of sizes",
    "relative_gap": "first order at 1 and at 0 apart, by the sum of sizes at 0",
    "sum_off_0": "Σ first order at 0 off the shift, by the shift",
    "sum_off_1": "Σ first order at 1 off the shift, by the shift",
    "way": "first order at 0 off the shift on the way",
    "curvature": "½ H1 at 0, sum of sizes, by first order's",
    "ends_apart": "ranks at 0 and at 1 apart",
    "half_apart_0": "ranks at ½ and at 0 apart",
    "half_apart_1": "ranks at ½ and at 1 apart",
    "strength": "‖ΔW‖ / ‖W‖",
    "shift": "the shift itself",
}
REMAINDERS = ("large", "uneven", "coincidence")
SAYS = {
    "remainder": "`ll.remainder`: large, uneven or a coincidence",
    "flags": "`ll.reliability` flags a module, for adding or for leaving out",
    "kl": "`ll.kl_shares`: fails",
    "violent": "`is_violent`",
}


def entered(plants: Plants) -> dict[str, Mapping[str, Any]]:
    """The plants that interventions confirmed."""
    return {name: plant for name, plant in plants.items() if plant["enters"]}


def at_corners(plants: Plants) -> dict[str, Mapping[str, Any]]:
    """The plants of kinds that are trained at corners, or at both ends alone."""
    return {name: plant for name, plant in plants.items() if plant["kind"] not in SMOOTH_KINDS}


def of_kind(plants: Plants, kind: str) -> dict[str, Mapping[str, Any]]:
    """The plants of one kind that entered."""
    return {name: plant for name, plant in entered(plants).items() if plant["kind"] == kind}


def cases(plants: Plants) -> pd.DataFrame:
    """One row per plant and question: signals, what the package says, whether it interacts."""
    rows = []
    for name, plant in entered(plants).items():
        for case, check in zip(plant["cases"], plant["confirmed"], strict=True):
            says = case["says"]
            is_flagged = says["flags, add_one"] or says["flags, leave_one_out"]
            row = {
                "plant": name,
                "kind": plant["kind"],
                "confirms": plant["seed"] % 2 == 1,
                "broken": check["interaction"] > INTERACTS,
                **case["signals"],
                "remainder": float(says["remainder"] in REMAINDERS),
                "kl": float(case["kl"] == "fails"),
                "violent": float(says["violent"]),
                "flags": float(bool(is_flagged)),
            }
            rows.append(row)
    return pd.DataFrame(rows)


def counted(counts: Counts) -> str:
    """Hits, false alarms, missed cases and rightly silent cases, as a cell."""
    return f"{counts.hit} · {counts.false} · {counts.missed} · {counts.silent}"


def signals_by_f1(results: Mapping[str, tuple[float, Counts, Counts]]) -> list[str]:
    """The signals, the one with the best F1 on the half that chooses first."""
    return sorted(results, key=lambda signal: -results[signal][1].f1)


def warnings(plants: Plants) -> str:
    """Thresholds chosen on half of the plants and confirmed on the other half, best first."""
    rows = cases(plants)
    results = {signal: confusion(rows, signal) for signal in SIGNALS}
    lines = []
    for signal in signals_by_f1(results):
        threshold, chooses, confirms = results[signal]
        line = [
            SIGNALS[signal],
            f"{threshold:.3g}",
            counted(chooses),
            counted(confirms),
            shares(confirms),
        ]
        lines.append(line)
    head = [
        "warning: … above",
        "threshold",
        "on the half that chooses",
        "on the half that confirms",
        "flagged, false alarms",
    ]
    return markdown(head, lines)


def shares(counts: Counts) -> str:
    """The share of broken cases that a warning flags, and the share of sound cases."""
    broken = counts.hit + counts.missed
    sound = counts.false + counts.silent
    return f"{counts.hit / broken:.0%}, {counts.false / sound:.0%}"


def shipped(plants: Plants) -> str:
    """How often each warning of the package speaks on all plants of each kind, as it ships.

    The last row is of the signal that was chosen on one half, at its threshold, on both halves.
    """
    rows = cases(plants)
    best = chosen(rows)
    threshold = confusion(rows, best)[0]
    rows["chosen"] = (rows[best] >= threshold).astype(float).where(rows[best].notna())
    named_says = {**SAYS, "chosen": f"{SIGNALS[best]}: above {threshold:.2g}, both halves"}
    groups = {}
    for kind, words in KINDS.items():
        group = rows[rows["kind"] == kind]
        if len(group):
            groups[words] = group
    lines = [["interacts, by interventions", *(of_all(g["broken"]) for g in groups.values())]]
    for key, words in named_says.items():
        line = [words]
        for group in groups.values():
            flagged = int(group[key].sum())
            # A signal that could not be computed on a question is NaN and not counted.
            known = int(group[key].count())
            line.append(f"{flagged} of {known}")
        lines.append(line)
    return markdown(["", *groups], lines)


def chosen(rows: pd.DataFrame) -> str:
    """The signal with the best F1 on the half that chooses."""
    return max(SIGNALS, key=lambda signal: confusion(rows, signal)[1].f1)


def confirmed(plants: Plants) -> str:
    """A sentence: how often the chosen signal flags each group on the half that confirms."""
    rows = cases(plants)
    best = chosen(rows)
    half = rows[rows["confirms"]].dropna(subset=[best])
    flagged = half[best] >= confusion(rows, best)[0]
    groups = {
        "redundant pairs": half["kind"] == "redundant",
        "masked pairs": half["kind"] == "masked",
        "opposed pairs, whose effects add up": half["kind"] == "opposed",
        "questions that do not interact": ~half["broken"],
    }
    parts = [f"{int(flagged[of].sum())} of {int(of.sum())} {words}" for words, of in groups.items()]
    return f"On the half that confirms, the best signal flags {', '.join(parts)}."


def carried(plants: Plants, others: Plants) -> str:
    """How often a signal flags another base's plants, with its threshold as it is on the first.

    Args:
        plants: of the first base, on which the signal and its threshold were chosen.
        others: of the other base.
    """
    rows = cases(plants)
    rows_elsewhere = cases(others)
    best = chosen(rows)
    flagged = rows_elsewhere[best] >= confusion(rows, best)[0]
    broken = rows_elsewhere["broken"]
    return (
        f"{int((flagged & broken).sum())} of {int(broken.sum())} questions that interact, and "
        f"{int((flagged & ~broken).sum())} of {int((~broken).sum())} of the others"
    )


# --- Smooth plants, on which no threshold was chosen


def on_smooth(plants: Plants, groups: Mapping[str, Plants]) -> str:
    """How many smooth plants of each group every warning flags.

    Args:
        plants: of kinds that are trained at corners. The thresholds are those chosen on them.
        groups: smooth plants that entered, by the head of their column.
    """
    rows = cases(plants)
    tables = {head: cases(group) for head, group in groups.items()}
    broken = [of_all(table["broken"]) for table in tables.values()]
    lines = [["interacts, by interventions", "", *broken]]
    results = {signal: confusion(rows, signal) for signal in SIGNALS}
    for signal in signals_by_f1(results):
        threshold = results[signal][0]
        counts = [of_all(table[signal] >= threshold) for table in tables.values()]
        lines.append([SIGNALS[signal], f"{threshold:.3g}", *counts])
    for key, words in SAYS.items():
        counts = [of_all(table[key] > 0) for table in tables.values()]
        lines.append([words, "as it ships", *counts])
    return markdown(["warning: … above", "threshold", *tables], lines)


def of_all(flagged: pd.Series) -> str:
    """How many of all rows are flagged, as a cell."""
    return f"{int(flagged.sum())} of {len(flagged)}"


def missed(plants: Plants, conjunctions: Plants) -> dict[str, Any]:
    """How many smooth conjunctions the warning that was chosen on `plants` misses.

    Returns:
        its threshold; its values on the conjunctions, the smallest first; how many it misses, and
        the exact 95 % interval of the share that it misses.
    """
    rows = cases(plants)
    best = chosen(rows)
    threshold = confusion(rows, best)[0]
    values = sorted(cases(conjunctions)[best].tolist())
    count = sum(value < threshold for value in values)
    interval = binomtest(count, len(values)).proportion_ci(0.95, "exact")
    return {
        "threshold": threshold,
        "values": values,
        "count": count,
        "low": interval.low,
        "high": interval.high,
    }


def by_largest_effect(plant: Mapping[str, Any]) -> float:
    """The error of the sums, divided by the larger of the shift and the largest single effect.

        max(|Σ corrected at 0 − shift|, |Σ corrected at 1 − shift|) / max(|shift|, max_l |e_l|)

    This is how `interaction` divides. Unlike the sum of sizes, the divisor does not grow with the
    number of modules that do something.
    """
    (case,) = plant["cases"]
    base, adapted = case["ends"]
    shift = adapted - base
    corrected = [case["sizes"][f"corrected, {how}"] for how in ("add_one", "leave_one_out")]
    off = max(abs(sizes["sum"] - shift) for sizes in corrected)
    effects = [extremes["strongest other"] for extremes in case["effects"].values()]
    for sizes in corrected:
        effects += [abs(value) for value in sizes["pair"]]
    return off / max(abs(shift), *effects)


def diluted(groups: Mapping[str, Plants], sums: Plants) -> dict[str, Any]:
    """The warning where its divisor, the sum of sizes, makes it smallest, beside the other divisor.

    Args:
        groups: conjunctions, by the head of their column.
        sums: smooth sums, the control.
    """
    conjunctions: list[Mapping[str, Any]] = []
    for group in groups.values():
        conjunctions += group.values()
    lowest = min(conjunctions, key=lambda plant: plant["cases"][0]["signals"]["screened"])
    others = [by_largest_effect(plant) for plant in conjunctions]
    controls = [by_largest_effect(plant) for plant in sums.values()]
    return {
        "lowest": lowest["cases"][0]["signals"]["screened"],
        "strays": lowest["decoys"].get("stray", 0),
        "count": len(conjunctions),
        "others": (min(others), max(others)),
        "controls": (min(controls), max(controls)),
        "control count": len(controls),
    }


def on_fresh(plants: Plants, fresh: Plants) -> str:
    """How often the warning is right with each divisor, on plants of seeds that chose neither.

    The column of the questions that interact comes first.

    Args:
        plants: of kinds that are trained at corners. The threshold of the first divisor was chosen
            on them; that of the second is `INTERACTS`, by definition.
        fresh: from `fresh.py`.
    """
    rows = cases(plants)
    threshold = confusion(rows, "screened")[0]
    questions: list[Mapping[str, Any]] = []
    for plant in fresh.values():
        questions += plant["cases"]
    interacting = [case for case in questions if case["interaction"] > INTERACTS]
    others = [case for case in questions if case["interaction"] <= INTERACTS]
    divisors = (
        ("by sizes", "by the larger sum of sizes", threshold),
        ("by largest", "by the larger of the shift and the largest single effect", INTERACTS),
    )
    lines = []
    for key, words, least in divisors:
        cells = []
        for group in (interacting, others):
            values = [case[key] for case in group]
            flagged = sum(value > least for value in values)
            cells.append(f"{flagged} of {len(values)} ({min(values):.2f} to {max(values):.2f})")
        lines.append([words, f"{least:.3g}", *cells])
    return markdown(["Σ `corrected` off the shift …", "above", "interact", "do not"], lines)
