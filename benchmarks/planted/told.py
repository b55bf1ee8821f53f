"""The section on planted causes of docs/faithfulness.md, from docs/planted.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from alarms import (
    CONJUNCTION,
    INTERACTS,
    KINDS,
    SMOOTH_KINDS,
    SUM,
    Plants,
    at_corners,
    carried,
    confirmed,
    diluted,
    entered,
    missed,
    of_kind,
    on_fresh,
    on_smooth,
    shipped,
    warnings,
)
from jinja2 import Environment, StrictUndefined

sys.path.append(str(Path(__file__).parents[1] / "evidence"))
from intervals import summary  # noqa: E402
from tables import markdown, named  # noqa: E402

NUMBERS = Path(__file__).parents[2] / "docs" / "planted.json"
FRESH = NUMBERS.with_name("planted_fresh.json")
TEMPLATE = Path(__file__).with_name("planted.md.jinja")
GOAL = 0.95
EMBEDDED = "SmolLM2-135M-Instruct"
TENTH = 0.1  # of the shift, by which a number of a module is off
AIMED = ("confined", "two facts", "gated", "constant")
FIRST = {"first_order@0": "0", "first_order@0.5": "½", "first_order@1": "1"}
PAIRED = ("redundant", "masked", "opposed")
METHODS = {
    "path": "path integral (IG over the gates, to 1 % or 16 nodes)",
    "hessian@0": "H1 at 0 alone",
    "kl_shares": "`kl_shares`",
    "gradient": "‖Jᵀu‖, the gradient alone",
    "change": "‖ΔW‖ (of constants ‖Δb‖)",
}


def read() -> dict[str, Any]:
    return json.loads(NUMBERS.read_text())


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
    told = summary(values)
    span = f" [{told.low:.2f}, {told.high:.2f}]" if np.isfinite(told.low) else ""
    return f"{told.median:.2f}{span} · {told.worst:.2f}"


def table(plants: Plants, measure: Any) -> str:
    """One line a method, best on the kinds of the goal first: median, interval and worst plant."""
    scores = scored(plants, measure)
    by_kind = scores.groupby("kind")
    kinds = kinds_of(scores)
    rows = [
        [label(method), *(cell(by_kind.get_group(kind)[method]) for kind in kinds)]
        for method in best_first(scores)
    ]
    return markdown(["score", *(KINDS[kind] for kind in kinds)], rows)


def kinds_of(scores: pd.DataFrame) -> list[str]:
    """The kinds that are there, in the page's order."""
    there = set(scores["kind"])
    return [kind for kind in KINDS if kind in there]


def best_first(scores: pd.DataFrame) -> list[str]:
    """Methods by their mean over the kinds of the goal."""
    means = scores.groupby("kind").mean()
    aimed = means.loc[[kind for kind in AIMED if kind in means.index]]
    return list(aimed.mean().sort_values(ascending=False).index)


def label(method: str) -> str:
    return METHODS.get(method, named(method))


def confirmation(plants: Plants, kinds: Mapping[str, str] = KINDS) -> str:
    """One line a kind: how many entered, and the worst that interventions say of those."""
    rows = []
    for kind, words in kinds.items():
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
    """The scores whose interval lies above the goal, for each of its kinds."""
    by_kind = scored(plants, auroc).groupby("kind")
    return [
        (
            KINDS[kind],
            [
                label(method)
                for method in by_kind.get_group(kind).columns.drop("kind")
                if summary(by_kind.get_group(kind)[method]).low >= GOAL
            ],
        )
        for kind in AIMED
        if kind in by_kind.groups
    ]


def pairs(plants: Plants) -> list[str]:
    """What first order recovers of each kind of pair, and the scores that recover most."""
    by_kind = scored(plants, recovery).groupby("kind")
    sentences = []
    for kind in PAIRED:
        means = by_kind.get_group(kind).drop(columns="kind").mean()
        first = ", ".join(f"{means[key]:.2f} at {words}" for key, words in FIRST.items())
        seen = [
            f"{label(m)} ({v:.2f})"
            for m, v in means.sort_values(ascending=False).items()
            if v >= GOAL
        ]
        found = "; ".join(seen) if seen else "none"
        sentences.append(f"{KINDS[kind]}: first order recovers {first}; {found}.")
    return sentences


def edges(plants: Plants) -> str:
    """Where the edge from writer to gate stands in gated plants, by the gate value."""
    there = [plant["edges"] for plant in entered(plants).values() if "edges" in plant]
    rows = []
    for at, words in (("0", "0"), ("0.5", "½"), ("1", "1")):
        ranks = pd.DataFrame([plant["places"][at] for plant in there])
        everywhere = ranks["among all"]
        writers = ranks["of its writer"]
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


def way(plants: Plants) -> tuple[float, float]:
    """The share of the effect that leaving out a direct edge costs: median, and most."""
    costs = [
        abs(plant["edges"]["left out"] / plant["confirmed"][0]["effect"])
        for plant in entered(plants).values()
        if "edges" in plant
    ]
    return float(np.median(costs)), max(costs)


