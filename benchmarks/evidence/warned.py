"""Measure which signals say beforehand that an estimate is broken.

A threshold for each signal is chosen on some training tasks and confirmed on others (`violent.py`).

    python -m benchmarks.evidence.train --out ADAPTERS --warnings    # some 30 adapters
    python -m benchmarks.evidence.warned --adapters ADAPTERS --out RESULTS
    python -m benchmarks.evidence.page --warned RESULTS

A *case* is one adapter on one prompt: the first of the trained wording, or of the paraphrases. Each
estimate is the recommended one for its question, and *broken* where its rank correlation with the
truth is below `violent.BROKEN`:

    adding one module        first order at 0, against every module added alone
    leaving one out          first order at 1, against every module left out
    dividing a KL            ½ vᵀFv of `ll.kl_shares`, against the path integral of the KL, 8 nodes

One file an adapter, RESULTS/<name>.json; those that are there are left alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import lens_lora as ll
from benchmarks.evidence.methods import PARTS
from benchmarks.evidence.recipes import CONFIRMING
from benchmarks.evidence.results import rounded
from benchmarks.evidence.signals import apart, signals_of
from benchmarks.evidence.trained_cases import Case, cases_in, chosen, lens_of, question
from lens_lora.core import Evaluations
from lens_lora.core.analyses.first_order import first_order
from lens_lora.core.analyses.patching import How
from lens_lora.core.function.many_gates import gated_readout
from lens_lora.judging.reliability import judged

FIELDS = ("cluster", "kind", "rank", "targets", "lr", "steps")
KINDS = ("trained", "paraphrase")
WAY = (0.25, 0.5, 0.75)  # gate values between both ends, at which the readout is run
READ = ("first_order@0", "first_order@0.5", "first_order@1", "path/4")
EFFECTS: tuple[How, ...] = ("add_one", "leave_one_out")
# How a KL is split over sites, and the split that is taken for the truth.
SPLITS = ("first_order@0.5", "first_order@1", "path/2")
TRUTH = "path/8"


def measure(case: Case) -> dict[str, Any]:
    """Signals, flags and rank correlations on the first prompt of each kind."""
    lens = lens_of(case)
    kinds = {}
    for kind in KINDS:
        kinds[kind] = measure_kind(lens, chosen(case, kind, 1))
    return {**case.described, "kinds": kinds}


def measure_kind(lens: ll.LoraLens, asked: list[dict[str, Any]]) -> dict[str, Any]:
    """Signals, rank correlations and flags on the prompts of one kind."""
    g = question(lens, asked)
    parts = {key: PARTS[key](g).cpu().double() for key in (*READ, *EFFECTS)}
    signals = signals_of(g, parts)
    signals["strongest"] = strongest(lens)
    signals["way"] = worst_on_the_way(g, parts["first_order@0"])
    for at in ("0", "1"):
        signals[f"sum_off_{at}"] = abs(signals.pop(f"sum_at_{at}") - 1)
    agreement = {
        "add_one": 1 - apart(parts["first_order@0"], parts["add_one"]),
        "leave_one_out": 1 - apart(parts["first_order@1"], parts["leave_one_out"]),
    }
    response = None
    if "response" in asked[0]:
        response = [one["response"] for one in asked]
    return {
        "signals": signals,
        "agreement": agreement,
        "flags": {how: flags(g, how, parts[how]) for how in EFFECTS},
        "kl": kl_agreement(lens, g.prompts, response),
    }


def kl_agreement(
    lens: ll.LoraLens, prompts: ll.results.Prompts, response: list[str] | None
) -> dict[str, float]:
    """Rank correlations between the KL's shares, its cheaper splits and the path's split of it.

    The keys: `shares` and each split beside the path's; "shares, <split>": the shares beside it.
    """
    g = Evaluations(lens.function(prompts, ll.KL(response), progress=False))
    found = ll.kl_shares(lens, prompts, response, scales=(), progress=False)
    shares = found.attribution.per_site.cpu().double()
    splits = {key: PARTS[key](g).cpu().double() for key in SPLITS}
    by_path = PARTS[TRUTH](g).cpu().double()
    agreement = {"shares": 1 - apart(shares, by_path)}
    for key, values in splits.items():
        agreement[key] = 1 - apart(values, by_path)
    for key, values in splits.items():
        agreement[f"shares, {key}"] = 1 - apart(shares, values)
    return agreement


def worst_on_the_way(g: Evaluations, first_order_at_0: Tensor) -> float:
    """The largest error of first order on the way, as a share of the shift so far.

    max over ε of |g(ε) − g(0) − ε Σa(0)| / |g(ε) − g(0)|, for ε = ¼, ½ and ¾.

    Args:
        g: the question, of one prompt.
        first_order_at_0: a(0), [prompt, site].
    """
    lens = g.lens
    scales = torch.tensor(WAY, dtype=torch.float64)
    gates = torch.stack([lens.gates(scale) for scale in WAY])
    values = gated_readout(lens, g.reading, gates)
    shift = (values - g.ends[0][:, None]).cpu().double()
    left = shift - scales * first_order_at_0.sum()
    return float((left / shift).abs().max())


def strongest(lens: ll.LoraLens) -> float:
    """The largest ‖ΔW‖ / ‖W‖ of a single module."""
    strengths = []
    for site, update in zip(lens.sites, lens.maps, strict=True):
        weight = lens.plan.host.weight(site.layer, site.kind)
        strengths.append(float(update.norm() / weight.norm()))
    return max(strengths)


def flags(g: Evaluations, how: How, effects: Tensor) -> dict[str, float]:
    """Count how `ll.reliability` fares; it reads the effects that were measured already."""
    end = 1.0 if how == "leave_one_out" else 0.0
    first = first_order.of(g, at=end)
    found = judged(g, first, how, lambda sites: effects[:, sites], fix=True)
    row = found.against(effects).loc["all"]
    return {**row.to_dict(), "screened": found.passes["screen"]}


def pack(folder: Path) -> dict[str, Any]:
    """All results of a folder, as they are stored in docs/faithfulness.json."""
    confirming = {recipe.cluster for recipe in CONFIRMING}
    packed = {}
    for file in sorted(folder.glob("*.json")):
        one = json.loads(file.read_text())
        kept = {field: one[field] for field in FIELDS}
        kept["confirms"] = one["cluster"] in confirming
        kept["kinds"] = with_rounded_numbers(one["kinds"])
        packed[one["name"]] = kept
    return packed


def with_rounded_numbers(value: Any) -> Any:
    """Round every number of nested dicts."""
    if isinstance(value, dict):
        return {key: with_rounded_numbers(entry) for key, entry in value.items()}
    return rounded(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Warnings, chosen and confirmed.")
    parser.add_argument("--adapters", type=Path, required=True, help="folder of adapters")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for case in tqdm(cases_in(options.adapters), desc="adapters"):
        file = options.out / f"{case.name}.json"
        if not file.is_file():
            unfinished = file.with_suffix(".part")
            unfinished.write_text(json.dumps(measure(case)) + "\n")
            unfinished.rename(file)


if __name__ == "__main__":
    main()
