"""docs/faithfulness_data.md is what the numbers render to."""

from __future__ import annotations

import itertools
import re
import statistics
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.evidence import intervals, page, resampled, results, words


@pytest.fixture(scope="module")
def numbers():
    return results.read()


@pytest.mark.slow
def test_the_page_is_what_the_numbers_render_to(numbers):
    """Written by benchmarks/evidence/page.py, never by hand."""
    assert results.PAGE.read_text() == page.page(numbers)


FRONT = results.PAGE.with_name("faithfulness.md")


def test_the_front_is_short_and_its_numbers_are_those_of_the_evidence():
    """Medians with worst tasks, and how many adapters were right on each model, row by row."""
    text = FRONT.read_text()
    words = [word for word in text.split() if any(map(str.isalnum, word))]
    assert len(words) <= 800
    evidence_text = results.PAGE.read_text()
    (table,) = re.findall(r"(?:^\| (?:What would|How is|Which).*\n)+", text, re.M)[:1]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    by_number = re.findall(r"^\| [1-5]\. .*$", evidence_text, re.M)
    assert len(rows) == len(by_number) == 5
    for (_, _, median, first, second), line in zip(rows, by_number, strict=True):
        assert f"| {median} |" in line
        right = [each.strip() for each in line.split("|")[4].split(",")]
        assert [first, second] == (right if len(right) == 2 else ["—", "—"])


def test_adapters_differ_as_the_page_says(numbers):
    adapters = numbers["adapters"].values()
    assert len({one["cluster"] for one in adapters}) >= 5
    assert {one["kind"] for one in adapters} == {"fact", "behaviour"}
    assert any(one["dora"] for one in adapters)
    assert any(one["rslora"] for one in adapters)
    for one in adapters:
        kinds = {"trained", "paraphrase", "neighbour", "unrelated"}
        assert set(one["ends"]) == kinds - ({"neighbour"} if one.get("lean") else set())


def test_pictures_of_the_page_are_there():
    assert page.PARETO.is_file()
    assert page.STRENGTH.is_file()


# --- Cells again, from the JSON by plain Python and numpy: none of the page's functions

SMOLLM2 = "SmolLM2-135M-Instruct"
GEMMA = "gemma-3-270m"
OWN = ("trained", "paraphrase")
Of = tuple[str, str, str]  # question, metric and method


def by_task(numbers: dict[str, Any], of: Of, kinds=OWN, base: str = SMOLLM2) -> dict[str, float]:
    """{task: mean over its adapters of each adapter's mean over kinds of prompts}."""
    question, metric, method = of
    tasks: dict[str, list[float]] = defaultdict(list)
    for one in numbers["adapters"].values():
        stored = one["scores"].get(question, {})
        if metric == "incompleteness":
            held = {k: abs(v - 1) for k, v in stored["sum"].get(method, {}).items()}
        else:
            held = stored.get(metric, {}).get(method, {})
        values = [held[kind] for kind in kinds if held.get(kind) is not None]
        if one["base"] == base and values:
            tasks[one["cluster"]].append(sum(values) / len(values))
    return {task: sum(values) / len(values) for task, values in tasks.items()}


def section(heading: str) -> list[list[str]]:
    """Cells of the table lines below a heading, up to the next heading."""
    text = results.PAGE.read_text().split(f"\n{heading}\n")[1].split("\n#")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_a_median_its_interval_and_the_worst_task(numbers):
    """First order at 1 for leaving one out: the ninth, fifth, thirteenth and first of seventeen."""
    found = by_task(numbers, ("leave_one_out", "spearman", "first_order@1"))
    low_to_high = sorted(found.values())
    assert len(low_to_high) == 17
    middle = f"{low_to_high[8]:.2f} [{low_to_high[4]:.2f}, {low_to_high[12]:.2f}]"
    rows = {row[0]: row for row in section("### Leaving one module out")}
    assert rows["first order at 1"][1:5] == ["17", middle, f"{low_to_high[0]:.2f}", "best"]


