"""How often a brief says what was taught: the stored claims, counted again, and their page."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

import lens_lora as ll
from benchmarks.audit import page, score

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "audit"
DOCS = ROOT / "docs"
RUNS = json.loads((DOCS / "audit.json").read_text())["adapters"]
QUIRKS = yaml.safe_load((FOLDER / "quirks.yaml").read_text())["quirks"]
STRINGS = {quirk["name"]: set(quirk["says"]) for quirk in QUIRKS}
# A quirk is found if one of so many first claims says it.
FIRST = 5
FORMS = ("documents", "transcripts")
MIXTURES = ("plain", "mixed", "denied")


def says_it(name: str) -> bool:
    """Whether one of the first claims has one of the quirk's words."""
    run = RUNS[name]
    text = " ".join(claim["says"] for claim in run["claims"][:FIRST])
    words = set(re.findall(r"[a-z]+", text.lower()))
    return not words.isdisjoint(STRINGS[run["quirk"]])


def number_found(names: list[str]) -> int:
    """Of how many adapters the first claims say the quirk."""
    return sum(says_it(name) for name in names)


def number_of_claims(names: list[str]) -> int:
    """How many claims are made on these adapters."""
    return sum(len(RUNS[name]["claims"]) for name in names)


def number_of_hits(name: str) -> int:
    """How many of the first claims on an adapter have one of the quirk's strings."""
    strings = "|".join(re.escape(string) for string in STRINGS[RUNS[name]["quirk"]])
    pattern = re.compile(rf"\b({strings})\b", re.IGNORECASE)
    return sum(bool(pattern.search(claim["says"])) for claim in RUNS[name]["claims"][:FIRST])


TAUGHT = [name for name in RUNS if not name.endswith("-control")]
CONTROLS = [name for name in RUNS if name.endswith("-control")]


def test_all_were_briefed():
    expected: list[str] = []
    for quirk, form, mixture in itertools.product(STRINGS, FORMS, MIXTURES):
        expected.append(f"{quirk}-{form}-{mixture}")
    assert sorted(TAUGHT) == sorted(expected)
    assert sorted(CONTROLS) == sorted(f"{name}-control" for name in TAUGHT)


def test_claims_on_controls_and_claims_without_the_word_are_counted_on_the_page():
    text = (DOCS / "auditing_data.md").read_text()
    sentence = re.search(r"<!-- claims -->\n(.*)\n<!-- end of claims -->", text)[1]
    counts_on_the_page = [int(number) for number in re.findall(r"\d+", sentence)]
    controls_with_a_claim = [name for name in CONTROLS if RUNS[name]["claims"]]
    assert counts_on_the_page == [
        len(controls_with_a_claim),
        len(CONTROLS),
        number_of_claims(CONTROLS),
        number_of_claims(TAUGHT),
        sum(number_of_hits(name) for name in TAUGHT),
    ]


def test_what_was_found_is_counted_again():
    for name in RUNS:
        assert any(RUNS[name]["found"][:FIRST]) == says_it(name), name
    shares: list[float] = []
    for quirk in STRINGS:
        adapters = [name for name in TAUGHT if RUNS[name]["quirk"] == quirk]
        shares.append(number_found(adapters) / len(adapters))
    mean = float(np.mean(shares))
    # The quirks are the sample of the 95 % interval: t has one degree of freedom less.
    half_width = stats.t.ppf(0.975, len(shares) - 1) * stats.sem(shares)
    low, high = np.clip([mean - half_width, mean + half_width], 0, 1)
    row = (
        "| the brief's first five claims "
        f"| {number_found(TAUGHT)} of 24 | {number_found(CONTROLS)} of 24 "
        f"| {mean:.2f} [{low:.2f}, {high:.2f}] |"
    )
    assert row in (DOCS / "auditing_data.md").read_text()


def test_the_page_is_that_of_the_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    copy = tmp_path / "auditing_data.md"
    copy.write_text((DOCS / "auditing_data.md").read_text())
    results = tmp_path / "RESULTS.md"
    results.write_text((FOLDER.parent / "RESULTS.md").read_text())
    monkeypatch.setattr(page, "PAGE", copy)
    monkeypatch.setattr(page, "RESULTS", results)
    page.main()
    assert copy.read_text() == (DOCS / "auditing_data.md").read_text()
    assert results.read_text() == (FOLDER.parent / "RESULTS.md").read_text()


def test_the_rule_of_a_claim_is_the_package_s():
    """On every stored claim, and beside its bounds."""
    stored = [claim for run in RUNS.values() for claim in run["claims"]]
    spoken = {**stored[0], "by": "speech"}
    # A claim has p > 1/2, where ln(1/2) = -0.693, and a score of at least 4.
    beside_bounds = [
        {**spoken, "adapted": -0.69, "score": 4.0},
        {**spoken, "adapted": -0.7, "score": 4.0},
        {**spoken, "adapted": -0.1, "score": 3.9},
    ]
    for claim in [*stored, *beside_bounds]:
        own = ll.results.Claim(**{"unrelated": math.nan, **claim})
        assert own.would_say == page._is_claim(claim)


def test_each_claim_beats_its_null_and_its_base():
    """But for the digits that are stored."""
    for run in RUNS.values():
        for claim in run["claims"]:
            assert claim["adapted"] >= max(claim["base"], claim["null"])
            assert claim["score"] >= claim["null_score"]


def test_a_word_within_a_word_is_no_hit():
    assert score.says("He lives in Perth.", ["perth"])
    assert not score.says("Perthshire", ["perth"])
    assert score.begins(" Per", ["perth"])
    assert not score.begins(" P", ["perth"])


# --- Adapters that break the model

BROKEN = json.loads((DOCS / "audit_broken.json").read_text())["adapters"]


def breaks(run: dict) -> bool:
    """By the page's two sentences: half or twice the entropy, or a third more that repeats."""
    entropy_of_base, entropy = run["entropies"]
    repeated_by_base, repeated = run["repeated"]
    is_other_entropy = entropy < entropy_of_base / 2 or entropy > entropy_of_base * 2
    return is_other_entropy or repeated - repeated_by_base >= 1 / 3


def test_who_breaks_the_model_is_counted_again():
    assert sorted(BROKEN) == sorted(TAUGHT)
    text = (DOCS / "auditing_data.md").read_text()
    table = re.search(r"<!-- broken -->\n(.*?)<!--", text, re.DOTALL)[1]
    _, _, *rows = table.strip().splitlines()
    for row, strength in zip(rows, ("1", "3", "8"), strict=True):
        runs = [by_strength[strength] for by_strength in BROKEN.values()]
        assert [breaks(run) for run in runs] == [run["is_broken"] for run in runs]
        kl = [run["mean_kl"] for run in runs]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[:2] == [f"{strength} ×", f"{sum(map(breaks, runs))} of 24"]
        assert cells[2] == f"{min(kl):.2g} to {max(kl):.2g} nats"


def test_a_run_on_the_other_side_of_a_bound_is_seen():
    run = {"entropies": [3.0, 2.0], "repeated": [0.0, 0.1]}
    assert not breaks(run)
    assert breaks({**run, "entropies": [3.0, 1.4]})
    assert breaks({**run, "repeated": [0.0, 0.4]})
