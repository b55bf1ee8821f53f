"""Who warns of plants whose effects do not add up: counts of right and false alarms, from numbers.

A question of a plant is *broken* where its interaction, which interventions measured, is above
`INTERACTS`. Thresholds are chosen on plants of even seeds and confirmed on those of odd seeds, all
of them of kinds that are trained at corners. Smooth plants choose nothing: they judge what was
chosen (`on_smooth`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import binomtest

sys.path.append(str(Path(__file__).parents[1] / "evidence"))
from tables import markdown  # noqa: E402
from violent import Counts, confusion  # noqa: E402

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
    return pd.DataFrame(
        [
            {
                "plant": name,
                "kind": plant["kind"],
                "confirms": plant["seed"] % 2 == 1,
                "broken": check["interaction"] > INTERACTS,
                **case["signals"],
                "remainder": float(case["says"]["remainder"] in REMAINDERS),
                "kl": float(case["kl"] == "fails"),
                "violent": float(case["says"]["violent"]),
                "flags": float(
                    any(case["says"][f"flags, {how}"] for how in ("add_one", "leave_one_out"))
                ),
            }
            for name, plant in entered(plants).items()
            for case, check in zip(plant["cases"], plant["confirmed"], strict=True)
        ]
    )


def counted(counts: Counts) -> str:
    return f"{counts.hit} · {counts.false} · {counts.missed} · {counts.silent}"


def warnings(plants: Plants) -> str:
    """Thresholds chosen on half of the plants and confirmed on the other half, best first."""
    rows = cases(plants)
    results = {signal: confusion(rows, signal) for signal in SIGNALS}
    order = sorted(results, key=lambda signal: -results[signal][1].f1)
    lines = [
        [
            SIGNALS[signal],
            f"{results[signal][0]:.3g}",
            *map(counted, results[signal][1:]),
            shares(results[signal][2]),
        ]
        for signal in order
    ]
    head = [
        "warning: … above",
        "threshold",
        "on the half that chooses",
        "on the half that confirms",
    ]
    return markdown([*head, "flagged, false alarms"], lines)


def shares(counts: Counts) -> str:
    """The share of broken cases that is flagged, and the share of sound ones, in a half."""
    broken = counts.hit + counts.missed
    sound = counts.false + counts.silent
    return f"{counts.hit / broken:.0%}, {counts.false / sound:.0%}"


def shipped(plants: Plants) -> str:
    """What the package says as it ships, on all plants, by kind."""
    rows = cases(plants)
    lines = []
    best = chosen(rows)
    threshold = confusion(rows, best)[0]
    rows["chosen"] = (rows[best] >= threshold).astype(float).where(rows[best].notna())
    named_says = {**SAYS, "chosen": f"{SIGNALS[best]}: above {threshold:.2g}, both halves"}
    groups = [(kind, rows[rows["kind"] == kind]) for kind in KINDS]
    groups = [(kind, group) for kind, group in groups if len(group)]
    interact = ["interacts, by interventions"]
    interact += [f"{int(group['broken'].sum())} of {len(group)}" for _, group in groups]
    lines.append(interact)
    for key, words in named_says.items():
        counts = [(int(group[key].sum()), int(group[key].count())) for _, group in groups]
        lines.append([words, *(f"{flagged} of {known}" for flagged, known in counts)])
    return markdown(["", *(KINDS[kind] for kind, _ in groups)], lines)


def chosen(rows: pd.DataFrame) -> str:
    """The signal of the best F1 on the half that chooses."""
    return max(SIGNALS, key=lambda signal: confusion(rows, signal)[1].f1)


def confirmed(plants: Plants) -> str:
    """How the chosen signal fares on the half that chose nothing, in a sentence."""
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
    """How the signal that one base's plants chose fares on another's, at the same threshold."""
    rows = cases(plants)
    rows_elsewhere = cases(others)
    best = chosen(rows)
    flagged = rows_elsewhere[best] >= confusion(rows, best)[0]
    broken = rows_elsewhere["broken"]
    return (
        f"{int((flagged & broken).sum())} of {int(broken.sum())} questions that interact, and "
        f"{int((flagged & ~broken).sum())} of {int((~broken).sum())} of the others"
    )


# --- Smooth plants, which chose no threshold


def on_smooth(plants: Plants, groups: Mapping[str, Plants]) -> str:
    """Who flags smooth plants, by groups of them: warnings at the thresholds that `plants` chose.

    Args:
        plants: of kinds that are trained at corners.
        groups: smooth plants that entered, by what heads their column.
    """
    rows = cases(plants)
    tables = {head: cases(group) for head, group in groups.items()}
    lines = [
        [
            "interacts, by interventions",
            "",
            *(of_all(table["broken"]) for table in tables.values()),
        ]
    ]
    results = {signal: confusion(rows, signal) for signal in SIGNALS}
    order = sorted(results, key=lambda signal: -results[signal][1].f1)
    for signal in order:
        threshold = results[signal][0]
        counts = [of_all(table[signal] >= threshold) for table in tables.values()]
        lines.append([SIGNALS[signal], f"{threshold:.3g}", *counts])
    for key, words in SAYS.items():
        lines.append([words, "as it ships", *(of_all(table[key] > 0) for table in tables.values())])
    return markdown(["warning: … above", "threshold", *tables], lines)


def of_all(flagged: pd.Series) -> str:
    return f"{int(flagged.sum())} of {len(flagged)}"


def missed(plants: Plants, conjunctions: Plants) -> dict[str, Any]:
    """How the warning that was chosen on `plants` fares on smooth conjunctions.

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
    """The same sums off the shift, by the larger of the shift and the largest single effect.

        max(|Σ corrected at 0 − shift|, |Σ corrected at 1 − shift|) / max(|shift|, max_l |e_l|)

    This is how `interaction` divides. Unlike the sum of sizes, the divisor does not grow with the
    number of modules that do something.
    """
    (case,) = plant["cases"]
    base, adapted = case["ends"]
    shift = adapted - base
    corrected = [case["sizes"][f"corrected, {how}"] for how in ("add_one", "leave_one_out")]
    off = max(abs(sizes["sum"] - shift) for sizes in corrected)
    effects = [abs(value) for sizes in corrected for value in sizes["pair"]]
    effects += [extremes["strongest other"] for extremes in case["effects"].values()]
    return off / max(abs(shift), *effects)


