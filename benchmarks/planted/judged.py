"""Plant, confirm and judge: where each attribution puts the causes of a plant, and what warns.

    python benchmarks/planted/judged.py --cache FOLDER [--only NAME …]

One file a plant, FOLDER/<name>.json; those that are there are left alone, so a run may be
interrupted. Then docs/planted.json is written from all of them, and `benchmarks/evidence/page.py`
renders its section of docs/faithfulness.md. About an hour of one core.

1. Every score of `SCORES` is computed on the plant's questions, by `benchmarks/evidence/methods.py`
   where that has it. Sites are ranked by magnitude.
2. Kept of a ranking are the *places* of the causes, 1 the first, ties at their mean. With n sites
   and k causes

       AUROC = 1 − (Σ places − k(k + 1)/2) / (k(n − k)),    recovery = share of places ≤ k

3. Of a gated plant the edge from its writer to the block of its gate is sought among all edges, and
   measured by path patching.
4. Signals that cost no intervention, the package's own verdicts and flags.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gated import block_of
from kinds import planted
from plants import RECIPES, Bed, Plant, Recipe
from scipy.stats import rankdata
from torch import Tensor
from tqdm import tqdm

import lens_lora as ll
from lens_lora._version import versions
from lens_lora.analyses.first_order import squared_norms
from lens_lora.analyses.path import path_attribution_of
from lens_lora.demonstration.embedded import EMBEDDED_NAME
from lens_lora.engine.asked import Asked
from lens_lora.evaluation.compare import judged as screened
from lens_lora.evaluation.rankings import update_norms
from lens_lora.model.build import hooked_model
from lens_lora.results.attribution import Attribution

sys.path.append(str(Path(__file__).parents[1] / "evidence"))
from bases import load_base  # noqa: E402
from methods import PARTS, RELP, RELP_LIVE  # noqa: E402
from results import DOCS, rounded  # noqa: E402
from signals import signals_of  # noqa: E402
from trained_cases import question as bound  # noqa: E402
from warned import worst  # noqa: E402

NUMBERS = DOCS / "planted.json"
COMMAND = "python benchmarks/planted/judged.py --cache FOLDER"
TINY, DIGITS = 1e-30, 6  # what differs by less than a millionth of the largest is tied
SUMMED = ("first_order@0", "first_order@1", "path")
ENDS = {"add_one": 0.0, "leave_one_out": 1.0}


def _gradients(asked: Asked) -> Tensor:
    return asked.reading.by_prompt(squared_norms(asked)["gradient"]).sqrt()


def _size_of_change(asked: Asked) -> Tensor:
    """‖ΔW‖, or ‖Δb‖ of a constant."""
    modules = asked.lens.adapter.modules
    sizes = [float(np.hypot(f.norm(), f.bias_norm())) for f in map(modules.get, _paths(asked.lens))]
    return torch.tensor(sizes)[None]


def _kl_shares(asked: Asked) -> Tensor:
    return ll.kl_shares(asked.lens, asked.prompts, scales=(), progress=False).attribution.per_site


def _path(asked: Asked) -> Tensor:
    return path_attribution_of(asked, progress=False).per_site


def _random(asked: Asked) -> Tensor:
    generator = torch.Generator().manual_seed(len(asked.reading.prompts.tokens[0]))
    return torch.rand(1, len(asked.lens.sites), generator=generator)


RULED = tuple(f"first_order/{rules.key}@0" for rules in (RELP, RELP_LIVE))
SCORES: dict[str, Callable[[Asked], Tensor]] = {
    **{key: PARTS[key] for key in ("first_order@0", "first_order@0.5", "first_order@1")},
    "path": _path,
    "hessian@0": PARTS["hessian@0"],
    "add_one": PARTS["add_one"],
    "leave_one_out": PARTS["leave_one_out"],
    **{
        f"first_order/{rules.key}@0": PARTS[f"first_order/{rules.key}@0"]
        for rules in (RELP, RELP_LIVE)
    },
    "kl_shares": _kl_shares,
    "norm_product": PARTS["norm_product"],
    "gradient": _gradients,
    "update_norm": update_norms,
    "change": _size_of_change,
    "random": _random,
}


def _paths(lens: ll.LoraLens) -> list[str]:
    return [site.module for site in lens.sites]


@functools.lru_cache(maxsize=1)
def _hooked(model: Any, tokenizer: Any) -> Any:
    return hooked_model(model, tokenizer)[0]


def measured(bed: Bed, plant: Plant) -> dict[str, Any]:
    """Everything that is stored of a plant, besides how it was made."""
    adapter = ll.Adapter.from_factors(plant.updates, name="plant")
    lens = ll.LoraLens(_hooked(bed.model, bed.tokenizer), adapter, hf_model=bed.model)
    cases = [_case(lens, plant, index) for index in range(len(plant.questions))]
    has_gate = bool(plant.pair) and plant.pair[1].endswith("q_proj")
    edges = {"edges": _edges(lens, plant)} if has_gate else {}
    return {"sites": len(lens.sites), "cases": cases, **edges}


def _asked(lens: ll.LoraLens, plant: Plant, index: int) -> Asked:
    question = plant.questions[index]
    doc, pre = question.words
    return bound(lens, [{"prompt": question.prompt, "doc": doc, "pre": pre}])


def _case(lens: ll.LoraLens, plant: Plant, index: int) -> dict[str, Any]:
    """One question: places of its causes by score, effects, signals."""
    asked, causes = _asked(lens, plant, index), plant.causes[index]
    members = np.array([path in causes for path in _paths(lens)])
    scores = {key: score(asked).cpu().double() for key, score in SCORES.items()}
    scores["second_order@0"] = scores["first_order@0"] + scores["hessian@0"] / 2
    return {
        "ends": asked.ends[:, 0].tolist(),
        "places": {key: places(values[0], members) for key, values in scores.items()},
        "effects": {how: _extremes(scores[how][0], members) for how in ENDS},
        "sums": {
            key: float(scores[key].sum()) for key in ("first_order@0", "first_order@1", "path")
        },
        "signals": _signals(asked, scores),
        "says": _says(asked, scores),
    }


def places(values: Tensor, members: np.ndarray) -> list[float]:
    """Where the members stand when sites are ordered by magnitude, the largest first."""
    sizes = values.abs().numpy()
    rounded_sizes = np.round(sizes / max(float(sizes.max()), TINY), DIGITS)
    return sorted(rankdata(-rounded_sizes)[members].tolist())


def _extremes(effects: Tensor, members: np.ndarray) -> dict[str, float]:
    """The smallest effect of a cause, and the largest of any other site, in logits."""
    sizes = effects.abs().numpy()
    return {
        "weakest cause": float(sizes[members].min()),
        "strongest other": float(sizes[~members].max()),
    }


def _edges(lens: ll.LoraLens, plant: Plant) -> dict[str, Any]:
    """The edge from the writer to the gate's attention: its effect, and its place among all."""
    asked, (writer, gate) = _asked(lens, plant, 0), plant.pair
    row, reader = _paths(lens).index(writer), f"blocks.{block_of(gate)}.attn"
    pairs = [(lens.sites[row].name, reader)]
    path = ll.patch_edges(
        lens, asked.prompts, asked.readout, pairs, "leave_one_out", progress=False
    )
    by_gate: dict[str, Any] = {}
    for at in (0.0, 0.5, 1.0):
        edges = ll.edges(lens, asked.prompts, asked.readout, at=at, progress=False)
        values, exists = edges.per_edge[0].cpu(), edges.exists.cpu()
        members = torch.zeros_like(exists)
        members[row, edges.readers.index(reader)] = True
        readers = exists[row]
        by_gate[f"{at:g}"] = {
            "among all": places(values[exists], members[exists].numpy())[0],
            "of its writer": places(values[row, readers], members[row, readers].numpy())[0],
        }
    return {"left out": float(path.values[0, 0]), "edges": int(exists.sum()), "places": by_gate}


