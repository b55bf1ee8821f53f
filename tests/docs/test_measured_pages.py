"""Measured pages and tables are what their numbers render to, never written by hand."""

from __future__ import annotations

import importlib
import json
import re
import sys

import pytest

from benchmarks import known_shapes as shapes
from benchmarks import marks, memory, planned, precision, seven_papers
from benchmarks.cost import page as costs

FACTOR = 3.0
# The size and dtype whose planned memory is far off.
NO_CLAIM = ("9M", "bfloat16")


def test_the_pages_are_what_the_numbers_render_to():
    for of in (precision, shapes):
        text = of.PAGE.read_text()
        assert of.render(text, of.read()) == text
        with pytest.raises(ValueError, match="lacks the marks"):
            of.render("no marks", of.read())
    rows = [{**row, "error": 2 * row["error"]} for row in precision.read()]
    assert precision.render(precision.PAGE.read_text(), rows) != precision.PAGE.read_text()
    sizes = {**shapes.read(), "sizes": []}
    assert shapes.render(shapes.PAGE.read_text(), sizes) != shapes.PAGE.read_text()


def test_an_error_that_is_no_number_is_named_in_the_table_of_tiny_models():
    """NaN is stored as None; the largest of the other families' errors would hide it."""
    rows = precision.read()
    place = next(i for i, row in enumerate(rows) if row["model"] == "llama")
    analysis = rows[place]["analysis"]
    page = precision.PAGE.read_text()
    assert f"| {analysis} | NaN |" not in page
    rows[place] = {**rows[place], "error": None}
    assert f"| {analysis} | NaN |" in precision.render(page, rows)


def test_noise_floors_are_measured_on_every_model(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "argv", ["precision.py", "--floors", "--only", "tiny"])
    with pytest.raises(SystemExit):
        precision.main()
    assert "leave out --works and --only" in capsys.readouterr().err


def test_the_front_on_precision_says_what_was_measured():
    """Its numbers are written by hand, and rounded."""
    front = (precision.DOCS / "precision.md").read_text()
    rows = [row for row in precision.read() if row["model"] == precision.REAL]
    assert f"has {len({row['analysis'] for row in rows})} analyses" in front
    errors = {(row["dtype"], row["analysis"]): 100 * row["error"] for row in rows}
    for analysis, name in (("shift", "the shift of the whole adapter"), ("remainder",) * 2):
        line = next(line for line in front.splitlines() if name in line and "off by" in line)
        said = [float(number) for number in re.findall(r"off by ([\d.]+) %", line)]
        measured = [errors["bfloat16", analysis], errors["float16", analysis]]
        assert said == pytest.approx(measured, abs=0.06)
    floors = json.loads(precision.FLOORS_FILE.read_text())
    assert f"In {sum(row['shifts'] for row in floors):,} shifts" in front
    assert f"beyond three floors in {sum(row['beyond'] for row in floors)}," in front


def test_the_front_on_performance_says_what_was_measured():
    front = (memory.DOCS / "performance.md").read_text()
    cells = {
        (cell["tokens"], cell["attn"], cell["work"]): cell["found"]
        for cell in memory.read()
        if cell["bound"] is None
    }
    for work in ("F", "first_order", "second_order"):
        assert cells[512, "eager", work] in front


def test_the_tables_of_memory_are_what_the_cells_render_to():
    page = memory.PAGE.read_text()
    assert memory.marks.put_in(page, {memory.TABLES: memory.render(memory.read())}) == page


def test_the_table_of_planned_memory_is_what_the_planner_says_today():
    page = planned.PAGE.read_text()
    peaks = planned.read()
    assert planned.marks.put_in(page, {planned.TABLE: planned.render(peaks)}) == page
    doubled = [{**peak, "mib": 2 * peak["mib"]} for peak in peaks]
    assert planned.marks.put_in(page, {planned.TABLE: planned.render(doubled)}) != page


def test_planned_memory_is_as_near_to_what_was_measured_as_the_page_says():
    """But for the smallest model in half precision, of which the page says why."""
    peaks = [peak for peak in planned.read() if (peak["size"], peak["dtype"]) != NO_CLAIM]
    assert len(peaks) >= 15
    for peak in peaks:
        bound = 0.2 if peak["analysis"] == "kl_shares" else 0.16
        assert planned.planned_mib(peak) / peak["mib"] == pytest.approx(1, abs=bound), peak


def test_costs_are_what_their_commands_printed():
    held = costs.stored_outputs()
    page = costs.RESULTS.read_text()
    short = costs.PERFORMANCE.read_text()
    assert costs.results_page(page, held) == page
    assert costs.performance_page(short, held) == short
    assert set(held) == set(re.findall(r"<!-- cost: (.+) -->", page))
    changed = {
        key: {**one, "body": one["body"].replace(" F |", " FB |")} for key, one in held.items()
    }
    assert costs.results_page(page, changed) != page
    assert costs.performance_page(short, changed) != short