def interval(values: list[float]) -> str:
    """Order statistics: the widest pair whose binomial covers 95 %."""
    low_to_high = sorted(values)
    size = len(values)
    k = next(k for k in range(size, 0, -1) if 2 * stats.binom.cdf(k - 1, size, 0.5) <= 0.05)
    low = low_to_high[k - 1]
    high = low_to_high[size - k]
    return f"{statistics.median(values):.2f} [{low:.2f}, {high:.2f}]"


@pytest.mark.parametrize(
    ("heading", "of"),
    [
        ("Adding one module", ("add_one", "spearman", "first_order@0")),
        ("Leaving one module out", ("leave_one_out", "spearman", "first_order@1")),
        ("Leaving one module out", ("leave_one_out", "error", "first_order@1")),
    ],
)
def test_cells_of_the_second_base(numbers, heading: str, of: Of):
    """The median, its interval and the worst task, in its table and on the first page."""
    values = list(by_task(numbers, of, base=GEMMA).values())
    assert len(values) >= 12
    worst = min(values) if of[1] == "spearman" else max(values)
    text = results.PAGE.read_text().split(f"## Every method, on {GEMMA}")[1]
    table = text.split(f"### {heading}")[1].split("\n#")[0]
    method = {"first_order@0": "first order at 0", "first_order@1": "first order at 1"}[of[2]]
    row = next(line for line in table.splitlines() if line.startswith(f"| {method} |"))
    assert f"| {interval(values)} | {worst:.2f} |" in row
    short = {"add_one": "adding one", "leave_one_out": "leaving one out"}[of[0]]
    lines = {row[0]: row for row in section(f"## On {GEMMA}")}
    here = list(by_task(numbers, of).values())
    lowest = min(here) if of[1] == "spearman" else max(here)
    cells = [method, interval(here), f"{lowest:.2f}", interval(values), f"{worst:.2f}"]
    assert lines[f"{short}: {of[1]}"][1:6] == cells


def test_slopes_of_the_second_base(numbers):
    """How many times too small the numbers are: the median task, and both ends."""
    text = results.PAGE.read_text().split("Slopes of measured effects")[1].split("\n")[0]
    for of in (("add_one", "slope", "first_order@0"), ("leave_one_out", "slope", "first_order@1")):
        values = list(by_task(numbers, of, base=GEMMA).values())
        ends = f"({min(values):.2f} to {max(values):.2f})"
        assert f"{statistics.median(values):.2f} {ends}" in text


@pytest.mark.parametrize(("base", "tasks", "left"), [(SMOLLM2, 17, 1), (GEMMA, 12, 0)])
def test_slopes_stand_on_the_first_page(numbers, base: str, tasks: int, left: int):
    """The calibration of each end: the median task, and the adapters of least and largest slope."""
    page_lines = results.PAGE.read_text().splitlines()
    lines = [line for line in page_lines if line.startswith("   *Slopes* of effects")]
    asked = (("add_one", "slope", "first_order@0"), ("leave_one_out", "slope", "first_order@1"))
    adapters = {name: one for name, one in numbers["adapters"].items() if one["base"] == base}
    for line, of in zip(lines, asked, strict=True):
        by_adapter = {}
        for name, one in adapters.items():
            held = one["scores"][of[0]].get("slope", {}).get(of[2], {})
            if held:
                by_adapter[name] = statistics.mean(held[kind] for kind in OWN)
        assert len(adapters) - len(by_adapter) == left
        low = min(by_adapter, key=by_adapter.get)
        high = max(by_adapter, key=by_adapter.get)
        ends = f"{by_adapter[low]:.2f} ({low}) to {by_adapter[high]:.2f} ({high})"
        median = list(by_task(numbers, of, base=base).values())
        assert len(median) == tasks
        assert f"{base} {statistics.median(median):.2f} in the median task, {ends}" in line


