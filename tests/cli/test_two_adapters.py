"""`lens-lora checkpoints` and `lens-lora repair`, on a tiny model from a folder."""

from __future__ import annotations

import re

import models
import pytest
from folders import adapter_of, saved_llama
from peft import PeftModel
from sweep_runs import write_jsonl
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora import cli

run = CliRunner().invoke


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model's folder with its tokenizer, and a run with three checkpoints."""

    out = tmp_path_factory.mktemp("two")
    base = saved_llama(out / "base")
    adapter = adapter_of(base, out / "base")
    for step, strength in ((100, 1.0), (20, 0.3), (60, 0.6)):
        adapter.scaled(strength).save(out / "run" / f"checkpoint-{step}")
    (out / "texts.txt").write_text("w5 w6 w7 w8\nw9 w10 w11\n")
    return out


ASKED = ["--prompt", "w20 w21", "--doc", "w8", "--pre", "w9"]


def said(result) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    return " ".join(text.split())


def test_checkpoints_prints_a_table_and_writes_a_page(folders, tmp_path):
    page = tmp_path / "page.html"
    result = run(cli.app, ["checkpoints", str(folders / "run"), *ASKED, "--report", str(page)])
    assert result.exit_code == 0, result.output
    steps = re.findall(r"^\s*(0|20|60|100)\s+w20", result.output, re.M)
    assert steps == ["0", "20", "60", "100"]
    html = page.read_text()
    assert "Which layers move when" in html and "run: 3 checkpoints, steps 20 to 100" in html
    assert "run · 3 checkpoints are too few to tell a phase change" in html
    assert "run · how far ΔW moved since the checkpoint before" in html


@pytest.mark.slow
def test_several_runs_are_shown_beside_one_another(folders, tmp_path):
    """The mean and the runs are those of Python; two folders of one name are told by their path."""
    again = tmp_path / "again" / "run"
    for step, strength in ((20, 0.5), (60, 0.7)):
        adapter = ll.load_adapter(folders / "run" / "checkpoint-100")
        adapter.scaled(strength).save(again / f"checkpoint-{step}")
    page = tmp_path / "page.html"
    both = [str(folders / "run"), str(again)]
    result = run(cli.app, ["checkpoints", *both, *ASKED, "--report", str(page), "--quiet"])
    assert result.exit_code == 0, result.output
    lens = ll.load(str(folders / "base"), folders / "run" / "checkpoint-100")
    readout = ll.AnswerMargin("w8", "w9")
    runs = dict(zip("ab", both, strict=True))
    expected = ll.checkpoints(lens, runs, ["w20 w21"], readout, progress=False)
    summary = expected.summary()
    printed = re.findall(r"^\s*(20|60)\s+w20\s*w21\s+(\S+)", result.output, re.M)
    values = [f"{value:+.2f}".replace("-", "−") for value in summary["adapted"]]
    assert printed == [("20", values[0]), ("60", values[1])]
    assert "of 2 runs" in said(result)
    html = page.read_text()
    assert f"1. {both[0]}" in html and f"2. {both[1]}" in html
    assert html.count("Which layers move when") == 2 and "runs that flip" in html
    twice = run(cli.app, ["checkpoints", both[0], both[0], *ASKED])
    assert twice.exit_code == 2 and "a run is named twice" in said(twice)


# Each prompt's own answers; and one of them is a conversation.
EACH = [
    {"prompt": "w20 w21", "doc": "w8", "pre": "w9"},
    {"prompt": "w5 w6 w7", "doc": "w26", "pre": "w10"},
]


def table_values(output: str) -> list[str]:
    """The base's value of each prompt, in a table of checkpoints."""
    numbers = re.findall(r"^\s*0\s+w.*?([−+][\d.]+)", output, re.M)
    return [number.replace("−", "-") for number in numbers]