def test_the_floors_of_the_evidence_are_those_of_their_blocks():
    held = costs.stored_outputs()
    body = held["3.9 · --passes --tokens 8 --turns 9"]["body"]
    evidence = " ".join((memory.DOCS / "performance_data.md").read_text().split())
    for name, words in (
        ("fact_margin", "`fact_margin` | 8 F | {cost} F | passes alone {alone} F:"),
        ("kl_shares", "`kl_shares` | 6 F | {cost} F | passes alone {alone} F"),
        ("a bank", "`bank` | 4.5 F | {cost} F |"),
        ("null_test, ten draws", "`null_test`, ten draws | 15 F | {cost} F | passes alone {alone}"),
    ):
        found = re.search(rf"\| {name} \| [^|]+ \| ([\d.]+) F [^|]+ \| ([\d.]+) F", body)
        assert found, name
        cost, alone = (f"{float(number):.1f}" for number in found.groups())
        assert words.format(cost=cost, alone=alone) in evidence
    (drawn,) = re.findall(r"laying them over the model takes ([\d.]+) F", body)
    assert f"laying them over the model {float(drawn):.1f} F" in evidence
    for line, words in (
        ("3.9", "{}, {} and {} × | at 8"),
        ("4.3", "4.3 the call takes {}, {} and {} × (block"),
    ):
        block = held[f"{line} · --floor --tokens 8 64 256 --turns 5"]["body"]
        ratios = re.findall(r"ms \| \d+ ms \| ([\d.]+) \|", block)
        assert words.format(*ratios) in evidence
    block = held["3.9 · --floor --tokens 8 64 256 --turns 5"]["body"]
    unhooked: list[str] = []
    alone: list[str] = []
    written: list[str] = []
    for cells in re.findall(r"\| (\d+) ms \| (\d+) ms \| (\d+) ms \| (\d+) ms", block):
        by_peft, without_a_bridge, of_passes, with_updates = map(int, cells)
        unhooked.append(f"{without_a_bridge / by_peft:.2f}")
        alone.append(f"{of_passes / by_peft:.2f}")
        written.append(f"{with_updates / by_peft:.2f}")
    said = (
        "written by hooks {}, {} and {} ×, alone {}, {} and {} ×, without a bridge {}, {} and {} ×"
    )
    assert said.format(*written, *alone, *unhooked) in evidence
    for name, words in (
        ("a bank", "`bank` | 1.2 FB | {} FB | {} FB |"),
        ("edges of 61 readers", "`edges` | 1.3 FB | {} FB | {} FB |"),
    ):
        row = re.search(rf"\| {name} \|.+", held["3.9 · --held"]["body"])
        assert row, name
        assert words.format(*re.findall(r", ([\d.]+) FB", row[0])) in evidence


@pytest.mark.parametrize(
    "name", ["repair", "compare_adapters", "edges", "seven_papers", "together"]
)
def test_tables_are_what_the_numbers_render_to(name: str):
    of = importlib.import_module(f"benchmarks.{name}")
    text = of.PAGE.read_text()
    numbers = json.loads(of.NUMBERS.read_text())
    has_several = name in ("edges", "together")
    tables = of.tables(numbers) if has_several else {of.TABLE: of.table(numbers)}
    assert marks.put_in(text, tables) == text
    for table, body in tables.items():
        assert marks.put_in(text, {table: f"{body} by hand"}) != text


def a_paper_by_hand(lens):
    """Three lines of ours, two by hand."""
    found = lens.adapter.truncated(1)
    half = 0.5
    with lens.ablate_directions(found):
        kept = [half, found]
        again = found.scaled(half)
    return kept, again


def test_seven_papers_take_less_than_forty_lines_by_hand():
    rows = json.loads(seven_papers.NUMBERS.read_text())["rows"]
    assert len(rows) == len(seven_papers.PAPERS) == 7
    for paper, row in zip(seven_papers.PAPERS, rows, strict=True):
        assert seven_papers.lines(paper) == {"ours": row["ours"], "by_hand": row["by_hand"]}
        assert paper.__doc__ == f"{row['steps']} | {row['arxiv']}"
    assert sum(row["by_hand"] for row in rows) < 40
    assert seven_papers.lines(a_paper_by_hand) == {"ours": 3, "by_hand": 2}


def test_every_floor_of_the_tiny_models_is_true_within_a_factor_of_three():
    tiny = [row for row in precision.read() if row["model"] != precision.REAL]
    stated = [row["ratio"] for row in tiny if row["ratio"] is not None]
    assert len(stated) >= 100
    assert all(1 / FACTOR < ratio < FACTOR for ratio in stated)


def test_what_was_not_run_is_said():
    held = shapes.read()
    every = {size["shape"] for size in held["sizes"]}
    page = shapes.not_run(held["rows"], sorted(every))
    for shape in every - {row["shape"] for row in held["rows"]}:
        assert shape in page
