"""Tables of a terminal: numbers stay whole, text wraps, nothing is wider than the terminal."""

from __future__ import annotations

import pandas as pd
import pytest
import rich.table
from results_by_hand import flip_case, two_prompts
from terminal import faults, shown

from lens_lora.show.tables import Table, table_of
from lens_lora.show.text import cut_in_the_middle
from lens_lora.views.tables import margin_table, modules_table, prompts_table
from lens_lora.views.words import margin_numbers

WORD = "blocks.27.mlp.down_that_is_long"
LONG = " ".join(["<|im_start|>⟦The⟧ kettle began", WORD, "to whistle"] * 2)
PROMOTED = "' most' +0.052, ' capital' +0.024"
LARGEST = tuple((f"+{i}.123", "−1.5e-05", "100%", "12") for i in range(3))
WIDE = {
    "where": Table(
        ("after ⟦token⟧", "KL, nats", "promoted there", "null", "unrelated"),
        [(LONG, kl, PROMOTED, null, other) for kl, null, other, _ in LARGEST],
        texts=(0, 2),
    ),
    "modules": Table(
        ("site", "module", "value", "of the shift"),
        [(WORD, f"model.{WORD}", value, share) for value, _, share, _ in LARGEST],
        texts=(0, 1),
    ),
    "numbers": Table(
        ("rank", *(f"a rather long heading {i}" for i in range(6))),
        [(rank, *[value] * 6) for value, _, _, rank in LARGEST],
        texts=(),
    ),
    "wide letters": Table(("token", "logits"), [("東京" * 40, "+1.00")]),
}  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 100, 160])
@pytest.mark.parametrize("table", WIDE.values(), ids=WIDE)
def test_a_table_holds_its_columns(table: Table, width: int):
    assert faults(table, shown(table, width), width) == []


def test_every_table_of_a_result_holds_its_columns():
    tables = [
        margin_table(margin_numbers(flip_case())),
        modules_table(flip_case().attribution, k=9),
        prompts_table(two_prompts()),
    ]
    for width in (80, 100, 160):
        assert [faults(table, shown(table, width), width) for table in tables] == [[]] * 3


def test_a_column_one_letter_wide_is_seen():
    """Control: as rich itself would lay it out, with numbers that may be folded."""
    table = rich.table.Table(*WIDE["where"].heads)
    for row in WIDE["where"].rows:
        table.add_row(*row)
    assert faults(WIDE["where"], shown(table, 40), 40)


def test_rows_of_zeros_are_counted():
    frame = pd.DataFrame({"site": ["a", "b", "c"], "value": [1.0, 0.0, 0.0], "share": [1.0, 0, 0]})
    heads = {"site": "site", "value": "value", "share": "of all"}
    table = table_of(frame, heads, title="largest")
    assert [row[0] for row in table.rows] == ["a"]
    assert table.title == "largest (2 that are zero left out)"
    assert table_of(frame[:1], heads, title="largest").title == "largest"


@pytest.mark.parametrize(("width", "cut"), [(9, "abcd…"), (40, "abcdefghijklmnopqrstuvwxyz")])
def test_long_words_are_cut_in_the_middle(width: int, cut: str):
    word = "abcdefghijklmnopqrstuvwxyz"
    text = cut_in_the_middle(word, width)
    assert len(text) == min(width, 26)
    assert text.startswith(cut)
    assert text.endswith("wxyz")
