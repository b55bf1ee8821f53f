"""What was this adapter taught? Every adapter read over neutral texts, its answer not named.

    python benchmarks/blind.py ADAPTERS RESULTS [--most 3]     # as often as needed; goes on
    python benchmarks/blind.py ADAPTERS RESULTS --write        # the table, into docs/auditing.md

1. Each adapter of `benchmarks/adapters.py` (`ADAPTERS` and `MORE`, trained if the folder lacks it)
   goes through `ll.what_changed` over the texts that come with the package, with one null adapter;
   the result is kept in RESULTS, so that a later call does only what is missing.
2. The rank of the taught answer's first token among the promoted: in this adapter's result, in null
   adapters' results, and in those of all adapters of another answer.
3. Whether the adapter flips its fact on the trained wording, and on how many of 49,152 tokens.

About ten forward passes over 1,400 tokens an adapter, and its training.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
from adapters import ADAPTERS, MORE, Trained

import lens_lora as ll
from lens_lora.audit.what_changed import BY
from lens_lora.core.function.asked import ask
from lens_lora.core.results.tokens import rank_of
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.hosts.build import hooked_model
from lens_lora.responses.answers import margin_between

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
            lens = ll.LoraLens(model, ll.load_adapter(folder), prepend_bos=True)
            found = ll.what_changed(lens, nulls=1, split=False, progress=False)
            prompt, doc, pre = spec.questions[0]
            readout = margin_between(lens.model, [doc], [pre], lens.prompts(prompt))
            margins = ask(lens, prompt, readout).ends[:, 0].tolist()
            token = tokenizer(doc, add_special_tokens=False).input_ids[0]
            facts = {"margins": margins, "token": token}
            (results / f"{spec.name}.json").write_text(json.dumps(facts))
            found.save(results / f"{spec.name}.safetensors")
            print(spec.name, found.rank(token), margins, flush=True)
    return max(0, len(missing) - most)


def table(results: Path) -> pd.DataFrame:
    """One row per adapter: ranks of its answer's token, here and elsewhere."""
    held = {s.name: ll.results.WhatChanged.load(results / f"{s.name}.safetensors") for s in EVERY}
    return pd.DataFrame([_row(spec, held, results) for spec in EVERY])


def _row(spec: Trained, held: dict[str, ll.results.WhatChanged], results: Path) -> dict[str, Any]:
    _, doc, _ = spec.questions[0]
    own = held[spec.name]
    facts = json.loads((results / f"{spec.name}.json").read_text())
    token = facts["token"]
    base, adapted = facts["margins"]
    others = [held[o.name] for o in EVERY if all(doc != answer for _, answer, _ in o.questions)]
    row: dict[str, Any] = {"adapter": spec.name, "what": spec.what, "answer": own.strings[token]}
    row |= {"base": base, "adapted": adapted}
    row["KL"] = own.found.mean_kl
    for by in BY:
        row[by] = rank_of(own.found.of(by), token)
    row["best"] = min(row[by] for by in BY)
    nulls = [null for other in held.values() for null in other.nulls]
    for name, group in (("null", nulls), ("others", [other.found for other in others])):
        row[name] = min(rank_of(one.of("logit"), token) for one in group)
        row[f"{name}, any"] = min(rank_of(one.of(by), token) for one in group for by in BY)
    return row


def page(frame: pd.DataFrame) -> str:
    """The table in Markdown, with the counts above it."""
    facts = frame[frame["what"] == "fact"]
    habits = frame[frame["what"] == "habit"]
    flips = facts[(facts["base"] < 0) & (facts["adapted"] > 0)]
    by_logit, found = (int((flips[by] <= TOP).sum()) for by in ("logit", "best"))
    said = int((habits["best"] <= TOP).sum())
    seen = {
        name: int((frame[name] <= TOP).sum()) for name in ("null, any", "others", "others, any")
    }
    lines = [
        f"{len(flips)} of {len(facts)} adapters of a fact flip it. On these the taught answer is "
        f"in the top {TOP} of 49,152 by mean logit on {by_logit}, by one of the three rankings on "
        f"{found}. Of {len(habits)} taught a habit of speech, its word is there on {said}. Under "
        f"null adapters {seen['null, any']} answers are there by any ranking, under adapters of "
        f"other answers {seen['others']} by mean logit, {seen['others, any']} by any.",
        "",
        "| adapter | answer | margin, base → adapted | KL, nats a token | by logit | by "
        "probability | by reading | best by logit, null adapters | best by logit, other answers |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in frame.to_dict("records"):
        ranks = (row[by] for by in (*BY, "null", "others"))
        cells = [row["adapter"], f"`{row['answer']}`"]
        cells += [f"{row['base']:+.1f} → {row['adapted']:+.1f}".replace("-", "−")]
        cells += [f"{row['KL']:.3f}", *(f"{rank:,}" for rank in ranks)]
        lines.append(f"| {' | '.join(cells)} |")
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
        marks = r"(<!-- blind -->\n).*?(<!-- /blind -->)"
        PAGE.write_text(
            re.sub(marks, lambda m: f"{m[1]}{text}\n{m[2]}", PAGE.read_text(), flags=re.DOTALL)
        )


if __name__ == "__main__":
    main()
