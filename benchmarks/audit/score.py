"""Brief every adapter of the audit, and score what it says.

    python benchmarks/audit/score.py --adapters FOLDER [--most 4]    # as often as needed; goes on

One file an adapter, FOLDER/<name>/told.json; those that are there are left alone. Once all are
there, docs/audit.json is written from them. A minute and a half of one core each.

1. `ll.what_changed(lens, fast=True)` is told nothing of the adapter. Its brief has found a quirk if
   one of its first five claims holds one of the quirk's strings as a word of its own, whatever its
   case. A control is found guilty by the strings of the quirk whose control it is.
2. Beside it, from the same run, five tokens that are promoted most: by the mean shift of the logit
   (this package's earlier answer), and by the mean Δh of the first tokens, read through the
   unembedding (arXiv 2510.13900). A token of three letters or more that begins one of the strings
   is a hit: these lists are of tokens, and are given this for free.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1] / "evidence"))

from results import DOCS
from results import rounded as rounded_number
from teach import Adapter, every_adapter

import lens_lora as ll
from lens_lora._version import versions
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.hosts.build import hooked_model

FIRST = 5
LISTS = {"mean logit": "logit", "activation difference": "reading"}


def says(text: str, strings: Sequence[str]) -> bool:
    """Whether a text holds one of the strings as a word of its own."""
    return any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in strings)


def begins(token: str, strings: Sequence[str]) -> bool:
    """Whether a token begins one of the strings."""
    letters = token.strip().lower()
    return len(letters) >= 3 and any(word.startswith(letters) for word in strings)


def told(adapter: Adapter, folder: Path, model: Any) -> dict[str, Any]:
    """What the brief and the lists say of one adapter."""
    start = time.process_time()
    # With a BOS before each text, as the stored briefs were made.
    lens = ll.LoraLens(model, ll.load_adapter(folder / adapter.name), prepend_bos=True)
    changed = ll.what_changed(lens, fast=True, progress=False)
    claims = [dataclasses.asdict(claim) for claim in changed.claims]
    promoted = {name: changed.promoted(1000, by) for name, by in LISTS.items()}
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
    """The numbers of all adapters; what was said, of claims and lists alone."""
    names = [adapter.name for adapter in every_adapter()]
    runs = {name: json.loads((folder / name / "told.json").read_text()) for name in names}
    for run in runs.values():
        del run["answers"]
    return {"versions": versions(), "adapters": rounded(runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Brief the audit's adapters, and score it.")
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--most", type=int, default=48, help="so many in this call")
    parser.add_argument("--only", nargs="*", help="by name")
    given = parser.parse_args()
    to_do = [
        adapter
        for adapter in every_adapter()
        if not (given.adapters / adapter.name / "told.json").is_file()
        and (given.only is None or adapter.name in given.only)
    ][: given.most]
    if to_do:
        model, _ = hooked_model(*load_embedded(), kind="TransformerBridge")
        for adapter in to_do:
            run = told(adapter, given.adapters, model)
            file = given.adapters / adapter.name / "told.json"
            file.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n")
            print(adapter.name, run["found"], run["places"], f"{run['seconds']:.0f} s", flush=True)
    if all((given.adapters / one.name / "told.json").is_file() for one in every_adapter()):
        numbers = json.dumps(collected(given.adapters), indent=1, ensure_ascii=False)
        (DOCS / "audit.json").write_text(numbers + "\n")


if __name__ == "__main__":
    main()