def _signals(asked: Asked, scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Those of `signals.py` and `warned.py`, and three that are shares of Σ|a|."""
    parts = {**scores, "path/4": PARTS["path/4"](asked).cpu().double()}
    first, last = scores["first_order@0"], scores["first_order@1"]
    shift = float(asked.ends[1, 0] - asked.ends[0, 0])
    largest = max(float(first.abs().sum()), float(last.abs().sum()))
    off = max(abs(float(a.sum()) - shift) for a in (first, last))
    signals = signals_of(asked, parts)
    sums = {f"sum_off_{at}": abs(signals.pop(f"sum_at_{at}") - 1) for at in ("0", "1")}
    return {
        **signals,
        **sums,
        "way": worst(asked, parts),
        "gap": float((last - first).abs().sum()) / largest,
        "ends_off": off / max(largest, abs(shift)),
        "curvature": float(scores["hessian@0"].abs().sum() / (2 * first.abs().sum())),
    }


def _says(asked: Asked, scores: Mapping[str, Tensor]) -> dict[str, Any]:
    """The package's own warnings, as they come without a threshold that is chosen here."""
    first = ll.first_order(asked.lens, asked.prompts, asked.readout)
    shares = ll.kl_shares(asked.lens, asked.prompts, scales=(), progress=False)
    remainder = ll.remainder(asked.lens, asked.prompts, asked.readout, progress=False)
    return {
        "remainder": remainder.verdict[0].kind,
        "kl": shares.verdict[0].kind,
        "violent": first.is_violent,
        "flags": {how: _flags(asked, how, scores[how]) for how in ENDS},
    }


def _flags(asked: Asked, how: Any, effects: Tensor) -> list[str]:
    """The sites that `ll.reliability` flags, its screen taken from the effects."""
    first: Attribution = ll.first_order(asked.lens, asked.prompts, asked.readout, at=ENDS[how])
    result = screened(asked, first, how, lambda sites: effects[:, sites])
    return list(result.flagged_sites())


def described(recipe: Recipe, plant: Plant) -> dict[str, Any]:
    """How it was made, and what interventions say."""
    sorts = list(plant.sorts.values())
    return {
        "kind": recipe.kind,
        "seed": recipe.seed,
        "facts": recipe.facts[: len(plant.questions)],
        "prompts": [question.prompt for question in plant.questions],
        "causes": [sorted(paths) for paths in plant.causes],
        "ranks": sorted({plant.updates[path].rank for paths in plant.causes for path in paths}),
        "decoys": {sort: sorts.count(sort) for sort in sorted(set(sorts))},
        "attempts": plant.attempts,
        "enters": plant.enters,
        "confirmed": plant.confirmed,
    }


def short(value: Any) -> Any:
    """Every number to four digits."""
    if isinstance(value, Mapping):
        return {key: short(part) for key, part in value.items()}
    return [short(part) for part in value] if isinstance(value, list | tuple) else rounded(value)


def write(folder: Path) -> None:
    """docs/planted.json, one line a plant."""
    files = {recipe.name: folder / f"{recipe.name}.json" for recipe in RECIPES}
    there = ((name, file.read_text().strip()) for name, file in files.items() if file.is_file())
    lines = ",\n".join(f"{json.dumps(name)}: {line}" for name, line in there)
    about = json.dumps({"command": COMMAND, **versions()})
    NUMBERS.write_text(f'{{"about": {about}, "plants": {{\n{lines}\n}}}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description="Plant, confirm and judge.")
    parser.add_argument("--cache", type=Path, required=True, help="folder of results, one a plant")
    parser.add_argument("--only", nargs="*", help="names of plants")
    asked = parser.parse_args()
    asked.cache.mkdir(parents=True, exist_ok=True)
    chosen = [r for r in RECIPES if not asked.only or r.name in asked.only]
    left = [r for r in chosen if not (asked.cache / f"{r.name}.json").is_file()]
    bed = Bed.of(*load_base(EMBEDDED_NAME)) if left else None
    for recipe in tqdm(left, desc="plants"):
        start = time.process_time()
        plant = planted(bed, recipe)
        result = {**described(recipe, plant), **(measured(bed, plant) if plant.enters else {})}
        result["seconds"] = time.process_time() - start
        unfinished = asked.cache / f"{recipe.name}.part"
        unfinished.write_text(json.dumps(short(result)) + "\n")
        unfinished.rename(asked.cache / f"{recipe.name}.json")
    write(asked.cache)


if __name__ == "__main__":
    main()
