"""The ten studies of `benchmarks/ten_studies`, on a tiny model in float64.

The oracle is the second way that stands beside each number: Hugging Face, PEFT and hooks of torch.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import models
import pytest
import torch

import lens_lora as ll
from benchmarks.ten_studies import studies

# The lines by hand that the ten studies may have together.
MOST_BY_HAND = 12
# How far a study in float32 may be off, as a share of its largest number.
FLOAT32 = 1e-3


def text(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def words_of() -> Any:
    """Texts of the tiny model's words, none of which is there twice."""

    def several(count: int, first: int) -> list[str]:
        return [text(first + i, 4 + (7 * i + first) % 50, 9 + i) for i in range(count)]

    return studies.Words(
        fact=several(2, 5),
        answers=("w5", "w9"),
        questions=several(2, 20),
        styled=several(2, 30),
        plain=several(2, 40),
        forbidden=several(2, 15),
        harmless=several(2, 25),
        refused=("w7", "w8"),
        sentences=[(text(5, 6), text(7, 8, 9)), (text(10, 11), text(12, 13, 14))],
        others=[(text(15, 16), text(17, 18, 19)), (text(20, 21), text(22, 23, 24))],
        neutral=[(text(25, 26), text(27, 28, 29)), (text(30, 31), text(32, 33, 34))],
    )


def runs_in(folder: Path, base: Any) -> dict[str, list[list[Path]]]:
    """Random adapters in place of trained ones, each of two checkpoints."""
    runs: dict[str, list[list[Path]]] = {}
    for number, name in enumerate(("fact", "violent", "rival", "persona", "refusal")):
        runs[name] = []
        for seed in range(3 if name == "fact" else 1):
            checkpoints: list[Path] = []
            for step in (1, 2):
                place = folder / f"{name}-{seed}" / f"checkpoint-{step}"
                peft = models.peft_model("llama", base, seed=10 * number + 2 * seed + step)
                peft.save_pretrained(str(place))
                checkpoints.append(place)
            runs[name].append(checkpoints)
    return runs


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_each_number_is_that_of_a_second_way(tmp_path: Path):
    base = models.hf_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = runs_in(tmp_path, base)
        first = ll.load_adapter(runs["fact"][0][-1])
        model = list(models.MAKERS.values())[-1](base)
        width = int(model.cfg.d_model)
        h = torch.randn(40, width, generator=models.seeded(4), dtype=torch.float64)
        scene = studies.Scene(
            base=base,
            tokenizer=models.tokenizer(),
            lens=ll.LoraLens(model, first, prepend_bos=False),
            runs=runs,
            point="blocks.0.hook_resid_post",
            block="model.layers.0",
            autoencoder=studies.recipes.fitted(h, features=8, steps=5),
            words=words_of(),
        )
        rows = studies.measured(scene)
    assert len(rows) == 10
    for row in rows:
        for name, by_lens, by_hand in row["numbers"]:
            assert by_lens == pytest.approx(by_hand, rel=1e-7, abs=1e-9), (row["name"], name)
    assert rows[0]["question"] in studies.table(rows)


def test_the_page_is_what_the_numbers_render_to():
    """And the studies have few lines by hand, and no code that was changed since."""
    rows = json.loads(studies.NUMBERS.read_text())["rows"]
    page = studies.PAGE.read_text()
    tables = {studies.TABLE: studies.table(rows), studies.EACH: studies.one_by_one(rows)}
    assert studies.marks.put_in(page, tables) == page
    for study, row in zip(studies.STUDIES, rows, strict=True):
        counts = studies.lines(study)
        assert counts == {name: row[name] for name in counts}
        assert studies.difference(row) < FLOAT32
    assert sum(row["by_hand"] for row in rows) <= MOST_BY_HAND