# --- A second base, with too few plants of a kind for an interval


def every_plant(plants: Plants) -> str:
    """One line a method: of each plant of a kind the AUROC, and in brackets the recovery."""
    aurocs = scored(plants, auroc)
    recoveries = scored(plants, recovery)
    kinds = kinds_of(aurocs)
    rows = [
        [label(method)]
        + [
            " · ".join(
                f"{aurocs[method][name]:.2f} ({recoveries[method][name]:.2f})"
                for name in aurocs.index[aurocs["kind"] == kind]
            )
            for kind in kinds
        ]
        for method in best_first(aurocs)
    ]
    return markdown(["score", *(KINDS[kind] for kind in kinds)], rows)


def repeated(plants: Plants, others: Plants) -> str:
    """Whether what reached the goal on one base does on another's plants, for each kind of it."""
    scores = scored(others, auroc).rename(columns=label)
    rows = []
    for kind, methods in reached(plants):
        worst = scores[scores["kind"].map(KINDS) == kind].drop(columns="kind").min().dropna()
        above = [method for method in worst.index if method in methods]
        high = worst >= GOAL
        rows.append(
            [
                kind,
                f"{int(high[above].sum())} of {len(methods)}",
                with_values(worst[above][~high[above]]),
                with_values(worst.drop(above)[high.drop(above)]),
            ]
        )
    head = ["kind", "reached above and here", "above only", "here only"]
    return markdown(head, rows)


def with_values(scores: pd.Series) -> str:
    return ", ".join(f"{method} ({score:.2f})" for method, score in scores.items()) or "—"


def choice(others: Plants) -> str:
    """First order at 0, in a sentence: AUROC and recovery on two facts, and at least elsewhere."""
    parts = []
    for words, measure in (("AUROC", auroc), ("recovery", recovery)):
        scores = scored(others, measure)
        facts = scores["kind"] == "two facts"
        values = " and ".join(f"{score:.2f}" for score in scores["first_order@0"][facts])
        least = f"{scores['first_order@0'][~facts].min():.2f}"
        least = least if least == "1.00" else f"at least {least}"
        parts.append(f"{words} {values} on two facts, {least} on all others")
    return f"First order at 0: {'; '.join(parts)}."


def edge_places(plants: Plants) -> str:
    """The places of the edge of each gated plant at 0, ½ and 1, in words."""
    parts = []
    for plant in entered(plants).values():
        if "edges" in plant:
            ranks = (plant["edges"]["places"][gate]["among all"] for gate in ("0", "0.5", "1"))
            parts.append(
                ", ".join(f"{rank:.0f}" for rank in ranks) + f" of {plant['edges']['edges']}"
            )
    return " and ".join(parts)


