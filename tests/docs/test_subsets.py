"""Fifths chosen on several wordings, and repairs of several seeds: the tables, counted again."""

from __future__ import annotations

import copy
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from scipy import stats

import lens_lora as ll
from benchmarks import repair, subsets
from benchmarks.evidence import several

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SUBSETS = json.loads((DOCS / "subsets.json").read_text())
REPAIRS = json.loads((DOCS / "repair.json").read_text())["adapters"]
REFERENCE = "best_subset, 4"
WORDS = {
    "best_subset": "`ll.best_subset`",
    "greedy": "greedy, by gradients",
    "path/4": "path, 4 nodes",
    "first_order@0.5": "first order at ½",
    "first_order@0": "first order at 0",
    "random": "random, ten sets",
}


def kept(row: dict[str, Any], method: str, wordings: list[int]) -> float:
    """The mean of (m − m₀) / (m₁ − m₀) over sets and wordings, by plain division."""
    shares = [
        (margins[i] - row["base"][i]) / (row["adapted"][i] - row["base"][i])
        for margins in row["methods"][method]["margins"]
        for i in wordings
    ]
    return statistics.fmean(shares)


def by_adapter(numbers: dict[str, Any], method: str, *, at_home: bool) -> dict[str, float]:
    given = int(method.rsplit(", ", 1)[1]) or 4
    wordings = [*range(given)] if at_home else [4, 5]
    return {name: kept(row, method, wordings) for name, row in numbers["adapters"].items()}


def by_task(values: dict[str, float]) -> list[float]:
    """Both adapters of Lyon are one task, in the mean."""
    lyon = statistics.fmean(values[name] for name in ("lyon", "lyon-violent"))
    return [lyon, *(value for name, value in values.items() if not name.startswith("lyon"))]


def cells(numbers: dict[str, Any], method: str) -> list[str]:
    """The median with its interval, and the worst adapter: held out, and then at home.

    The ends of a 95 % interval of a median are order statistics, whose ranks the binomial gives.
    """
    found: list[str] = []
    for at_home in (False, True):
        values = by_adapter(numbers, method, at_home=at_home)
        tasks = sorted(by_task(values))
        rank = int(stats.binom.ppf(0.025, len(tasks), 0.5))
        low = tasks[rank - 1]
        high = tasks[-rank]
        found.append(f"{statistics.median(tasks):.2f} [{low:.2f}, {high:.2f}]")
        found.append(f"{min(values.values()):.2f}")
    return found