@pytest.mark.slow
def test_verdicts_are_those_of_all_signs_and_holm_s_steps(numbers):
    """Every row of the comparisons on the first base, all 2^17 or 2^12 patterns one by one."""
    compared = words.COMPARED
    rows = [row for row in section("## Does it help?") if row[0] != "---"][1 : 1 + len(compared)]
    p = []
    ahead = []
    for (question, method, other), row in zip(compared, rows, strict=True):
        asked = (question.key, question.metric)
        mine, its = (by_task(numbers, (*asked, of), question.prompts) for of in (method, other))
        apart = np.array([mine[task] - its[task] for task in mine if task in its])
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(apart))))
        p.append(float((np.abs(signs @ apart) >= abs(apart.sum()) * (1 - 1e-9)).mean()))
        ahead.append("better" if (apart.sum() > 0) == question.larger else "worse")
        assert row[3].split(" ")[0] == f"{np.median(apart):+.3f}"
    assert len(p) == len(compared)
    steps = 0.0
    corrected = {}
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        steps = max(steps, (len(p) - rank) * p[index])
        corrected[index] = steps
    said = [ahead[i] if corrected[i] < 0.05 else "tie" for i in range(len(p))]
    assert [row[4] for row in rows] == said
    assert {"worse", "tie"} <= set(said)


def test_on_how_many_adapters_the_first_estimate_is_right(numbers):
    """Spearman of first order at 0 with adding each module, by adapter and base."""
    right = {SMOLLM2: [0, 0], GEMMA: [0, 0]}
    for one in numbers["adapters"].values():
        values = one["scores"]["add_one"]["spearman"]["first_order@0"]
        right[one["base"]][0] += statistics.mean(values[kind] for kind in OWN) >= 0.9
        right[one["base"]][1] += 1
    row = next(r for r in results.PAGE.read_text().splitlines() if r.startswith("| 1. "))
    assert f"| {', '.join(f'{good} of {every}' for good, every in right.values())} |" in row


def test_stored_coverage_is_what_binomials_say(numbers):
    """Of order statistics, from a population of the tasks themselves; all cover what they say."""
    stored = numbers["resampled"]
    error = 4 * np.sqrt(0.05 * 0.95 / stored["how"]["draws"])
    asked = {
        "adding one: spearman": ("add_one", "spearman", "first_order@0"),
        "leaving one out: error": ("leave_one_out", "error", "first_order@1"),
    }
    for label, of in asked.items():
        assert stored["coverage"][label]["method"] == of[2]
        values = np.array(list(by_task(numbers, of).values()))
        for size, k in ((17, 5), (6, 1)):
            sides = [(values <= np.median(values)).mean(), (values >= np.median(values)).mean()]
            expected = 1 - sum(stats.binom.cdf(k - 1, size, side) for side in sides)
            assert abs(stored["coverage"][label][str(size)]["median"] - expected) < error
    every = [one[n]["median"] for one in stored["coverage"].values() for n in ("17", "6")]
    assert min(every) >= 0.93


@pytest.mark.slow
def test_the_choice_that_is_stored_is_that_of_the_seed(numbers):
    """Of a tenth of the draws, as far as chance allows; rules of the path are one choice."""
    stored = numbers["resampled"]
    for shares in stored["choices"].values():
        assert sum(shares.values()) == pytest.approx(1.0)
    scores = results.scores_of(numbers)
    costs = results.costs_of(numbers)
    for question in (words.SUM, words.FEW):
        means, passes = words.estimates(scores, costs, question, SMOLLM2)
        picked = [
            words.as_run(question, intervals.choice(s, passes, larger_is_better=question.larger))
            for s in resampled.resamples(means, 100)
        ]
        for method, share in stored["choices"][question.label].items():
            assert abs(picked.count(method) / 100 - share) < 0.2
