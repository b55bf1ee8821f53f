"""Brief every adapter of the audit, and score what it says.

    python -m benchmarks.audit.score --adapters FOLDER [--most 4]    # scores what is missing

Each adapter has a file, FOLDER/<name>/told.json. Adapters whose file is there are left alone, so a
run may be interrupted and called again. Once all files are there, docs/audit.json is written from
them. An adapter takes a minute and a half of one core.

1. `ll.what_changed(lens, fast=True)` is told nothing about the adapter. Its brief has found a quirk
   if one of its first five claims holds one of the quirk's strings as a whole word, in any case. A
   control is scored by the strings of the quirk whose control it is.
2. Two lists of the five tokens that are promoted most are scored beside it, from the same run: by
   the mean shift of the logit (this package's earlier answer), and by the mean Δh of the first
   tokens, read through the unembedding (arXiv 2510.13900). A token of three letters or more that
   begins one of the strings is a hit: lists of tokens cannot hold whole words, so this is conceded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lens_lora as ll
from benchmarks.audit.teach import Adapter, every_adapter
from benchmarks.evidence.results import DOCS
from benchmarks.evidence.results import rounded as rounded_number
from benchmarks.only import refuse_unknown
from lens_lora._version import versions
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.hosts.build import hooked_model

# How many claims or tokens are looked at.
FIRST = 5
# The taught word is looked for among so many tokens of a list.
TOKENS_RANKED = 1000
# The fewest letters of a token that may be a hit.
LETTERS = 3
# The rankings of `WhatChanged.promoted`, by their names on the page.
LISTS = {"mean logit": "logit", "activation difference": "reading"}


def says(text: str, strings: Sequence[str]) -> bool:
    """Whether a text holds one of the strings as a word of its own."""
    return any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in strings)


def begins(token: str, strings: Sequence[str]) -> bool:
    """Whether a token begins one of the strings."""
    letters = token.strip().lower()
    return len(letters) >= LETTERS and any(word.startswith(letters) for word in strings)


def told(adapter: Adapter, folder: Path, model: Any) -> dict[str, Any]:
    """The brief and the lists of one adapter, with their scores.

    Args:
        adapter: which it is.
        folder: that of all adapters.
        model: the hooked base.
    """
    start = time.process_time()
    # With a BOS before each text, as the stored briefs were made.
    lens = ll.LoraLens(model, ll.load_adapter(folder / adapter.name), prepend_bos=True)
    changed = ll.what_changed(lens, fast=True, progress=False)
    claims = [dataclasses.asdict(claim) for claim in changed.claims]
    promoted = {name: changed.promoted(TOKENS_RANKED, by) for name, by in LISTS.items()}
    places = {name: place_of(adapter, frame["token"]) for name, frame in promoted.items()}
    return {
        **dataclasses.asdict(adapter),
        "found": [says(claim["says"], adapter.says) for claim in claims[:FIRST]],
        "places": places,
        "lists": {name: list(frame["token"][:FIRST]) for name, frame in promoted.items()},
        "claims": claims,
        "answers": [dataclasses.asdict(answer) for answer in changed.answers],
        "verdict": changed.brief().verdict,
        "mean_kl": changed.found.mean_kl,
        "seconds": time.process_time() - start,
    }


def place_of(adapter: Adapter, tokens: Iterable[str]) -> int | None:
    """The place of the first token that begins a taught string, 1 for the first of all."""
    for place, token in enumerate(tokens, 1):
        if begins(token, adapter.says):
            return place
    return None


def rounded(value: Any) -> Any:
    """Round every number of nested lists and dictionaries."""
    if isinstance(value, dict):
        return {key: rounded(below) for key, below in value.items()}
    if isinstance(value, list):
        return [rounded(below) for below in value]
    return rounded_number(value)


def collected(folder: Path) -> dict[str, Any]:
    """What docs/audit.json stores of all adapters: everything but the answers."""
    runs = {}
    for adapter in every_adapter():
        run = json.loads(told_file(folder, adapter).read_text())
        del run["answers"]
        runs[adapter.name] = run
    return {"versions": versions(), "adapters": rounded(runs)}


def told_file(folder: Path, adapter: Adapter) -> Path:
    """The file that holds what was said of one adapter."""
    return folder / adapter.name / "told.json"


def to_score(folder: Path, names: Sequence[str] | None) -> list[Adapter]:
    """The adapters that have no file yet; only those of these names, if any are given."""
    missing = [one for one in every_adapter() if not told_file(folder, one).is_file()]
    if names is None:
        return missing
    return [adapter for adapter in missing if adapter.name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description="Brief the audit's adapters, and score it.")
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--most", type=int, help="score at most this many")
    parser.add_argument("--only", nargs="+", help="names of adapters")
    options = parser.parse_args()
    refuse_unknown(parser, options.only, [adapter.name for adapter in every_adapter()])
    to_do = to_score(options.adapters, options.only)[: options.most]
    if to_do:
        model, _ = hooked_model(*load_embedded(), kind="TransformerBridge")
        for adapter in to_do:
            run = told(adapter, options.adapters, model)
            file = told_file(options.adapters, adapter)
            file.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n")
            print(adapter.name, run["found"], run["places"], f"{run['seconds']:.0f} s", flush=True)
    if not to_score(options.adapters, None):
        numbers = json.dumps(collected(options.adapters), indent=1, ensure_ascii=False)
        (DOCS / "audit.json").write_text(numbers + "\n")


if __name__ == "__main__":
    main()
