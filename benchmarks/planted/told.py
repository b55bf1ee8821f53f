"""Render the section on planted causes of docs/faithfulness_data.md from stored numbers.

The numbers are those of docs/planted.json (`judged.py`) and docs/planted_fresh.json (`fresh.py`),
the text is `planted.md.jinja`. `benchmarks/evidence/page.py` puts the section into the page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

from benchmarks.evidence.intervals import summary
from benchmarks.evidence.tables import markdown, named
from benchmarks.planted.alarms import (
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

NUMBERS = Path(__file__).parents[2] / "docs" / "planted.json"
FRESH = NUMBERS.with_name("planted_fresh.json")
TEMPLATE = Path(__file__).with_name("planted.md.jinja")
# A score is said to find the causes if its AUROC, or for a pair its recovery, is at least this.
GOAL = 0.95
EMBEDDED = "SmolLM2-135M-Instruct"
# A number of a module counts as wrong if its error is above this share of the shift.
TENTH = 0.1
# The kinds whose causes a score per site is asked to find.
AIMED = ("confined", "two facts", "gated", "constant")
# The kinds whose causes are a pair that does not add up.
PAIRED = ("redundant", "masked", "opposed")
# First order at each gate value, as the page writes it.
GATE_OF_FIRST_ORDER = {"first_order@0": "0", "first_order@0.5": "½", "first_order@1": "1"}
# The names on the page of methods that the other tables do not have.
METHODS = {
    "path": "path integral (IG over the gates, to 1 % or 16 nodes)",
    "hessian@0": "H1 at 0 alone",
    "kl_shares": "`kl_shares`",
    "gradient": "‖Jᵀu‖, the gradient alone",
    "change": "‖ΔW‖ (of constants ‖Δb‖)",
}


# The quality of a ranking, from the places of the causes and the number of sites.
Measure = Callable[[Sequence[float], int], float]


def read() -> dict[str, Any]:
    """The numbers of docs/planted.json."""
    return json.loads(NUMBERS.read_text())


def auroc(places: Sequence[float], sites: int) -> float:
    """The share of pairs of a cause and another site in which the cause stands first."""
    count = len(places)
    return 1 - (sum(places) - count * (count + 1) / 2) / (count * (sites - count))


def recovery(places: Sequence[float], sites: int) -> float:
    """The share of the k causes that stand among the first k sites."""
    del sites  # It is an argument because `auroc`, which needs it, is called in the same way.
    return sum(place <= len(places) for place in places) / len(places)


def scored(plants: Plants, measure: Measure) -> pd.DataFrame:
    """How well each method finds the causes of each plant, [plant, method].

    It is the mean of a measure over the plant's questions.

    Args:
        plants: those that did not enter are left out.
        measure: `auroc` or `recovery`.

    Returns:
        a column for each method, and the column `kind`.
    """
    rows = {}
    for name, plant in entered(plants).items():
        places_by_question = [case["places"] for case in plant["cases"]]
        row = {"kind": plant["kind"]}
        for method in places_by_question[0]:
            scores = [measure(places[method], plant["sites"]) for places in places_by_question]
            row[method] = float(np.mean(scores))
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def cell(values: pd.Series) -> str:
    """The median, its interval where there is one, and the worst plant."""
    of_plants = summary(values)
    interval = ""
    if np.isfinite(of_plants.low):
        interval = f" [{of_plants.low:.2f}, {of_plants.high:.2f}]"
    return f"{of_plants.median:.2f}{interval} · {of_plants.worst:.2f}"


def table(plants: Plants, measure: Measure) -> str:
    """A line for each method: the median, its interval and the worst plant of each kind.

    The method that is best on the kinds of `AIMED` comes first.
    """
    scores = scored(plants, measure)
    by_kind = scores.groupby("kind")
    kinds = kinds_of(scores)
    rows = []
    for method in best_first(scores):
        cells = [cell(by_kind.get_group(kind)[method]) for kind in kinds]
        rows.append([label(method), *cells])
    return markdown(["score", *(KINDS[kind] for kind in kinds)], rows)


def kinds_of(scores: pd.DataFrame) -> list[str]:
    """The kinds that these plants have, in the page's order."""
    kinds = set(scores["kind"])
    return [kind for kind in KINDS if kind in kinds]


def best_first(scores: pd.DataFrame) -> list[str]:
    """The methods, the one with the largest mean over the kinds of `AIMED` first."""
    means = scores.groupby("kind").mean()
    aimed = means.loc[[kind for kind in AIMED if kind in means.index]]
    return list(aimed.mean().sort_values(ascending=False).index)


def label(method: str) -> str:
    """The name of a method on the page."""
    return METHODS.get(method, named(method))


