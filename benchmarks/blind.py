"""What was this adapter taught? Every adapter read over neutral texts, its answer not named.

    python benchmarks/blind.py ADAPTERS RESULTS [--most 3]     # as often as needed; goes on
    python benchmarks/blind.py ADAPTERS RESULTS --write        # the table, into docs/auditing.md

1. Each adapter of `benchmarks/adapters.py` (`ADAPTERS` and `MORE`, trained if the folder lacks it)
   goes through `ll.what_changed` over the texts that come with the package, with one null adapter;
   the result is kept in RESULTS, so that a later call does only what is missing.
2. The rank of the taught answer's token among the promoted: in this adapter's result, in its null
   adapter's, and in the results of all adapters of another answer.
3. Whether the adapter flips its fact on the trained wording, and on how many of 49,152 tokens.

About three forward passes over 1,400 tokens an adapter, and its training.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from adapters import ADAPTERS, MORE, Trained

import lens_lora as ll
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.loading import hooked_model
from lens_lora.results.ranked_tokens import rank_of
from lens_lora.results.what_changed import BY

PAGE = Path(__file__).parents[1] / "docs" / "auditing.md"
TOP = 20
EVERY = (*ADAPTERS, *MORE)


def measure(out: Path, results: Path, most: int) -> int:
    """Train and read what is missing, at most so many; how many are still missing."""
    missing = [s for s in EVERY if not (results / f"{s.name}.safetensors").is_file()]
    if missing:
        results.mkdir(parents=True, exist_ok=True)
        hf_model, tokenizer = load_embedded()
        folders = [spec.folder(out, hf_model, tokenizer) for spec in missing[:most]]
        model, _ = hooked_model(hf_model, tokenizer)
        for spec, folder in zip(missing[:most], folders, strict=True):
            lens = ll.LoraLens(model, ll.load_adapter(folder))
            found = ll.what_changed(lens, nulls=1, split=False, progress=False)
            prompt, doc, pre = spec.questions[0]
            rows = [lens.logits(prompt, at)[0, -1] for at in (0.0, 1.0)]
            ids = [lens.model.to_single_token(token) for token in (doc, pre)]
            margins = torch.stack([row[ids[0]] - row[ids[1]] for row in rows])
            (results / f"{spec.name}.json").write_text(json.dumps(margins.tolist()))
            found.save(results / f"{spec.name}.safetensors")
            print(spec.name, found.rank(doc), margins.tolist(), flush=True)
    return max(0, len(missing) - most)


def table(results: Path) -> pd.DataFrame:
    """One row per adapter: ranks of its answer's token, here and elsewhere."""
    held = {s.name: ll.WhatChanged.load(results / f"{s.name}.safetensors") for s in EVERY}
    return pd.DataFrame([_row(spec, held, results) for spec in EVERY])


def _row(spec: Trained, held: dict[str, ll.WhatChanged], results: Path) -> dict[str, Any]:
    _, doc, _ = spec.questions[0]
    own = held[spec.name]
    token = own.strings.index(doc)
    others = [
        held[other.name] for other in EVERY if doc not in {answer for _, answer, _ in other.questions}
    ]
    base, adapted = json.loads((results / f"{spec.name}.json").read_text())
    row: dict[str, Any] = {"adapter": spec.name, "answer": doc, "base": base, "adapted": adapted}
    row["KL"] = own.found.mean_kl
    for by in BY:
        row[by] = rank_of(own.found.of(by), token)
    row["best"] = min(row[by] for by in BY)
    every_null = [null for other in held.values() for null in other.nulls]
    row["null"] = min(rank_of(null.of(by), token) for null in every_null for by in BY)
    row["others"] = min(rank_of(other.found.of(by), token) for other in others for by in BY)
    return row


def page(frame: pd.DataFrame) -> str:
    """The table in Markdown, with the counts above it."""
    flips = frame[(frame["base"] < 0) & (frame["adapted"] > 0)]
    by_logit, found = (flips["logit"] <= TOP).sum(), (flips["best"] <= TOP).sum()
    lines = [
        f"{len(flips)} of {len(frame)} adapters flip their fact. On these the taught answer stands "
        f"in the top {TOP} of 49,152 by mean logit on {by_logit}, and by one of the three rankings "
        f"on {found}. The best rank that it has under any null adapter is "
        f"{frame['null'].min():,}, and under any adapter of another fact {frame['others'].min():,}.",
        "",
        "| adapter | answer | margin, base → adapted | KL, nats a token | rank by logit | by "
        "probability | by reading | best under nulls | best under others |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in frame.to_dict("records"):
        lines.append(
            f"| {row['adapter']} | `{row['answer']}` | {row['base']:+.1f} → {row['adapted']:+.1f} | "
            f"{row['KL']:.3f} | {row['logit']:,} | {row['probability']:,} | {row['reading']:,} | "
            f"{row['null']:,} | {row['others']:,} |".replace("-", "−", 0)
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Blind audits of the benchmark's adapters.")
    parser.add_argument("adapters", type=Path, help="folder of the trained adapters")
    parser.add_argument("results", type=Path, help="folder of the results")
    parser.add_argument("--most", type=int, default=len(EVERY), help="so many in this call")
    parser.add_argument("--write", action="store_true", help="the table into docs/auditing.md")
    given = parser.parse_args()
    left = 0 if given.write else measure(given.adapters, given.results, given.most)
    if left:
        print(f"{left} adapters to go; call again.")
        return
    text = page(table(given.results))
    print(text)
    if given.write:
        marks = r"(<!-- blind -->\n).*?(\n<!-- /blind -->)"
        PAGE.write_text(
            re.sub(marks, lambda m: f"{m[1]}{text}{m[2]}", PAGE.read_text(), flags=re.DOTALL)
        )


if __name__ == "__main__":
    main()
