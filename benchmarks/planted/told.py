"""The section on planted causes of docs/faithfulness.md, from docs/planted.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

sys.path.append(str(Path(__file__).parents[1] / "evidence"))
from intervals import Interval, interval  # noqa: E402
from tables import markdown, named  # noqa: E402
from violent import Counts, confusion  # noqa: E402

NUMBERS = Path(__file__).parents[2] / "docs" / "planted.json"
TEMPLATE = Path(__file__).with_name("planted.md.jinja")
Plants = Mapping[str, Mapping[str, Any]]
INTERACTS, GOAL = 0.5, 0.95
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
AIMED = ("confined", "two facts", "gated", "constant")
PAIRED = ("redundant", "masked", "opposed")
METHODS = {
    "path": "path integral, that is IG over the gates",
    "hessian@0": "H1 at 0 alone",
    "kl_shares": "`kl_shares`",
    "gradient": "‖Jᵀu‖, the gradient alone",
    "change": "‖ΔW‖ (of constants ‖Δb‖)",
}
SIGNALS = {
    "ends_off": "Σ first order at 0 or at 1 off the shift, beside Σ|a|",
    "gap": "first order at 1 and at 0 apart, beside the larger Σ|a|",
    "relative_gap": "first order at 1 and at 0 apart, beside Σ|a| at 0",
    "sum_off_0": "Σ first order at 0 off the shift, beside the shift",
    "sum_off_1": "Σ first order at 1 off the shift, beside the shift",
    "way": "first order at 0 off the shift on the way",
    "curvature": "½ Σ|H1| at 0 beside Σ|a|",
    "ends_apart": "ranks at 0 and at 1 apart",
    "half_apart_0": "ranks at ½ and at 0 apart",
    "half_apart_1": "ranks at ½ and at 1 apart",
    "path_gap": "four nodes of the path off the shift",
    "strength": "‖ΔW‖ / ‖W‖",
    "shift": "the shift itself",
}
SAYS = {
    "remainder": (
        "`ll.remainder`: large, uneven or a coincidence",
        {"large", "uneven", "coincidence"},
    ),
    "kl": ("`ll.kl_shares`: fails", {"fails"}),
}


def read() -> dict[str, Any]:
    return json.loads(NUMBERS.read_text())


def entered(plants: Plants) -> dict[str, Mapping[str, Any]]:
    """The plants that interventions confirmed."""
    return {name: plant for name, plant in plants.items() if plant["enters"]}


def auroc(places: Sequence[float], sites: int) -> float:
    """The share of pairs of a cause and another site in which the cause stands first."""
    count = len(places)
    return 1 - (sum(places) - count * (count + 1) / 2) / (count * (sites - count))


def recovery(places: Sequence[float], sites: int) -> float:
    """The share of the k causes among the first k sites."""
    del sites
    return sum(place <= len(places) for place in places) / len(places)


def scored(plants: Plants, measure: Any) -> pd.DataFrame:
    """[plant, method], the mean over a plant's questions; and its kind."""
    rows = {}
    for name, plant in entered(plants).items():
        cases = [case["places"] for case in plant["cases"]]
        rows[name] = {
            "kind": plant["kind"],
            **{
                method: float(np.mean([measure(case[method], plant["sites"]) for case in cases]))
                for method in cases[0]
            },
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def cell(values: pd.Series) -> str:
    mean: Interval = interval(values)
    return f"{mean.mean:.2f} [{mean.low:.2f}, {mean.high:.2f}] · {values.min():.2f}"


def table(plants: Plants, measure: Any) -> str:
    """One line a method, best on the kinds of the goal first: mean, interval and worst plant."""
    scores = scored(plants, measure)
    by_kind = scores.groupby("kind")
    kinds = [kind for kind in KINDS if kind in by_kind.groups]
    means = by_kind.mean()
    order = means.loc[[kind for kind in AIMED if kind in kinds]].mean().sort_values(ascending=False)
    rows = [
        [label(method), *(cell(by_kind.get_group(kind)[method]) for kind in kinds)]
        for method in order.index
    ]
    return markdown(["score", *(KINDS[kind] for kind in kinds)], rows)


def label(method: str) -> str:
    return METHODS.get(method, named(method))


def confirmation(plants: Plants) -> str:
    """One line a kind: how many entered, and the worst that interventions say of those."""
    rows = []
    for kind, words in KINDS.items():
        drawn = {name: plant for name, plant in plants.items() if plant["kind"] == kind}
        there = entered(drawn).values()
        if not there:
            continue
        checks = pd.DataFrame([check for plant in there for check in plant["confirmed"]])
        extremes = [case["effects"] for plant in there for case in plant["cases"]]
        sizes = [abs(check["effect"]) for plant in there for check in plant["confirmed"]]
        others = [
            max(extreme[how]["strongest other"] for how in extreme) / size
            for extreme, size in zip(extremes, sizes, strict=True)
        ]
        count = [len(paths) for plant in there for paths in plant["causes"]]
        rows.append(
            [
                words,
                f"{len(there)} of {len(drawn)}",
                f"{min(count)} to {max(count)}" if min(count) < max(count) else str(count[0]),
                f"{(checks['kept'] - 1).abs().max():.1%}",
                f"{checks['lost'].min():.1%}",
                f"{max(others):.0%}",
                f"{checks['interaction'].median():.2f}, {checks['interaction'].max():.2f}",
            ]
        )
    head = [
        "kind",
        "entered",
        "causes",
        "off without the others, at most",
        "lost without the causes, at least",
    ]
    return markdown(
        [*head, "largest effect of any other site", "interaction: median, largest"], rows
    )


def reached(plants: Plants) -> list[tuple[str, list[str]]]:
    """Of each kind of the goal, the scores whose interval lies above it."""
    by_kind = scored(plants, auroc).groupby("kind")
    return [
        (
            KINDS[kind],
            [
                label(method)
                for method in by_kind.get_group(kind).columns.drop("kind")
                if interval(by_kind.get_group(kind)[method]).low >= GOAL
            ],
        )
        for kind in AIMED
        if kind in by_kind.groups
    ]


def edges(plants: Plants) -> str:
    """Of gated plants, where the edge from writer to gate stands, by the gate value."""
    there = [plant["edges"] for plant in entered(plants).values() if "edges" in plant]
    rows = []
    for at, words in (("0", "0"), ("0.5", "½"), ("1", "1")):
        ranks = pd.DataFrame([plant["places"][at] for plant in there])
        everywhere, writers = ranks["among all"], ranks["of its writer"]
        scores = [
            auroc([place], plant["edges"]) for place, plant in zip(everywhere, there, strict=True)
        ]
        rows.append(
            [
                f"edges at {words}",
                cell(pd.Series(scores)),
                *(
                    f"{int((places == 1).sum())} of {len(places)}"
                    for places in (everywhere, writers)
                ),
                f"{everywhere.median():.0f}",
            ]
        )
    head = ["", "AUROC", "first of all edges", "first of its writer's", "median place"]
    return markdown(head, rows)


# --- Warnings


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
                **{key: float(case["says"][key] in words) for key, (_, words) in SAYS.items()},
                "violent": float(case["says"]["violent"]),
                "flags": float(any(case["says"]["flags"].values())),
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
    """Of a half: the share of broken cases that is flagged, and of the others that is too."""
    broken, sound = counts.hit + counts.missed, counts.false + counts.silent
    return f"{counts.hit / broken:.0%}, {counts.false / sound:.0%}"


def shipped(plants: Plants) -> str:
    """What the package says as it ships, on all plants, by kind."""
    rows, lines = cases(plants), []
    best = chosen(rows)
    threshold = confusion(rows, best)[0]
    rows["chosen"] = (rows[best] >= threshold).astype(float)
    named_says = {
        **{key: words for key, (words, _) in SAYS.items()},
        "violent": "`is_violent`",
        "flags": "`ll.reliability` flags a module, for adding or leaving out",
        "chosen": f"{SIGNALS[best]}: above {threshold:.2g}, both halves",
    }
    groups = [(kind, rows[rows["kind"] == kind]) for kind in KINDS]
    groups = [(kind, group) for kind, group in groups if len(group)]
    interact = ["interacts, by interventions"]
    interact += [f"{int(group['broken'].sum())} of {len(group)}" for _, group in groups]
    lines.append(interact)
    for key, words in named_says.items():
        lines.append([words, *(f"{int(group[key].sum())} of {len(group)}" for _, group in groups)])
    return markdown(["", *(KINDS[kind] for kind, _ in groups)], lines)


def chosen(rows: pd.DataFrame) -> str:
    """The signal of the best F1 on the half that chooses."""
    return max(SIGNALS, key=lambda signal: confusion(rows, signal)[1].f1)


def section(numbers: Mapping[str, Any]) -> str:
    """The whole section, as markdown."""
    plants: Plants = numbers["plants"]
    template = Environment(undefined=StrictUndefined, trim_blocks=True).from_string(
        TEMPLATE.read_text()
    )
    there = entered(plants)
    return template.render(
        drawn=len(plants),
        entered=len(there),
        confirmation=confirmation(plants),
        aurocs=table(plants, auroc),
        recoveries=table(plants, recovery),
        reached=reached(plants),
        goal=GOAL,
        edges=edges(plants),
        warnings=warnings(plants),
        shipped=shipped(plants),
        interacts=INTERACTS,
        command=numbers["about"]["command"],
    )
