"""The page on faithfulness, on planted results: it must say what was planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.evidence import agreed, page, resampled, results, sections, tables, words
from benchmarks.evidence.intervals import Summary

KINDS = ("trained", "paraphrase", "neighbour", "unrelated")
METHODS = {
    "first_order@0": 3.0,
    "first_order@0.5": 3.0,
    "first_order@1": 3.0,
    "path/2": 12.0,
    "path/4": 24.0,
    "path/8": 48.0,
    "random": 0.0,
}
BEST = {"add_one": "first_order@0", "leave_one_out": "first_order@1", "keep": "path/4"}
TIE = {"keep": "first_order@0.5"}


def one(index: int, base: str) -> dict[str, Any]:
    """A result as measure.py writes it: the best of each question has 0.95, its tie a hair less."""
    draw = np.random.default_rng(index)
    scores = []

    def add(question: str, metric: str, method: str, kind: str, value: float) -> None:
        row = {"prompts": kind, "question": question, "metric": metric, "method": method}
        scores.append({**row, "value": value})

    for kind in KINDS:
        for method in METHODS:
            for question, best in BEST.items():
                score = 0.95 if method == best else 0.3
                if method == TIE.get(question):
                    score = 0.949 - 0.004 * (-1) ** (index // 2)
                score += 0.01 * float(draw.normal()) if score == 0.3 else 0.0
                metrics = ("cpr", "kept") if question == "keep" else ("spearman",)
                for metric in metrics:
                    add(question, metric, method, kind, score)
                add(question, "cmd" if question == "keep" else "error", method, kind, 1 - score)
            total = 1.0 if method.startswith("path") else 0.5
            if method != "random":
                add("sum", "sum", method, kind, total + 0.001 * (-1) ** index)
        add("keep", "kept", "best_subset/paraphrase", kind, 1.9)
    for method in ("first_order@0", "second_order/add_one@0"):
        add("add_one", "error", method, "trained, first", 0.1)
    for method in ("first_order@1", "second_order/leave_one_out@1"):
        add("leave_one_out", "error", method, "trained, first", 0.2)
    passes = {**METHODS, "add_one": 30.0, "leave_one_out": 90.0, "best_subset": 400.0}
    names = [name for name in sections.SIGNALS if not name.startswith("sum_off")]
    signals = dict.fromkeys([*names, "sum_at_0", "sum_at_1"], 0.1 * (index + 1))
    return {
        "name": f"{base}-{index}",
        "cluster": f"{base} task {index // 2}",
        "base": f"/somewhere/{base}",
        **{"kind": "fact", "rank": 8, "targets": "all", "lr": 1e-4, "steps": 9},
        **{"dora": False, "rslora": index == 0, "sites": 10},
        "questions": {kind: {"base": [-1.0], "adapted": [2.0]} for kind in KINDS},
        "scores": scores,
        "costs": {name: {"passes": cost, "time": cost} for name, cost in passes.items()},
        "ceilings": {},
        "signals": dict.fromkeys(KINDS, signals),
        "left_out": {},
        "versions": {"lens_lora": "0"},
    }


def warned(index: int) -> dict[str, Any]:
    """A result as warned.py packs it: what is stronger than 8 is broken, and strength knows."""
    flags = {"wrong": 2, "flagged": index % 2, "hit": index % 2, "screened": 9}
    errors = {"error": 0.4, "error_fixed": 0.2, "error_corrected": 0.1}
    agreement = 0.5 if index > 8 else 0.99
    of = {
        "signals": {**dict.fromkeys(sections.SIGNALS, 0.5), "strength": float(index)},
        "agreement": dict.fromkeys(("add_one", "leave_one_out"), agreement),
        "flags": dict.fromkeys(("add_one", "leave_one_out"), flags | errors),
        "kl": {"shares": 0.1, "shares, first_order@0.5": 0.2, "shares, first_order@1": 0.4}
        | dict.fromkeys(("first_order@0.5", "first_order@1", "path/2"), 0.95),
    }
    return {"cluster": f"task {index // 2}", "confirms": index % 4 > 1, "kinds": {"trained": of}}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("results")
    for index in range(16):
        of = one(index, "large")
        (folder / f"{of['name']}.json").write_text(json.dumps(of))
    for index in range(8):
        of = one(index, "small")
        (folder / f"{of['name']}.json").write_text(json.dumps(of))
    packed = {**results.pack(folder), "warned": {f"a{i}": warned(i) for i in range(16)}}
    return json.loads(json.dumps({**packed, "resampled": resampled.study(packed, 30)}))


def line(text: str, start: str) -> list[str]:
    """Cells of the first table line that starts so."""
    found = next(row for row in text.splitlines() if row.startswith(f"| {start}"))
    return [cell.strip() for cell in found.strip("|").split("|")]


@pytest.mark.slow
def test_the_recommendation_is_the_planted_best_or_its_cheaper_tie(numbers):
    table, ties = words.recommendations(numbers, "large")
    assert line(table, words.ADD.label)[1:4] == ["first order at 0", "100 %", "recommended"]
    assert line(table, words.OUT.label)[1:4] == ["first order at 1", "100 %", "recommended"]
    assert line(table, words.KEEP.label)[1::2][:2] == ["first order at ½", "recommended"]
    assert ties == []
    said = page.opening(numbers, ["large", "small"])["leaving one out"]
    assert (said.answer, said.cost) == ("first order at 1", "3")
    assert page.opening(numbers, ["large", "small"])["adding one"].cost == "30; 3"


@pytest.mark.slow
def test_what_other_tasks_would_not_choose_is_a_tie_with_its_members(numbers):
    """Planted: the same choice in 79 % of the resamples, and in 80 %."""
    for share, so in ((0.79, "a tie of 2"), (0.8, "recommended")):
        choices = {"first_order@0.5": share, "path/4": 1 - share}
        held = {"choices": {**numbers["resampled"]["choices"], words.KEEP.label: choices}}
        table, ties = words.recommendations({**numbers, "resampled": held}, "large")
        assert line(table, words.KEEP.label)[3] == so
        assert [tie.split(". ")[0] for tie in ties] == (
            [f"**{words.KEEP.label}**: first order at ½; path, 4 nodes"] if share < 0.8 else []
        )


@pytest.mark.slow
def test_bases_are_not_mixed(numbers):
    """Eight tasks of the one have verdicts, four of the other do not."""
    large, small = (words.comparisons(results.scores_of(numbers), b) for b in ("large", "small"))
    assert "of 8 |" in large
    assert "too few tasks" not in large
    assert "of 4 |" in small
    assert small.count("too few tasks") == small.count("of 4 |")
    text = page.page(numbers)
    assert "large (8 tasks, 16 adapters) and small (4 tasks, 8 adapters)" in text


@pytest.mark.slow
def test_of_the_best_found_is_a_share_of_the_set_found_on_those_prompts(numbers):
    scores = results.scores_of(numbers)
    rows = scores[(scores["metric"] == "of the best found") & (scores["method"] == "path/4")]
    assert rows["value"].to_numpy() == pytest.approx(0.95 / 1.9)
    assert set(rows["prompts"]) == {"paraphrase"}


@pytest.mark.slow
def test_the_page_renders_and_every_base_is_named_without_its_path(numbers):
    text = page.page(numbers)
    assert "24 adapters of 12 training tasks" in text
    assert "somewhere" not in text
    assert "nan" not in text


def test_what_is_packed_joins_what_is_stored(numbers, tmp_path):
    """A newer measurement replaces its own adapter's alone; both versions are told."""
    newer = {**one(0, "large"), "versions": {"lens_lora": "1"}, "sites": 11}
    (tmp_path / "one.json").write_text(json.dumps(newer))
    joined = results.joined(numbers, results.pack(tmp_path))
    assert joined["adapters"]["large-0"]["sites"] == 11
    assert {**joined["adapters"], "large-0": None} == {**numbers["adapters"], "large-0": None}
    assert page.versions(joined) == "lens_lora 1; lens_lora 0"


