"""Look for what an adapter was taught among the tokens that it promotes over neutral texts.

    python benchmarks/blind.py ADAPTERS RESULTS [--most 3]     # measures what is missing
    python benchmarks/blind.py ADAPTERS RESULTS --write        # writes the table of the page

1. Each adapter of `benchmarks/adapters.py` (`ADAPTERS` and `MORE`, trained if the folder lacks it)
   goes through `ll.what_changed` over the texts that come with the package, with one null adapter.
   Nothing names the answer that it was taught. The result is stored in RESULTS, so that a later
   call measures only what is missing.
2. The taught answer's first token has a rank among the promoted tokens. The table has this rank in
   the adapter's own result, and the best rank in results of null adapters and of all adapters that
   were taught another answer.
3. The table also says whether the adapter flips its fact on the trained wording.

The table stands in benchmarks/RESULTS.md. An adapter takes about ten forward passes over 1,400
tokens, and its training.
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
from lens_lora.audit.what_changed import BY, rank_of
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.hosts.build import hooked_model
from lens_lora.responses.answers import margin_between

PAGE = Path(__file__).parent / "RESULTS.md"
# An answer is found if its token is among so many.
TOP = 20
EVERY = (*ADAPTERS, *MORE)


def measure(out: Path, results: Path, most: int) -> int:
    """Train and read at most so many of those that are missing; return how many still are."""
    missing = [spec for spec in EVERY if not file_of(results, spec).is_file()]
    if missing:
        results.mkdir(parents=True, exist_ok=True)
        hf_model, tokenizer = load_embedded()
        folders = [spec.folder(out, hf_model, tokenizer) for spec in missing[:most]]
        model, _ = hooked_model(hf_model, tokenizer)
        for spec, folder in zip(missing[:most], folders, strict=True):
            # With a BOS before each prompt, as the stored numbers were measured.
            lens = ll.LoraLens(model, ll.load_adapter(folder), prepend_bos=True)
            audit = ll.what_changed(lens, nulls=1, answers=False, progress=False)
            prompt, doc, pre = spec.questions[0]
            readout = margin_between(lens.model, [doc], [pre], lens.prompts(prompt))
            margins = lens.function(prompt, readout).ends[:, 0].tolist()
            token = tokenizer(doc, add_special_tokens=False).input_ids[0]
            facts = {"margins": margins, "token": token}
            (results / f"{spec.name}.json").write_text(json.dumps(facts))
            audit.save(file_of(results, spec))
            print(spec.name, audit.rank(token), margins, flush=True)
    return max(0, len(missing) - most)


def file_of(results: Path, spec: Trained) -> Path:
    """The file of an adapter's result."""
    return results / f"{spec.name}.safetensors"


def table(results: Path) -> pd.DataFrame:
    """A row for each adapter: ranks of its answer's token, in its own result and in others."""
    audits = {spec.name: ll.results.WhatChanged.load(file_of(results, spec)) for spec in EVERY}
    return pd.DataFrame([_row(spec, audits, results) for spec in EVERY])


def _row(spec: Trained, audits: dict[str, ll.results.WhatChanged], results: Path) -> dict[str, Any]:
    """The row of one adapter, from the results of all."""
    _, doc, _ = spec.questions[0]
    own = audits[spec.name]
    facts = json.loads((results / f"{spec.name}.json").read_text())
    token = facts["token"]
    base, adapted = facts["margins"]
    ranks = {by: rank_of(token, own.found.of(by)) for by in BY}
    row = {
        "adapter": spec.name,
        "what": spec.what,
        "answer": own.strings[token],
        "base": base,
        "adapted": adapted,
        "KL": own.found.mean_kl,
        **ranks,
        "best": min(ranks.values()),
    }
    nulls: list[Any] = []
    for audit in audits.values():
        nulls += audit.nulls
    others = [audits[other.name].found for other in EVERY if not _has_answer(other, doc)]
    for name, changes in {"null": nulls, "others": others}.items():
        best = {by: min(rank_of(token, change.of(by)) for change in changes) for by in BY}
        row[name] = best["logit"]
        row[f"{name}, any"] = min(best.values())
    return row


def _has_answer(spec: Trained, doc: str) -> bool:
    """Whether the adapter was taught this answer to one of its questions."""
    return any(answer == doc for _, answer, _ in spec.questions)


def page(frame: pd.DataFrame) -> str:
    """The table in Markdown, with the counts above it."""
    facts = frame[frame["what"] == "fact"]
    habits = frame[frame["what"] == "habit"]
    flips = facts[(facts["base"] < 0) & (facts["adapted"] > 0)]
    lines = [
        f"{len(flips)} of {len(facts)} adapters of a fact flip it. On these the taught answer is "
        f"in the top {TOP} of 49,152 by mean logit on {in_top(flips, 'logit')}, by one of the "
        f"three rankings on {in_top(flips, 'best')}. Of {len(habits)} taught a habit of speech, "
        f"its word is there on {in_top(habits, 'best')}. Under null adapters "
        f"{in_top(frame, 'null, any')} answers are there by any ranking, under adapters of other "
        f"answers {in_top(frame, 'others')} by mean logit, {in_top(frame, 'others, any')} by any.",
        "",
        "| adapter | answer | margin, base → adapted | KL, nats a token | by logit | by "
        "probability | by reading | best by logit, null adapters | best by logit, other answers |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in frame.to_dict("records"):
        margins = f"{row['base']:+.1f} → {row['adapted']:+.1f}".replace("-", "−")
        ranks = [f"{row[by]:,}" for by in (*BY, "null", "others")]
        cells = [row["adapter"], f"`{row['answer']}`", margins, f"{row['KL']:.3f}", *ranks]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_top(rows: pd.DataFrame, ranking: str) -> int:
    """On how many rows the answer's token is among the first by a ranking."""
    return int((rows[ranking] <= TOP).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description="Blind audits of the benchmark's adapters.")
    parser.add_argument("adapters", type=Path, help="folder of the trained adapters")
    parser.add_argument("results", type=Path, help="folder of the results")
    parser.add_argument("--most", type=int, default=len(EVERY), help="so many in this call")
    parser.add_argument("--write", action="store_true", help="the table into RESULTS.md")
    given = parser.parse_args()
    left = 0 if given.write else measure(given.adapters, given.results, given.most)
    if left:
        print(f"{left} adapters to go; call again.")
        return
    text = page(table(given.results))
    print(text)
    if given.write:
        marks = re.compile(r"(<!-- blind -->\n).*?(<!-- /blind -->)", re.DOTALL)
        written = marks.sub(lambda found: f"{found[1]}{text}\n{found[2]}", PAGE.read_text())
        PAGE.write_text(written)


if __name__ == "__main__":
    main()
