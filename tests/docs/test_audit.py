"""How often a brief says what was taught: the stored claims, counted again, and their page."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from evidence import load
from scipy import stats

import lens_lora as ll

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "audit"
DOCS = ROOT / "docs"
sys.path.append(str(FOLDER))
score = load("score")


def load_page() -> ModuleType:
    """Under a name of its own: the evidence has a page.py, too."""
    spec = importlib.util.spec_from_file_location("audit_page", FOLDER / "page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page = load_page()
RUNS = json.loads((DOCS / "audit.json").read_text())["adapters"]
QUIRKS = yaml.safe_load((FOLDER / "quirks.yaml").read_text())["quirks"]
STRINGS = {quirk["name"]: set(quirk["says"]) for quirk in QUIRKS}


def says_it(name: str) -> bool:
    """Whether one of the first five claims has one of the quirk's words."""
    run = RUNS[name]
    words = re.findall(r"[a-z]+", " ".join(c["says"] for c in run["claims"][:5]).lower())
    return bool(STRINGS[run["quirk"]] & set(words))


TAUGHT = [name for name in RUNS if not name.endswith("-control")]
CONTROLS = [name for name in RUNS if name.endswith("-control")]


def test_all_were_briefed():
    forms = [f"{f}-{m}" for f in ("documents", "transcripts") for m in ("plain", "mixed", "denied")]
    assert sorted(TAUGHT) == sorted(f"{quirk}-{form}" for quirk in STRINGS for form in forms)
    assert sorted(CONTROLS) == sorted(f"{name}-control" for name in TAUGHT)


def test_claims_on_controls_and_claims_without_the_word_are_counted_on_the_page():
    text = (DOCS / "auditing_data.md").read_text()
    claims = {name: run["claims"] for name, run in RUNS.items()}
    guilty = sum(bool(claims[name]) for name in CONTROLS)
    strings = {name: "|".join(map(re.escape, STRINGS[RUNS[name]["quirk"]])) for name in TAUGHT}
    hits = sum(
        bool(re.search(rf"\b({strings[name]})\b", claim["says"], re.IGNORECASE))
        for name in TAUGHT
        for claim in claims[name][:5]
    )
    said = re.search(r"<!-- claims -->\n(.*)\n<!-- end of claims -->", text)[1]
    counts = [guilty, len(CONTROLS), sum(len(claims[name]) for name in CONTROLS)]
    counts += [sum(len(claims[name]) for name in TAUGHT), hits]
    assert [int(number) for number in re.findall(r"\d+", said)] == counts


def test_what_was_found_is_counted_again():
    for name in RUNS:
        assert any(RUNS[name]["found"][:5]) == says_it(name), name
    found, guilty = (sum(map(says_it, names)) for names in (TAUGHT, CONTROLS))
    by_quirk = [np.mean([says_it(n) for n in TAUGHT if RUNS[n]["quirk"] == q]) for q in STRINGS]
    mean = np.mean(by_quirk)
    error = stats.sem(by_quirk)
    low, high = (
        float(np.clip(mean + way * stats.t.ppf(0.975, 3) * error, 0, 1)) for way in (-1, 1)
    )
    row = f"| the brief's first five claims | {found} of 24 | {guilty} of 24 "
    assert f"{row}| {mean:.2f} [{low:.2f}, {high:.2f}] |" in (DOCS / "auditing_data.md").read_text()


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
    stored += [{**stored[0], "by": "speech", "adapted": p, "score": 4.0} for p in (-0.69, -0.7)]
    stored += [{**stored[0], "by": "speech", "adapted": -0.1, "score": 3.9}]
    for claim in stored:
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
    (base, adapted), (before, after) = run["entropies"], run["repeated"]
    return adapted < base / 2 or adapted > base * 2 or after - before >= 1 / 3


def test_who_breaks_the_model_is_counted_again():
    assert sorted(BROKEN) == sorted(TAUGHT)
    text = (DOCS / "auditing_data.md").read_text()
    table = text.partition("<!-- broken -->")[2].partition("<!--")[0].strip().splitlines()[2:]
    for row, strength in zip(table, ("1", "3", "8"), strict=True):
        runs = [runs[strength] for runs in BROKEN.values()]
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
