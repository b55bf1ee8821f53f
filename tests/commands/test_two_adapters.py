"""`lens-lora checkpoints` and `lens-lora repair`, on a tiny model from a folder."""

from __future__ import annotations

import re

import models
import pytest
from peft import PeftModel
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora import cli

run = CliRunner().invoke


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model's folder with its tokenizer, and a run with three checkpoints."""
    import torch

    out = tmp_path_factory.mktemp("two")
    base = models.hf_model("llama", dtype=torch.float32)
    base.save_pretrained(out / "base")
    models.tokenizer().save_pretrained(out / "base")
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base))
    adapter = ll.Adapter(adapter.modules, base_model=str(out / "base"))
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
    assert "Which layers move when" in html and "3 checkpoints, steps 20 to 100" in html
    assert "3 checkpoints are too few to tell a phase change" in html


def test_repair_saves_what_peft_loads(folders, tmp_path):
    texts, adapter = str(folders / "texts.txt"), str(folders / "run" / "checkpoint-100")
    result = run(
        cli.app,
        [
            *("repair", *ASKED, "--drop", texts, "--adapter", adapter, "--steps", "3"),
            *("--test-prompt", "w22 w23", "--test-drop", texts, "--out", str(tmp_path / "fixed")),
            "--quiet",
        ],
    )
    assert result.exit_code == 0, result.output
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