def diluted(groups: Mapping[str, Plants], sums: Plants) -> dict[str, Any]:
    """What the sum of sizes costs the warning: its lowest value, and the other divisor's.

    Args:
        groups: conjunctions, by what heads their column.
        sums: smooth sums, the control.
    """
    conjunctions = [plant for group in groups.values() for plant in group.values()]
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
    """Both divisors on plants of seeds that chose neither, by kind: those that interact first.

    Args:
        plants: of kinds that are trained at corners, which chose the threshold of the one. That of
            the other is `INTERACTS`, by definition.
        fresh: from `fresh.py`.
    """
    rows = cases(plants)
    threshold = confusion(rows, "screened")[0]
    questions = [case for plant in fresh.values() for case in plant["cases"]]
    interacting = [case for case in questions if case["interaction"] > INTERACTS]
    others = [case for case in questions if case["interaction"] <= INTERACTS]
    lines = []
    for key, words, least in (
        ("by sizes", "by the larger sum of sizes", threshold),
        ("by largest", "by the larger of the shift and the largest single effect", INTERACTS),
    ):
        cells = []
        for group in (interacting, others):
            values = [case[key] for case in group]
            flagged = sum(value > least for value in values)
            cells.append(f"{flagged} of {len(values)} ({min(values):.2f} to {max(values):.2f})")
        lines.append([words, f"{least:.3g}", *cells])
    return markdown(["Σ `corrected` off the shift …", "above", "interact", "do not"], lines)