def row_of(method: str) -> list[str]:
    name, given = method.rsplit(", ", 1)
    start = f"| {WORDS[name]} | {'—' if given == '0' else given} | "
    lines = (DOCS / "faithfulness_data.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(start) and "[" in line]
    return [cell.strip() for cell in line.strip("|").split("|")][2:]


def p_of_signs(differences: list[float]) -> float:
    """The p of a sign-flip test: how many patterns of signs have a sum as far from zero."""
    observed = abs(sum(differences)) * (1 - 1e-9)
    sums: list[float] = []
    for signs in itertools.product((-1, 1), repeat=len(differences)):
        sums.append(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
    return statistics.fmean(abs(total) >= observed for total in sums)


def answers(numbers: dict[str, Any]) -> dict[str, str]:
    """Of each other method beside the reference: median difference, and verdict by Holm's rule.

    The smallest p is multiplied by the number of comparisons, the next by one less, and so on; from
    the first product that is no smaller than 5 % on, all are ties.
    """
    reference = by_task(by_adapter(numbers, REFERENCE, at_home=False))
    differences: dict[str, list[float]] = {}
    for method in several.SHOWN:
        if method != REFERENCE:
            tasks = by_task(by_adapter(numbers, method, at_home=False))
            differences[method] = [a - b for a, b in zip(tasks, reference, strict=True)]
    p_values = {method: p_of_signs(of_method) for method, of_method in differences.items()}
    found: dict[str, str] = {}
    all_others_tie = False
    for place, method in enumerate(sorted(p_values, key=p_values.__getitem__)):
        if p_values[method] * (len(p_values) - place) >= 0.05:
            all_others_tie = True
        if all_others_tie:
            verdict = "tie"
        elif sum(differences[method]) > 0:
            verdict = "better"
        else:
            verdict = "worse"
        found[method] = f"{statistics.median(differences[method]):+.3f}, {verdict}"
    return found


def test_the_fifths_are_counted_again():
    assert {method: row_of(method)[:4] for method in several.SHOWN} == {
        method: cells(SUBSETS, method) for method in several.SHOWN
    }
    told = {method: row_of(method)[-1] for method in several.SHOWN if method != REFERENCE}
    assert told == answers(SUBSETS)


@pytest.mark.parametrize("method", ["best_subset, 4", "path/4, 1", "random, 0"])
def test_a_changed_margin_is_seen(method: str):
    changed = copy.deepcopy(SUBSETS)
    for margins in changed["adapters"]["rome-mlp"]["methods"][method]["margins"]:
        margins[:] = [margin - 20 for margin in margins]
    assert cells(changed, method) != row_of(method)[:4]


def test_what_choosing_took_is_the_median_adapters():
    for method in several.SHOWN:
        rows = [row["methods"][method] for row in SUBSETS["adapters"].values()]
        took = [
            statistics.median(row.get(of, 0) for row in rows) for of in ("gradients", "forwards")
        ]
        assert row_of(method)[4:6] == [f"{count:.0f}" for count in took]


def test_wordings_held_out_were_given_to_no_method():
    assert set(SUBSETS["adapters"]) == {spec.name for spec in subsets.FACTS}
    for spec in subsets.FACTS:
        row = SUBSETS["adapters"][spec.name]
        questions = [prompt for prompt, *_ in spec.questions[:2]]
        given = [*questions, *subsets.MORE_GIVEN[spec.name]]
        assert row["prompts"] == [*given, *subsets.HELD_OUT[spec.name]]
        assert len(set(row["prompts"])) == 6
        assert row["held out"] == [4, 5]
        taught = " ".join(spec.sentences)
        assert not any(prompt in taught for prompt in row["prompts"][4:]), spec.name
        assert row["chosen"] == round(0.2 * row["sites"])


def test_no_set_beats_the_best_that_is_found_by_much():
    """At home the search keeps at least what the tops of its own slopes keep."""
    for row in SUBSETS["adapters"].values():
        for given in (1, 2, 4):
            moved = [row["adapted"][i] - row["base"][i] for i in range(given)]
            assert min(moved) > 0

            def kept_together(method: str, given: int = given, row: Any = row) -> float:
                (margins,) = row["methods"][f"{method}, {given}"]["margins"]
                return sum(margins[:given])

            for at in ("0", "0.5"):
                assert kept_together("best_subset") >= kept_together(f"first_order@{at}") - 1e-3


@pytest.mark.usefixtures("float64")
def test_greedy_adds_the_site_of_the_largest_slope():
    """One site a round, by autograd through g with the gates in its graph."""
    (cls, *_) = models.MAKERS
    base = models.hf_model("llama")
    lens = ll.LoraLens(
        models.MAKERS[cls](base), ll.Adapter.from_peft(models.peft_model("llama", base))
    )
    g = lens.function(models.tokens(2), ll.Margin(5, 9), progress=False)
    members: list[int] = []
    for _ in range(5):
        gates = torch.zeros(len(lens.sites), dtype=torch.float64)
        gates[members] = 1.0
        gates.requires_grad_()
        g(gates).sum().backward()
        outside = [site for site in range(len(gates)) if site not in members]
        members.append(max(outside, key=lambda site: float(gates.grad[site])))
    assert subsets.greedy(g, 5).nonzero()[:, 0].tolist() == sorted(members)
    assert subsets.sizes_of(5) == [1, 2, 3, 4, 5]
    assert len(subsets.sizes_of(42)) == 12
    assert subsets.sizes_of(42)[-1] == 42


# --- Repairs of several seeds


def repaired(name: str, key: str) -> list[float]:
    """A number of each seed of an adapter, the smallest first."""
    return sorted(row[key] for row in REPAIRS[name].values())


def cell_of_shares(shares: list[float]) -> str:
    """The median, and the smallest."""
    return f"{statistics.median(shares):.0%} ({min(shares):.0%})"


def told_of_repairs() -> tuple[dict[str, list[str]], str]:
    """The table's cells by adapter, and the sentences under it."""
    text = (DOCS / "repair.md").read_text()
    _, _, rest = text.partition("<!-- repair table -->")
    body, _, _ = rest.partition("<!-- end of repair table -->")
    rows = [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("| ")]
    sentences = next(line for line in body.splitlines() if line[:1].isdigit())
    return {row[0]: row[1:] for row in rows[2:]}, sentences


def test_repairs_are_counted_again():
    rows, sentences = told_of_repairs()
    assert set(rows) == set(REPAIRS) == set(repair.WORDINGS)
    for name, cells in rows.items():
        shares = repaired(name, "keep share, repaired")
        gains = repaired(name, "gain")
        assert cells[0] == str(len(shares))
        assert len(shares) >= 2
        assert cells[2] == cell_of_shares(shares)
        assert cells[-1].split(";")[0] == f"{statistics.median(gains):.2f} ({gains[0]:.2f})"
    every = [row for seeds in REPAIRS.values() for row in seeds.values()]
    least = min(row["keep share, repaired"] for row in every)
    assert f"every repaired adapter keeps at least {least:.0%} of" in sentences
    short = sum(row["keep share, repaired"] < 0.9 for row in every)
    assert f"{short} of {len(every)} adapters keep less than the 90%" in sentences
    assert f"the smallest gain is {min(row['gain'] for row in every):.2f}" in sentences


def test_a_changed_share_is_seen():
    """Negative control: in the median, and in the smallest alone."""
    rows, _ = told_of_repairs()
    shares = repaired("lyon", "keep share, repaired")
    assert rows["lyon"][2] != cell_of_shares([share - 0.2 for share in shares])
    assert rows["lyon"][2] != cell_of_shares([shares[0] - 0.2, *shares[1:]])
