"""What says beforehand that an estimate is broken: chosen on training tasks, confirmed on others.

    python benchmarks/evidence/train.py --out ADAPTERS --warnings    # some 30 adapters
    python benchmarks/evidence/warned.py --adapters ADAPTERS --out RESULTS
    python benchmarks/evidence/page.py --warned RESULTS

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
from methods import PARTS
from recipes import CONFIRMING
from results import rounded
from signals import apart, signals_of
from torch import Tensor
from tqdm import tqdm
from trained_cases import Case, cases_in, chosen, lens_of, question

import lens_lora as ll
from lens_lora.core import Evaluations, evaluations
from lens_lora.core.analyses.first_order import first_order
from lens_lora.core.analyses.patching import How
from lens_lora.core.function.many_gates import gated_readout
from lens_lora.judging.reliability import judged

FIELDS = ("cluster", "kind", "rank", "targets", "lr", "steps")
KINDS = ("trained", "paraphrase")
WAY = (0.25, 0.5, 0.75)
READ = ("first_order@0", "first_order@0.5", "first_order@1", "path/4")
EFFECTS: tuple[How, ...] = ("add_one", "leave_one_out")
# How a KL is split over sites, and the split that is taken for right.
SPLITS = ("first_order@0.5", "first_order@1", "path/2")
WHOLE = "path/8"


def measure(case: Case) -> dict[str, Any]:
    """Signals, flags and rank correlations on the first prompt of each kind."""
    lens = lens_of(case)
    kinds = {kind: chosen(case, kind, 1) for kind in KINDS}
    return {**case.described, "kinds": {k: of_kind(lens, given) for k, given in kinds.items()}}


def of_kind(lens: ll.LoraLens, given: list[dict[str, Any]]) -> dict[str, Any]:
    g = question(lens, given)
    parts = {key: PARTS[key](g).cpu().double() for key in (*READ, *EFFECTS)}
    signals = {**signals_of(g, parts), "strongest": strongest(lens), "way": worst(g, parts)}
    off = {f"sum_off_{at}": abs(signals.pop(f"sum_at_{at}") - 1) for at in ("0", "1")}
    response = [one["response"] for one in given] if "response" in given[0] else None
    return {
        "signals": {**signals, **off},
        "agreement": {
            how: 1 - apart(parts[f"first_order@{at}"], parts[how]) for at, how in enumerate(EFFECTS)
        },
        "flags": {how: flags(g, how, parts[how]) for how in EFFECTS},
        "kl": of_kl(lens, g.prompts, response),
    }


def of_kl(
    lens: ll.LoraLens, prompts: ll.results.Prompts, response: list[str] | None
) -> dict[str, float]:
    """Rank correlations of the shares, and of what may split a KL or warn, with the whole split."""
    g = evaluations(lens, prompts, ll.KL(response), progress=False)
    shares = ll.kl_shares(lens, prompts, response, scales=(), progress=False)
    splits = {key: PARTS[key](g).cpu().double() for key in (*SPLITS, WHOLE)}
    q = shares.attribution.per_site.cpu().double()
    whole = splits.pop(WHOLE)
    return {
        "shares": 1 - apart(q, whole),
        **{key: 1 - apart(values, whole) for key, values in splits.items()},
        **{f"shares, {key}": 1 - apart(q, values) for key, values in splits.items()},
    }


def worst(g: Evaluations, parts: dict[str, Tensor]) -> float:
    """The largest share of the shift so far that first order leaves, at ¼, ½ and ¾."""
    lens = g.lens
    scales = torch.tensor(WAY, dtype=torch.float64)
    way = gated_readout(lens, g.reading, torch.stack([lens.gates(scale) for scale in WAY]))
    shift = (way - g.ends[0][:, None]).cpu().double()
    return float(((shift - scales * parts["first_order@0"].sum()) / shift).abs().max())


def strongest(lens: ll.LoraLens) -> float:
    """The largest ‖ΔW‖ / ‖W‖ of a single module."""
    weights = [lens.plan.host.weight(site.layer, site.kind).norm() for site in lens.sites]
    return max(float(m.norm() / W) for m, W in zip(lens.maps, weights, strict=True))


def flags(g: Evaluations, how: How, effects: Tensor) -> dict[str, float]:
    """How `ll.reliability` fares, its screen taken from the effects."""
    first = first_order.of(g, at=float(how == "leave_one_out"))
    found = judged(g, first, how, lambda sites: effects[:, sites], fix=True)
    row = found.against(effects).loc["all"]
    return {**row.to_dict(), "screened": found.passes["screen"]}


def pack(folder: Path) -> dict[str, Any]:
    """All results of a folder, as they are stored."""
    confirming = {recipe.cluster for recipe in CONFIRMING}
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return {
        one["name"]: {
            **{field: one[field] for field in FIELDS},
            "confirms": one["cluster"] in confirming,
            "kinds": short(one["kinds"]),
        }
        for one in found
    }


def short(value: Any) -> Any:
    """Every number rounded."""
    if isinstance(value, dict):
        return {key: short(held) for key, held in value.items()}
    return rounded(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Warnings, chosen and confirmed.")
    parser.add_argument("--adapters", type=Path, required=True, help="folder of adapters")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    for case in tqdm(cases_in(asked.adapters), desc="adapters"):
        file = asked.out / f"{case.name}.json"
        if not file.is_file():
            unfinished = file.with_suffix(".part")
            unfinished.write_text(json.dumps(measure(case)) + "\n")
            unfinished.rename(file)


if __name__ == "__main__":
    main()
