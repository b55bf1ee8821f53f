"""`lens-lora diff`: what it refuses, prints and writes."""

from __future__ import annotations

import json

import models
import pandas as pd
import pytest
from folders import saved_llama
from terminal import plain
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora import cli
from lens_lora.cli import auditing, running

run = CliRunner().invoke


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """A base and two adapters of it, saved."""
    folder = tmp_path_factory.mktemp("diff")
    base = saved_llama(folder / "base")
    for seed, name in enumerate(("one", "two")):
        peft = models.peft_model("llama", base, seed=seed)
        ll.Adapter.from_peft(peft).save(folder / name)
    return folder


@pytest.mark.slow
def test_summary_page_and_numbers(tiny, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("w5 w6 w7 w8\n\nw9 w10 w11\n")
    page, numbers = tmp_path / "diff.html", tmp_path / "diff.csv"
    options = ["--model", str(tiny / "base"), "--texts", str(texts), "--report", str(page)]
    options += ["--unrelated", str(tiny / "two"), "--nulls", "1", "--save", str(numbers)]
    options += ["--json", str(told := tmp_path / "brief.json")]
    result = run(cli.app, ["diff", str(tiny / "one"), *options])
    assert result.exit_code == 0, result.output
    shown = plain(result.stdout)
    assert "On 2 texts of the caller, 5 distinct tokens" in shown
    assert "As a control, its own updates moved to other modules" in shown
    assert "Not tried: " in shown
    assert "promoted by mean logit" in shown and "Report:" in shown and "Numbers:" in shown
    assert "</html>" in page.read_text(encoding="utf-8")
    brief = json.loads(told.read_text(encoding="utf-8"))
    assert brief["schema"] == "lens_lora.brief/2" and " ".join(brief["verdict"].split()) in shown
    frame = pd.read_csv(numbers)
    assert {"where", "module", "promoted by logit"} <= set(frame["finding"])
    whole = tmp_path / "diff.safetensors"
    fast = ["--fast", "--nulls", "0", "--quiet", "--save", str(whole)]
    result = run(cli.app, ["diff", str(tiny / "one"), *options[:6], *fast])
    assert result.exit_code == 0 and "modules with most of the KL" not in result.stdout
    assert ll.results.WhatChanged.load(whole).found.name == "one"


def test_options_that_cannot_work_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "load_model", None)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for options, message in (
        (["no/such/adapter"], "no/such/adapter"),
        (["x", "--report", "/dev/null/x.html"], "cannot be made in /dev/null"),
        (["x", "--json", "/dev/null/x.json"], "cannot be made in /dev/null"),
        (["x", "--save", "x.txt"], "a .csv or .safetensors file"),
        (["x", "--texts", str(empty)], "holds no text"),
        (["x", "--nulls", "-1"], "for '--nulls'"),
    ):
        result = run(cli.app, ["diff", *options])
        assert result.exit_code == 2 and message in plain(result.stderr), message


@pytest.mark.parametrize(
    ("fast", "named", "expected"),
    [
        (False, None, ["128 empty prompts", "288 short turns", "questions with trigger words"]),
        (True, None, []),
        (True, ["cf"], ["questions with trigger words"]),
    ],
    ids=["in full", "fast", "fast, with words"],
)
def test_the_first_screen_names_what_is_asked_next(
    fast: bool, named: list[str] | None, expected: list[str]
):
    """It said that nothing stands out, while short turns that claim something were still asked."""
    how = auditing._How(nulls=0, fast=fast, quiet=True)
    asked_next = how.asked_next(how.words(named))
    assert len(asked_next) == len(expected)
    assert all(text.startswith(start) for text, start in zip(asked_next, expected, strict=True))