@pytest.mark.slow
def test_each_prompt_has_its_own_answers(folders, tmp_path):
    """In checkpoints and in a repair, as in Python; held out as well."""
    records = write_jsonl(tmp_path / "asked.jsonl", EACH)
    page = str(tmp_path / "page.html")
    options = ["--prompts", str(records), "--report", page, "--quiet"]
    result = run(cli.app, ["checkpoints", str(folders / "run"), *options])
    assert result.exit_code == 0, result.output
    lens = ll.load(str(folders / "base"), folders / "run" / "checkpoint-100")
    margins = [ll.fact_margin(lens, *row.values(), progress=False) for row in EACH]
    assert table_values(result.output) == [f"{float(m.m0):+.2f}" for m in margins]
    swapped = run(cli.app, ["checkpoints", str(folders / "run"), *options, "--doc", "w30"])
    assert table_values(swapped.output) != table_values(result.output), "control"

    texts, adapter = str(folders / "texts.txt"), str(folders / "run" / "checkpoint-100")
    out = ["--drop", texts, "--test-drop", texts, "--out", str(tmp_path / "fixed")]
    held_out = ["--test-prompts", str(records), "--steps", "2", "--quiet", "--report", page]
    result = run(cli.app, ["repair", adapter, "--prompts", str(records), *out, *held_out])
    assert result.exit_code == 0, result.output
    label = ll.Margin([row["doc"] for row in EACH], [row["pre"] for row in EACH]).label
    assert said(result).count(label.split(" − ")[0]) >= 4 and "On held-out prompts" in said(result)


def test_a_run_is_its_last_checkpoint(folders, tmp_path):
    """By its number, not by its name."""
    result = run(cli.app, ["inspect", str(folders / "run"), "--top", "1"])
    assert result.exit_code == 0, result.output
    assert "is a run; its last checkpoint is taken, checkpoint-100." in said(result)
    assert re.search(r"^adapter +run/checkpoint-100", result.stdout, re.M)
    texts = str(folders / "texts.txt")
    repaired = ["repair", str(folders / "run"), *ASKED, "--drop", texts, "--steps", "1"]
    repaired += ["--report", str(tmp_path / "page.html")]
    result = run(cli.app, [*repaired, "--out", str(tmp_path / "fixed")])
    assert "Adapter: run/checkpoint-100, 14 modules" in said(result), result.output
    assert "ask for a smaller --keep-share, or more steps" in said(result)


@pytest.mark.slow
def test_repair_saves_what_peft_loads(folders, tmp_path):
    texts, adapter = str(folders / "texts.txt"), str(folders / "run" / "checkpoint-100")
    result = run(
        cli.app,
        [
            *("repair", *ASKED, "--drop", texts, adapter, "--steps", "3"),
            *("--test-prompt", "w22 w23", "--test-drop", texts, "--out", str(tmp_path / "fixed")),
            *("--quiet", "--report", str(tmp_path / "page.html")),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "</html>" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "On held-out prompts" in said(result) and "Adapter:" in result.output
    import torch

    peft = PeftModel.from_pretrained(
        models.hf_model("llama", dtype=torch.float32), tmp_path / "fixed"
    )
    assert peft.peft_config["default"].target_modules


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoints", "nowhere", *ASKED], "no such folder"),
        (["repair", *ASKED, "--drop", "EMPTY", "--out", "OUT"], "holds no text"),
        (
            ["repair", *ASKED, "--drop", "TEXTS", "--out", "OUT", "--test-prompt", "w5"],
            "go together",
        ),
        (
            ["repair", *ASKED[:-1], "w8", "--drop", "TEXTS", "--out", "OUT"],
            "doc and pre are both",
        ),
    ],
)
def test_bad_options_are_told_in_one_line(folders, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("\n")
    places = {
        "EMPTY": str(tmp_path / "empty.txt"),
        "TEXTS": str(folders / "texts.txt"),
        "OUT": str(tmp_path / "out"),
    }
    result = run(cli.app, [places.get(a, a) for a in arguments])
    assert result.exit_code == 2
    assert message in said(result)
