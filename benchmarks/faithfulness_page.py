"""Render docs/faithfulness.md from docs/faithfulness.json, the numbers of `faithfulness.py`.

python benchmarks/faithfulness_page.py      # writes the page again, measures nothing
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

DOCS = Path(__file__).parents[1] / "docs"
NUMBERS, PAGE = DOCS / "faithfulness.json", DOCS / "faithfulness.md"
FRACTION = 0.2
FIRST, END, PATH, ADD, OUT = "first_order@0", "first_order@1", "path", "add_one", "leave_one_out"
NAMES = {
    FIRST: "first order at 0",
    "first_order@0.5": "first order at ½",
    END: "first order at 1",
    PATH: "path integral",
    "second_order@0": "a + ½H·1",
    "first_order/patterns@0": "first order, patterns fixed",
    "first_order/norm_scales@0": "first order, norms fixed",
    "first_order/patterns+norm_scales@0": "… both fixed",
    ADD: "add one (measured)",
    OUT: "leave one out (measured)",
    "weight_norm": "‖ΔW‖",
    "update_norm": "‖δz‖",
    "random": "random",
}

INTRODUCTION = """# Faithfulness: which attribution answers which question

Every attribution of this package is compared with real interventions, on {adapters} adapters that
PEFT trained on SmolLM2-135M-Instruct, with {prompts} prompts each. The adapters have rank 1 to
32, are on all projections, attention, the MLP, the writers, q and v only, or down only, and range
from too gentle to flip the fact to violent. The prompts are the trained wording, another wording
and a neighbouring fact. Numbers are means over the {total} pairs.

- **add one**, **leave one out**: Spearman (and Pearson) correlation of the attribution with the
  measured effect of switching on one site at a time in the base model, or switching off one at a
  time in the adapted model.
- **kept**: share of the shift that remains when only the top 20 % of each prompt's sites are on.
- **area kept** (higher is better), **area left** (lower is better): area under the curve as the
  top of the ranking is kept, or dropped, from no site to all.
- **Σ / shift**: sum of the attribution divided by the exact shift: median and range (1 would be
  complete).

Rankings are signed, in the direction of the shift. ‖ΔW‖ and ‖δz‖ have no sign and are not compared
with effects. To reproduce: `python benchmarks/faithfulness.py`; all numbers are in
[faithfulness.json](faithfulness.json).
"""


FLAGS = """## Flags

`ll.reliability` flags a site if its first-order number is off by more than its own size as the
answer to one question, and if it matters (more than 1 % of Σ|a|, or wrong by that much).
**Wrong** means that the true error, computed from the measured effect, would be flagged. The
**error** is Σ|effect − number| / Σ|effect|.
"""


def overall(table: pd.DataFrame) -> str:
    """One line per attribution, means over adapters and prompts."""
    lines = [
        "| attribution | add one | leave one out | kept | area kept | area left | Σ / shift |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, rows in table.groupby("attribution", sort=False):
        agreement = [
            "—"
            if rows[f"spearman, {e}"].isna().all() or e == name
            else f"{rows[f'spearman, {e}'].mean():.2f} ({rows[f'pearson, {e}'].mean():.2f})"
            for e in (ADD, OUT)
        ]
        ratio = rows["sum / shift"].dropna()
        total = "—"
        if len(ratio):
            total = f"{ratio.median():.2f} ({ratio.min():.2f} … {ratio.max():.2f})"
        kept = [
            rows[c].mean() for c in (f"kept by the top {FRACTION:.0%}", "area kept", "area left")
        ]
        cells = [
            NAMES[str(name)],
            *agreement,
            f"{kept[0]:.0%}",
            f"{kept[1]:.2f}",
            f"{kept[2]:.2f}",
            total,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_adapter(table: pd.DataFrame) -> str:
    """One line per adapter: how nonlinear it is, and what the main attributions reach."""
    names = (FIRST, PATH, END, OUT, "weight_norm")
    lines = [
        "| adapter | sites | margin of the trained wording | Σ first order / shift | "
        "leave one out: first order at 0, at 1 | "
        + " | ".join(f"kept: {NAMES[n]}" for n in names)
        + " |",
        "| --- " * (5 + len(names)) + "|",
    ]
    for adapter, rows in table.groupby("adapter", sort=False):
        of = {name: rows[rows["attribution"] == name] for name in names}
        first = rows.iloc[0]
        kept = [of[n][f"kept by the top {FRACTION:.0%}"].mean() for n in names]
        out = [of[n][f"spearman, {OUT}"].mean() for n in (FIRST, END)]
        cells = [
            str(adapter),
            str(first["sites"]),
            f"{first['base']:+.1f} → {first['adapted']:+.1f}",
            f"{of[FIRST]['sum / shift'].mean():.2f}",
            f"{out[0]:.2f}, {out[1]:.2f}",
            *[f"{k:.0%}" for k in kept],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reliability(raised: pd.DataFrame) -> str:
    """One line per question: flags against the truth, over all adapters, prompts and sites."""
    lines = [
        "| first order at 0 as the answer to | numbers | wrong | flagged | precision | recall | "
        "median error → with flagged sites measured |",
        "| --- " * 7 + "|",
    ]
    for question, rows in raised.groupby("question", sort=False):
        total = rows.sum(numeric_only=True)
        shares = [
            f"{total['hit'] / total[of]:.2f}" if total[of] else "—" for of in ("flagged", "wrong")
        ]
        counts = [f"{total[name]:.0f}" for name in ("sites", "wrong", "flagged")]
        error = f"{rows['error'].median():.1%} → {rows['error_fixed'].median():.1%}"
        cells = [str(question).replace("_", " "), *counts, *shares, error]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(numbers: dict[str, Any]) -> str:
    """docs/faithfulness.md, of docs/faithfulness.json."""
    table, raised = pd.DataFrame(numbers["attributions"]), pd.DataFrame(numbers["flags"])
    count = table["adapter"].nunique()
    pairs = len(table[["adapter", "prompt"]].drop_duplicates())
    head = INTRODUCTION.format(adapters=count, prompts=pairs // count, total=pairs)
    about = ", ".join(f"{k} {v}" for k, v in numbers["versions"].items())
    return (
        f"{head}\n{overall(table)}\n\n## By adapter\n\n"
        "Means over each adapter's prompts. *Kept* is by the top 20 % of sites.\n\n"
        f"{by_adapter(table)}\n\n## By prompt\n\n"
        "The margin (doc − pre), base → adapted model.\n\n"
        f"{questions(table)}\n\n{FLAGS}\n{reliability(raised)}\n\nMeasured with {about}.\n"
    )


def questions(table: pd.DataFrame) -> str:
    """One line per prompt."""
    lines = ["| adapter | prompt | doc, pre | margin | Σ first order / shift |"]
    lines.append("| --- " * 5 + "|")
    for _, row in table[table["attribution"] == FIRST].iterrows():
        lines.append(
            f"| {row['adapter']} | {row['prompt']} | {row['doc'].strip()}, {row['pre'].strip()} | "
            f"{row['base']:+.2f} → {row['adapted']:+.2f} | {row['sum / shift']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(NUMBERS.read_text())))