def elsewhere(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the page says of the plants on each other base."""
    above = at_corners(numbers["plants"])
    parts = []
    for base, part in numbers.get("elsewhere", {}).items():
        plants = at_corners(part["plants"])
        parts.append(
            {
                "base": base,
                "drawn": len(plants),
                "entered": len(entered(plants)),
                "confirmation": confirmation(plants),
                "table": every_plant(plants),
                "sites": max(plant.get("sites", 0) for plant in plants.values()),
                "choice": choice(plants),
                "repeated": repeated(above, plants),
                "edges": edge_places(plants),
                "carried": carried(above, plants),
                "command": part["about"]["command"],
            }
        )
    return parts


# --- Smooth conjunctions: whether they are found, and whether the numbers are right

# The measured effect that a score of a site is asked to predict.
PREDICTS = {
    "first_order@0": "add_one",
    "corrected, add_one": "add_one",
    "first_order@1": "leave_one_out",
    "corrected, leave_one_out": "leave_one_out",
}
SIZED_NAMES = {
    "add_one": "add one, measured",
    "first_order@0": "first order at 0",
    "corrected, add_one": '`ll.reliability(how="add_one").corrected`',
    "leave_one_out": "leave one out, measured",
    "first_order@1": "first order at 1",
    "corrected, leave_one_out": '`ll.reliability(how="leave_one_out").corrected`',
    "first_order@0.5": "first order at ½",
    "path": "path integral",
    "second_order@0": "a + ½H1 at 0",
}


def spread(values: Sequence[float]) -> str:
    """The median, the smallest and the largest."""
    return f"{np.median(values):+.2f} [{min(values):+.2f}, {max(values):+.2f}]"


def shares_of_pair(plants: Plants, score: str) -> pd.DataFrame:
    """[plant], of one score, by the plant's shift: the pair's numbers, the sum, and the error.

    The error is of the worse of the two modules: |a_l − e_l| with e_l the effect that the score is
    asked to predict; NaN where it is asked for none.
    """
    rows = {}
    for name, plant in plants.items():
        (case,) = plant["cases"]
        base, adapted = case["ends"]
        sizes = {key: np.array(of["pair"]) for key, of in case["sizes"].items()}
        shift = adapted - base
        error = float("nan")
        if score in PREDICTS:
            error = float(np.abs(sizes[score] - sizes[PREDICTS[score]]).max())
        rows[name] = {
            "first": sizes[score][0] / shift,
            "second": sizes[score][1] / shift,
            "sum": case["sizes"][score]["sum"] / shift,
            "error": error / abs(shift),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def sizes_table(plants: Plants) -> str:
    """One line a score: how often it puts the pair first, and what it says of it."""
    rows = []
    for score, words in SIZED_NAMES.items():
        shares = shares_of_pair(plants, score)
        found = "—"
        places = [plant["cases"][0]["places"].get(score) for plant in plants.values()]
        if None not in places:
            found = f"{sum(max(pair) <= 2 for pair in places)} of {len(places)}"
        error = spread(list(shares["error"])) if score in PREDICTS else "—"
        columns = [spread(list(shares[key])) for key in ("first", "second", "sum")]
        rows.append([words, found, *columns, error.replace("+", "")])
    head = [
        "score",
        "pair is first and second",
        "says of the writer",
        "says of the reader",
        "sums to",
        "off the effect that it predicts",
    ]
    return markdown(head, rows)


def smooth(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """What the page says of smooth conjunctions, on all bases."""
    above = at_corners(numbers["plants"])
    parts = {EMBEDDED: numbers["plants"]}
    parts |= {base: part["plants"] for base, part in numbers.get("elsewhere", {}).items()}
    confirmations = {}
    columns: dict[str, Plants] = {}
    for base, plants in parts.items():
        if not of_kind(plants, CONJUNCTION):
            continue
        confirmations[base] = confirmation(plants, SMOOTH_KINDS)
        for kind, words in SMOOTH_KINDS.items():
            if there := of_kind(plants, kind):
                columns[f"{words}, {base}"] = there
    products = {head: there for head, there in columns.items() if SMOOTH_KINDS[SUM] not in head}
    groups = [{"head": head, **conjunctions(above, there)} for head, there in products.items()]
    return {
        "confirmations": confirmations,
        "groups": groups,
        "diluted": diluted(products, of_kind(numbers["plants"], SUM)),
        "off": {head: off_grid(there) for head, there in columns.items()},
        "warnings": on_smooth(above, columns),
        "fresh": fresh(above),
    }


def fresh(above: Plants) -> dict[str, Any]:
    """The two divisors on plants that chose neither."""
    stored = json.loads(FRESH.read_text())
    there = entered(stored)
    return {"drawn": len(stored), "entered": len(there), "table": on_fresh(above, there)}


def conjunctions(above: Plants, plants: Plants) -> dict[str, Any]:
    """Sizes, how often first order is wrong, and what is missed, for one kind on one base."""
    strays = [plant["decoys"].get("stray", 0) for plant in plants.values()]
    return {
        "count": len(plants),
        "strays": f"{min(strays)} to {max(strays)}",
        "sizes": sizes_table(plants),
        "wrong": wrong(plants),
        "missed": missed(above, plants),
    }


def off_grid(plants: Plants) -> tuple[float, float]:
    """The largest miss at trained gates and at gates between, as shares of the effect."""
    checks = [plant["confirmed"][0] for plant in plants.values()]
    trained = max(check["off on the grid"] for check in checks)
    between = max(check["off between"] for check in checks)
    return trained, between


def wrong(plants: Plants) -> dict[str, int]:
    """How many plants have a first order off its own effect, on the worse module of the pair.

    Returns:
        of either end, plants where it is off by more than a tenth of the shift; and plants where it
        has the wrong sign at that size, at either end.
    """
    counts = {"at 0": 0, "at 1": 0, "sign": 0}
    for plant in plants.values():
        (case,) = plant["cases"]
        least = TENTH * abs(case["ends"][1] - case["ends"][0])
        has_wrong_sign = False
        for end, score in (("at 0", "first_order@0"), ("at 1", "first_order@1")):
            said = np.array(case["sizes"][score]["pair"])
            effects = np.array(case["sizes"][PREDICTS[score]]["pair"])
            counts[end] += bool((np.abs(said - effects) > least).any())
            has_wrong_sign |= bool(((np.abs(said) > least) & (said * effects < 0)).any())
        counts["sign"] += has_wrong_sign
    return counts


def section(numbers: Mapping[str, Any]) -> str:
    """The whole section, as markdown."""
    plants: Plants = at_corners(numbers["plants"])
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
        way=way(plants),
        pairs=pairs(plants),
        warnings=warnings(plants),
        confirmed=confirmed(plants),
        shipped=shipped(plants),
        interacts=INTERACTS,
        elsewhere=elsewhere(numbers),
        smooth=smooth(numbers),
        command=numbers["about"]["command"],
    )