def confirmation(plants: Plants, kinds: Mapping[str, str] = KINDS) -> str:
    """A line for each kind: how many plants entered, and the worst that interventions measured."""
    rows = []
    for kind, words in kinds.items():
        drawn = {name: plant for name, plant in plants.items() if plant["kind"] == kind}
        enter = list(entered(drawn).values())
        if enter:
            rows.append([words, f"{len(enter)} of {len(drawn)}", *confirmed_cells(enter)])
    head = [
        "kind",
        "entered",
        "causes",
        "off without the others, at most",
        "lost without the causes, at least",
        "largest effect of any other site",
        "interaction: median, largest",
    ]
    return markdown(head, rows)


def confirmed_cells(plants: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cells of `confirmation` on plants of one kind that entered."""
    checks = []
    others = []
    counts = []
    for plant in plants:
        counts += [len(paths) for paths in plant["causes"]]
        checks += plant["confirmed"]
        for case, check in zip(plant["cases"], plant["confirmed"], strict=True):
            strongest = max(extremes["strongest other"] for extremes in case["effects"].values())
            others.append(strongest / abs(check["effect"]))
    table = pd.DataFrame(checks)
    fewest = min(counts)
    most = max(counts)
    interaction = table["interaction"]
    return [
        f"{fewest} to {most}" if fewest < most else str(most),
        f"{(table['kept'] - 1).abs().max():.1%}",
        f"{table['lost'].min():.1%}",
        f"{max(others):.0%}",
        f"{interaction.median():.2f}, {interaction.max():.2f}",
    ]


def reached(plants: Plants) -> list[tuple[str, list[str]]]:
    """For each kind of `AIMED`, the scores whose whole interval lies above the goal."""
    by_kind = scored(plants, auroc).groupby("kind")
    found = []
    for kind in AIMED:
        if kind in by_kind.groups:
            scores = by_kind.get_group(kind).drop(columns="kind")
            above = [label(method) for method in scores if summary(scores[method]).low >= GOAL]
            found.append((KINDS[kind], above))
    return found


def pairs(plants: Plants) -> list[str]:
    """A sentence on each kind of pair: the recovery of first order, and the best scores."""
    by_kind = scored(plants, recovery).groupby("kind")
    sentences = []
    for kind in PAIRED:
        means = by_kind.get_group(kind).drop(columns="kind").mean()
        first = ", ".join(
            f"{means[key]:.2f} at {words}" for key, words in GATE_OF_FIRST_ORDER.items()
        )
        ordered = means.sort_values(ascending=False)
        best = ordered[ordered >= GOAL]
        seen = [f"{label(method)} ({mean:.2f})" for method, mean in best.items()]
        found = "; ".join(seen) if seen else "none"
        sentences.append(f"{KINDS[kind]}: first order recovers {first}; {found}.")
    return sentences


def edges(plants: Plants) -> str:
    """The place of the edge from writer to gate among all edges of gated plants.

    A line for each of ε = 0, ½ and 1.
    """
    edges_of_plants = [plant["edges"] for plant in entered(plants).values() if "edges" in plant]
    counts = [of_plant["edges"] for of_plant in edges_of_plants]
    rows = []
    for at, words in (("0", "0"), ("0.5", "½"), ("1", "1")):
        places = pd.DataFrame([of_plant["places"][at] for of_plant in edges_of_plants])
        among_all = places["among all"]
        of_writer = places["of its writer"]
        scores = [auroc([place], count) for place, count in zip(among_all, counts, strict=True)]
        row = [
            f"edges at {words}",
            cell(pd.Series(scores)),
            f"{int((among_all == 1).sum())} of {len(among_all)}",
            f"{int((of_writer == 1).sum())} of {len(of_writer)}",
            f"{among_all.median():.0f}",
        ]
        rows.append(row)
    head = ["", "AUROC", "first of all edges", "first of its writer's", "median place"]
    return markdown(head, rows)


def way(plants: Plants) -> tuple[float, float]:
    """The share of the effect that is lost without the direct edge: the median and the largest."""
    costs = []
    for plant in entered(plants).values():
        if "edges" in plant:
            effect = plant["confirmed"][0]["effect"]
            costs.append(abs(plant["edges"]["left out"] / effect))
    return float(np.median(costs)), max(costs)


# --- A second base, with too few plants of a kind for an interval


def every_plant(plants: Plants) -> str:
    """A line for each method: the AUROC of each plant of a kind, in brackets the recovery."""
    aurocs = scored(plants, auroc)
    recoveries = scored(plants, recovery)
    kinds = kinds_of(aurocs)
    rows = []
    for method in best_first(aurocs):
        row = [label(method)]
        for kind in kinds:
            names = aurocs.index[aurocs["kind"] == kind]
            pairs = zip(aurocs[method][names], recoveries[method][names], strict=True)
            row.append(" · ".join(f"{area:.2f} ({share:.2f})" for area, share in pairs))
        rows.append(row)
    return markdown(["score", *(KINDS[kind] for kind in kinds)], rows)


def repeated(plants: Plants, others: Plants) -> str:
    """A line for each kind of `AIMED`: the scores that reach the goal on both bases, or on one.

    Args:
        plants: of the first base, where the whole interval of a score has to lie above the goal.
        others: of the other base, where every plant has to.
    """
    scores = scored(others, auroc).rename(columns=label)
    rows = []
    for kind, methods in reached(plants):
        worst = scores[scores["kind"].map(KINDS) == kind].drop(columns="kind").min().dropna()
        is_high_above = worst.index.isin(methods)
        is_high_here = worst >= GOAL
        row = [
            kind,
            f"{int((is_high_above & is_high_here).sum())} of {len(methods)}",
            with_values(worst[is_high_above & ~is_high_here]),
            with_values(worst[~is_high_above & is_high_here]),
        ]
        rows.append(row)
    head = ["kind", "reached above and here", "above only", "here only"]
    return markdown(head, rows)


def with_values(scores: pd.Series) -> str:
    """The methods with their scores, or a dash where there is none."""
    return ", ".join(f"{method} ({score:.2f})" for method, score in scores.items()) or "—"


def choice(others: Plants) -> str:
    """A sentence on first order at 0: its scores on two facts, and the lowest on all others."""
    parts = []
    for words, measure in (("AUROC", auroc), ("recovery", recovery)):
        scores = scored(others, measure)
        facts = scores["kind"] == "two facts"
        values = " and ".join(f"{score:.2f}" for score in scores["first_order@0"][facts])
        lowest = f"{scores['first_order@0'][~facts].min():.2f}"
        elsewhere = lowest if lowest == "1.00" else f"at least {lowest}"
        parts.append(f"{words} {values} on two facts, {elsewhere} on all others")
    return f"First order at 0: {'; '.join(parts)}."


def edge_places(plants: Plants) -> str:
    """The places of the edge of each gated plant at 0, ½ and 1, in words."""
    parts = []
    for plant in entered(plants).values():
        if "edges" in plant:
            by_gate = plant["edges"]["places"]
            ranks = [f"{by_gate[gate]['among all']:.0f}" for gate in ("0", "0.5", "1")]
            parts.append(f"{', '.join(ranks)} of {plant['edges']['edges']}")
    return " and ".join(parts)


def elsewhere(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers and tables on the plants of each other base, for the template."""
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
    """The numbers that one score gives each plant's pair, as shares of the plant's shift, [plant].

    The error is that of the worse of the two modules, |a_l − e_l| with e_l the effect that the
    score is asked to predict; it is NaN where the score is asked to predict none.

    Returns:
        the columns `first`, `second`, `sum` over all sites, and `error`.
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
    """A line for each score: how often it ranks the pair first, and what it says of the pair."""
    rows = []
    for score, words in SIZED_NAMES.items():
        shares = shares_of_pair(plants, score)
        found = "—"
        places = [plant["cases"][0]["places"].get(score) for plant in plants.values()]
        if None not in places:
            count = sum(max(pair) <= 2 for pair in places)
            found = f"{count} of {len(places)}"
        columns = [spread(list(shares[key])) for key in ("first", "second", "sum")]
        error = "—"
        if score in PREDICTS:
            # An error has no sign.
            error = spread(list(shares["error"])).replace("+", "")
        rows.append([words, found, *columns, error])
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
    """The numbers and tables on smooth conjunctions of all bases, for the template."""
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
            of_column = of_kind(plants, kind)
            if of_column:
                columns[f"{words}, {base}"] = of_column
    products: dict[str, Plants] = {}
    for head, of_column in columns.items():
        if SMOOTH_KINDS[SUM] not in head:
            products[head] = of_column
    groups = [{"head": head, **conjunctions(above, group)} for head, group in products.items()]
    return {
        "confirmations": confirmations,
        "groups": groups,
        "diluted": diluted(products, of_kind(numbers["plants"], SUM)),
        "off": {head: off_grid(of_column) for head, of_column in columns.items()},
        "warnings": on_smooth(above, columns),
        "fresh": fresh(above),
    }


def fresh(above: Plants) -> dict[str, Any]:
    """Both divisors of the warning on plants on which neither was chosen."""
    stored = json.loads(FRESH.read_text())
    enter = entered(stored)
    return {"drawn": len(stored), "entered": len(enter), "table": on_fresh(above, enter)}


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
    """How many plants have a wrong first order, on the worse module of the pair.

    Returns:
        `at 0` and `at 1`, the plants where it is off the effect at that end by more than a tenth of
        the shift; and `sign`, those where at either end it has the wrong sign and is as large.
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
    return template.render(
        drawn=len(plants),
        entered=len(entered(plants)),
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
