"""Which attribution answers which question? Every attribution against real interventions.

    python benchmarks/faithfulness.py [--adapters FOLDER]

1. Train the adapters of `benchmarks/adapters.py` by PEFT on SmolLM2-135M-Instruct (a minute each;
   kept in FOLDER if one is given).
2. For each adapter and prompt: every attribution of the fact margin, the exact effect of adding
   each site alone, of leaving each one out, and of keeping or dropping the top of each ranking.
3. Write docs/faithfulness.md, and all numbers to docs/faithfulness.json.

About half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from adapters import ADAPTERS, Trained

import lens_lora as ll
from lens_lora._version import versions
from lens_lora.answers import margin_between
from lens_lora.demo.embedded import load_embedded
from lens_lora.demo.hooked import hooked_model

DOCS = Path(__file__).parents[1] / "docs"
FRACTION = 0.2
FIRST, HALF, END = "first order at 0", "first order at ½", "first order at 1"
PATH, SECOND = "path integral", "a + ½H·1"
ADD, OUT = "add one (measured)", "leave one out (measured)"
PATTERNS, NORMS, BOTH = "first order, patterns fixed", "first order, norms fixed", "… both fixed"
Row = dict[str, Any]
BASELINES = ("‖ΔW‖", "‖δz‖", "random")


def attributions(lens: ll.LoraLens, prompts: list[str], readout: ll.Readout) -> dict[str, Any]:
    """Every attribution of the same prompts."""
    first = {at: ll.first_order(lens, prompts, readout, at=at) for at in (0.0, 0.5, 1.0)}
    fixed = {
        PATTERNS: ll.FrozenRules(attention_patterns=True),
        NORMS: ll.FrozenRules(norm_scales=True),
        BOTH: ll.FrozenRules(attention_patterns=True, norm_scales=True),
    }
    return {
        FIRST: first[0.0],
        HALF: first[0.5],
        END: first[1.0],
        PATH: ll.path_attribution(lens, prompts, readout, progress=False),
        SECOND: ll.second_order(lens, prompts, readout, progress=False).attribution(),
        **{name: ll.first_order(lens, prompts, readout, rules=r) for name, r in fixed.items()},
    }


def measure(spec: Trained, lens: ll.LoraLens) -> list[Row]:
    """One row per prompt and attribution."""
    prompts, docs, pres = (list(column) for column in zip(*spec.questions, strict=True))
    readout = margin_between(lens.model, docs, pres, len(prompts))
    found = attributions(lens, prompts, readout)
    effects = {
        name: ll.patch_sites(lens, prompts, readout, how, progress=False)
        for name, how in ((ADD, "add_one"), (OUT, "leave_one_out"))
    }
    curves = ll.faithfulness(lens, prompts, readout, {**found, **effects}, progress=False)
    rows: list[Row] = []
    for name in curves.names:
        score = {**found, **effects}.get(name)
        agreement = {
            key: None if score is None else ll.compare(score, effect, bootstrap=0).per_prompt
            for key, effect in effects.items()
        }
        for i, (prompt, doc, pre) in enumerate(spec.questions):
            row: Row = {"adapter": spec.name, "prompt": prompt, "doc": doc, "pre": pre}
            row |= {"attribution": name, "sites": len(lens.sites)}
            row |= {"base": float(curves.base[i]), "adapted": float(curves.adapted[i])}
            if isinstance(score, ll.Attribution):
                row["sum / shift"] = float(score.total[i] / score.shift[i])
            for key, stats in agreement.items():
                for stat in ("pearson", "spearman") if stats is not None else ():
                    row[f"{stat}, {key}"] = float(stats[stat][i])
            row[f"kept by the top {FRACTION:.0%}"] = curves.kept_share(name, FRACTION)[i]
            row["area kept"] = float(curves.area_keep[curves.names.index(name), i])
            row["area left"] = float(curves.area_drop[curves.names.index(name), i])
            rows.append(row)
    return rows


INTRODUCTION = """# Faithfulness: which attribution answers which question

Every attribution of this package against real interventions, on {adapters} adapters that PEFT
trained on SmolLM2-135M-Instruct (rank 1 to 32; all projections, attention, MLP, writers, q and v
alone, down alone; from too gentle to flip the fact to violent) × {prompts} prompts each (the
trained wording, another wording, a neighbouring fact). Numbers are means over the {total} pairs.

- **add one**, **leave one out**: Spearman (and Pearson) correlation of the attribution with the
  measured effect of switching each site on alone in the base model, or off alone in the adapted
  one.
- **kept**: share of the shift that remains when only the top 20 % of each prompt's sites are on.
- **area kept** (higher is better), **area left** (lower is better): under the curves of keeping,
  and of dropping, the top of the ranking, from no site to all.
- **Σ / shift**: what the attribution's sum is of the exact shift, which should be 1: median and
  range.

Rankings are signed, in the direction of the shift. ‖ΔW‖ and ‖δz‖ have no sign and are not compared
with effects. To reproduce: `python benchmarks/faithfulness.py`; all numbers are in
[faithfulness.json](faithfulness.json).
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
        cells = [str(name), *agreement, f"{kept[0]:.0%}", f"{kept[1]:.2f}", f"{kept[2]:.2f}", total]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_adapter(table: pd.DataFrame) -> str:
    """One line per adapter: how nonlinear it is, and what the main attributions reach."""
    names = (FIRST, PATH, END, OUT, "‖ΔW‖")
    lines = [
        "| adapter | sites | margin of the trained wording | Σ first order / shift | "
        "leave one out: first order at 0, at 1 | " + " | ".join(f"kept: {n}" for n in names) + " |",
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


def page(table: pd.DataFrame) -> str:
    """docs/faithfulness.md."""
    count = table["adapter"].nunique()
    pairs = len(table[["adapter", "prompt"]].drop_duplicates())
    head = INTRODUCTION.format(adapters=count, prompts=pairs // count, total=pairs)
    about = ", ".join(f"{k} {v}" for k, v in versions().items())
    return (
        f"{head}\n{overall(table)}\n\n## By adapter\n\nMeans over its prompts; kept by the top 20 %"
        f"\n\n{by_adapter(table)}\n\n## By prompt\n\nThe margin (doc − pre), base → adapted.\n\n"
        f"{questions(table)}\n\nMeasured with {about}, Python {platform.python_version()}.\n"
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Attributions against interventions.")
    parser.add_argument("--adapters", type=Path, help="folder to keep the trained adapters in")
    given = parser.parse_args().adapters
    hf_model, tokenizer = load_embedded()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = [s.folder(given or Path(scratch), hf_model, tokenizer) for s in ADAPTERS]
        model, _ = hooked_model(hf_model, tokenizer)
        for spec, folder in zip(ADAPTERS, folders, strict=True):
            print(spec.name, flush=True)
            rows += measure(spec, ll.LoraLens(model, ll.load_adapter(folder)))
    table = pd.DataFrame(rows)
    (DOCS / "faithfulness.json").write_text(json.dumps(rounded(rows), indent=0) + "\n")
    (DOCS / "faithfulness.md").write_text(page(table))


def rounded(rows: list[Row]) -> list[Row]:
    """Four digits are more than another machine reproduces."""
    return [
        {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        for row in rows
    ]


if __name__ == "__main__":
    main()