def test_how_often_a_method_is_ahead_stands_beside_the_verdict(numbers):
    text = words.comparisons(results.scores_of(numbers), "large")
    row = line(text, "path, 4 nodes | first order at ½")
    assert row[4:] == ["tie", "4 of 8"]
    assert line(text, "a + ½H_ll, at 0")[3:] == ["+0.000 (0.000)", "tie", "0 of 8"]


def test_a_call_of_the_path_stops_where_its_tolerance_is_met(numbers):
    """Planted: a sum within 0.1 % at four nodes, at eight, and at neither."""
    rows = {"path/4": [1.001, 1.005, 1.3], "path/8": [1.5, 0.9995, 1.1], "path/2": [1.0] * 3}
    held: dict[str, Any] = {"adapters": {}}
    for index, name in enumerate(("first", "second", "third")):
        one = numbers["adapters"][f"large-{index}"]
        sums = {rule: {"trained": values[index]} for rule, values in rows.items()}
        costs = {**one["costs"], **{f"path/{k}": {"passes": k, "time": k} for k in (2, 4, 8)}}
        scores = {**one["scores"], "sum": {"sum": sums}}
        held["adapters"][name] = {**one, "costs": costs, "scores": scores}
    scores = results.scores_of(held)
    costs = results.costs_of(held)
    called = scores[(scores["method"] == tables.CALLED) & (scores["metric"] == "sum")]
    assert called["value"].tolist() == [1.001, 0.9995, 1.1]
    passes = costs[costs["method"] == tables.CALLED]["passes"].tolist()
    assert passes == [6, 14, 14]
    says = words.path_called(scores, "large")
    assert says.startswith("on 3 adapters")
    assert "at 4 nodes on at most 1, at 8 on about 1" in says
    assert says.endswith("beyond 8 on at least 1")


def test_flags_are_counted_on_the_tasks_that_chose_nothing(numbers):
    cells = line(page.flags(numbers["warned"]), words.OUT.short)
    assert cells[1:6] == ["4", "4 of 8", "1.00", "0.25", "0.40 (0.40)"]


def test_the_warning_that_knows_stands_first_and_its_confusion_is_that_of_other_tasks(numbers):
    """The sixteen adapters of the page choose too: none of theirs is broken."""
    says, table = page.warnings(numbers, results.scores_of(numbers), "large")[:2]
    assert "Broken: 3 of 40 cases (3 adapters) on the tasks that choose, 4 of 8 cases" in says
    first = table.splitlines()[2]
    assert first.startswith("| ‖ΔW‖ / ‖W‖ |")
    assert "3 · 0 · 0 · 37" in first
    assert first.endswith("| 4 · 0 · 0 · 4 |")


def test_what_ranks_a_kl_and_how_its_verdict_fares(numbers):
    table, says = page.kl_ranks(numbers["warned"])
    assert line(table, "½ vᵀFv")[1:4] == ["4", "0.10", "0.10"]
    assert line(table, "path, 2 nodes")[2] == "0.95"
    assert "broken in 8 of 8 cases; their `verdict` says so in 8" in says
    assert "at ½ is within 0.10" in says
    assert "at 1 within 0.30" in says


def test_a_number_is_written_with_the_digits_that_say_something():
    assert tables.span(Summary(2880.75, 33.341, 16961.8, 9e4, 17)) == "2881 [33.34, 16962]"
    assert tables.span(Summary(0.5, 0.0004, 0.75, 1.0, 9)) == "0.50 [0.0004, 0.75]"
    assert tables.span(Summary(-120.4, float("nan"), float("nan"), -130.0, 2)) == "-120"
    assert tables.with_worst(Summary(0.5, 0.25, 0.75, 0.0, 9)) == "0.50 (0.00)"


def test_every_table_of_methods_has_the_median_the_worst_task_and_how_many(numbers):
    table = tables.question_table(results.scores_of(numbers), [words.ADD, words.ADD_ERROR], "large")
    assert line(table, "method")[1:5] == ["tasks", "spearman", "worst", "behind the best"]
    assert line(table, "first order at 0")[1:5] == ["8", "0.95 [0.95, 0.95]", "0.95", "best"]
    far = line(table, "first order at ½")
    assert far[4].startswith("-0.6")
    assert float(far[3]) < 0.31
    small = tables.question_table(results.scores_of(numbers), [words.ADD], "small")
    assert line(small, "method") == ["method", "tasks", "spearman", "worst"]


def test_the_opening_counts_the_adapters_on_which_each_estimate_is_right(numbers):
    """0.95 on every adapter of the question's own method; half of the best fifth on each."""
    said = words.opening(numbers, results.bases_of(numbers))
    assert said["adding one"].right == "16 of 16, 8 of 8"
    assert said["the best fifth"].right == "0 of 16, 0 of 8"
    assert (said["adding one"].off, said["adding one"].adapters_off) == ("none", 0)
    assert "and 13 more; small: " in said["the best fifth"].off
    assert said["what carries it"].right == "—"
    assert said["what carries it"].above_one == "0 of 16"


@pytest.mark.slow
def test_a_second_base_is_told_where_choices_and_levels_carry_over(numbers):
    """Planted: both carry over; then neither, a lower level and another method ahead."""
    held = json.loads(json.dumps(numbers))
    for index in range(16, 24):
        held["adapters"][f"small-{index}"] = {
            **json.loads(json.dumps(held["adapters"][f"small-{index % 8}"])),
            "cluster": f"small task {index // 2}",
        }
    table, (same, apart) = agreed.agreement(held, "large", "small")
    assert line(table, words.ADD.label)[6:] == ["best", "holds", "intervals overlap"]
    assert same.split(" of ")[0] == same.split(" of ")[1]
    assert apart == []
    for one in held["adapters"].values():
        if one["base"] == "small":
            for kind in KINDS:
                one["scores"]["add_one"]["spearman"]["first_order@0"][kind] = 0.5
                one["scores"]["add_one"]["spearman"]["first_order@0.5"][kind] = 0.7
                one["scores"]["keep"]["cpr"]["path/4"][kind] = 0.2
    table, (_, apart) = agreed.agreement(held, "large", "small")
    far = "-0.200 behind first order at ½"
    assert line(table, words.ADD.label)[6:] == [far, "does not", "lower; the worst is worse"]
    assert line(table, words.OUT.label)[7:] == ["holds", "intervals overlap"]
    assert [says.split(" (")[0] for says in apart] == ["path, 4 nodes beside first order at ½"]
    assert apart[0].endswith("(what carries it: cpr): *tie*, there *worse*")
    for one in held["adapters"].values():
        if one["base"] == "small":
            del one["scores"]["keep"]
    lacking, _ = agreed.agreement(held, "large", "small")
    assert line(lacking, words.KEEP.label)[4:] == ["—", "—", "not run", "—", "—"]
    assert page.page(held).count("### Which modules carry the shift") == 1
    few, _ = agreed.agreement(numbers, "large", "small")
    assert line(few, words.ADD.label)[7] == "too few tasks"


@pytest.mark.slow
def test_the_opening_has_sizes_and_other_wordings_beside_ranks(numbers):
    """Planted: an error of 0.5 on one task, numbers half as large; 0.2 on unrelated text."""
    held = json.loads(json.dumps(numbers))
    for name, one in held["adapters"].items():
        if name in ("large-0", "large-1"):
            one["scores"]["add_one"]["error"]["first_order@0"] = dict.fromkeys(KINDS, 0.5)
        elsewhere = {"paraphrase": 0.8, "unrelated": 0.2}
        one["scores"]["add_one/held_out"] = {"spearman": {"first_order@0": elsewhere}}
    said = words.opening(held, ["large", "small"])["adding one"]
    assert (said.error, said.factor, said.elsewhere) == (
        "0.05 (0.50)",
        "2.0",
        "0.80, 0.20",
    )
    text = page.page(held)
    assert "underestimating by a factor of 2.0" in text
    assert "| 0.80, 0.20 |" in text
