"""Plant, confirm and judge: where each attribution puts the causes of a plant, and what warns.

    python benchmarks/planted/judged.py --cache FOLDER [--only NAME …] [--base NAME|FOLDER]

One file a plant, FOLDER/<name>.json; those that are there are left alone, so a run may be
interrupted. Then docs/planted.json is written from all of them: those of the embedded base as
`plants`, those of another under its name in `elsewhere`. With --only, the plants that are not in
the folder stay there as they were. About an hour of one core.

1. Every score of `SCORES` is computed on the plant's questions, by `benchmarks/evidence/methods.py`
   where that has it. Sites are ranked by magnitude.
2. Kept of a ranking are the *places* of the causes, 1 the first, ties at their mean. With n sites
   and k causes

       AUROC = 1 − (Σ places − k(k + 1)/2) / (k(n − k)),    recovery = share of places ≤ k

3. Of a gated plant, the place and the effect of the edge from its writer to its gate's attention.
   Of a smooth one, what the scores say of the pair in logits: `sizes`.
4. Signals, of derivatives and of what `ll.reliability` measures; the package's own warnings.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gated import block_of
from kinds import planted
from plants import RECIPES, SECOND, SMOOTH, Bed, Plant, Recipe
from scipy.stats import rankdata
from torch import Tensor
from tqdm import tqdm

import lens_lora as ll
from lens_lora._version import versions
from lens_lora.core import (
    VIOLENT,
    Evaluations,
)
from lens_lora.core.analyses.components import squared_norms
from lens_lora.core.analyses.patching import How
from lens_lora.core.analyses.verdict import CHECKPOINTS as WAY
from lens_lora.core.analyses.verdict import Verdict
from lens_lora.core.results.base import SIGMAS
from lens_lora.demonstration.embedded import EMBEDDED_NAME
from lens_lora.hosts.build import hooked_model
from lens_lora.judging.reliability import Reliability, judged
from lens_lora.path.path_attribution import path_attribution

sys.path.append(str(Path(__file__).parents[1] / "evidence"))
from bases import is_embedded, load_base  # noqa: E402
from methods import PARTS, RELP_LIVE  # noqa: E402
from results import DOCS, rounded  # noqa: E402
from scored import attribution_of  # noqa: E402
from signals import apart  # noqa: E402
from trained_cases import question as bound  # noqa: E402

NUMBERS = DOCS / "planted.json"
COMMAND = "python benchmarks/planted/judged.py --cache FOLDER"
# Scores are tied where they agree in so many digits of the largest.
DIGITS = 6
# Keeps a division by the largest from being one by zero.
TINY = 1e-30
# Scores in the readout's units, whose size can be held against an effect.
SIZED = (
    "first_order@0",
    "first_order@0.5",
    "first_order@1",
    "path",
    "second_order@0",
    "add_one",
    "leave_one_out",
)
ENDS: dict[How, float] = {"add_one": 0.0, "leave_one_out": 1.0}


def _norms(g: Evaluations) -> dict[str, Tensor]:
    """‖Jᵀu‖, ‖δz‖ and their product, from one pass."""
    squares = squared_norms(g)
    gradient, delta = (g.reading.by_prompt(squares[key]).sqrt() for key in ("gradient", "delta"))
    return {"gradient": gradient, "update_norm": delta, "norm_product": gradient * delta}


def _size_of_change(g: Evaluations) -> Tensor:
    """‖ΔW‖, or ‖Δb‖ of a constant."""
    modules = g.lens.adapter.modules
    sizes = [float(np.hypot(f.norm(), f.bias_norm())) for f in map(modules.get, _paths(g.lens))]
    return torch.tensor(sizes).expand(g.reading.batch, -1)


def _random(g: Evaluations) -> Tensor:
    generator = torch.Generator().manual_seed(len(g.reading.prompts.tokens[0]))
    return torch.rand(g.reading.batch, len(g.lens.sites), generator=generator)


def _path(g: Evaluations) -> Tensor:
    return path_attribution.of(g, tol=1e-2, max_nodes=16).per_site


RELP_KEY = f"first_order/{RELP_LIVE.key}@0"
SCORES: dict[str, Callable[[Evaluations], Tensor]] = {
    **{key: PARTS[key] for key in ("first_order@0", "first_order@0.5", "first_order@1")},
    "path": _path,
    "hessian@0": PARTS["hessian@0"],
    "add_one": PARTS["add_one"],
    "leave_one_out": PARTS["leave_one_out"],
    RELP_KEY: PARTS[RELP_KEY],
    "change": _size_of_change,
    "random": _random,
}


def _paths(lens: ll.LoraLens) -> list[str]:
    return [site.module for site in lens.sites]


@functools.lru_cache(maxsize=1)
def _hooked(model: Any, tokenizer: Any) -> Any:
    # Of a copy: a bridge renames the modules of the model that it wraps, by which plants find them.
    return hooked_model(copy.deepcopy(model), tokenizer)[0]


def question_of(bed: Bed, plant: Plant) -> Evaluations:
    """g over the plant's questions, of its model."""
    adapter = ll.Adapter.from_factors(plant.updates, name="plant")
    # With a BOS before each prompt, as `prompt_ids` puts one where the plants are made.
    lens = ll.LoraLens(_hooked(bed.model, bed.tokenizer), adapter, prepend_bos=True)
    questions = [
        {"prompt": question.prompt, **dict(zip(("doc", "pre"), question.words, strict=True))}
        for question in plant.questions
    ]
    return bound(lens, questions)


def measured(bed: Bed, plant: Plant, kind: str) -> dict[str, Any]:
    """Everything that is stored of a plant, besides how it was made."""
    g = question_of(bed, plant)
    lens = g.lens
    shares = ll.kl_shares(lens, g.prompts, scales=(), progress=False)
    scores = {key: score(g) for key, score in SCORES.items()} | _norms(g)
    scores["kl_shares"] = shares.attribution.per_site
    scores["second_order@0"] = scores["first_order@0"] + scores["hessian@0"] / 2
    scores = {key: values.cpu().double() for key, values in scores.items()}
    cases = [
        {
            **_case(g, row, {key: values[row] for key, values in scores.items()}, causes),
            "kl": shares.verdict[row].kind,
        }
        for row, causes in enumerate(plant.causes)
    ]
    screens = {how: _screened(g, how, at, scores) for how, at in ENDS.items()}
    for row, case in enumerate(cases):
        case["says"] |= {f"flags, {how}": s.flagged_sites(row) for how, s in screens.items()}
        case["signals"]["screened"] = _sums_off(g, row, [s.corrected for s in screens.values()])
        if kind in SMOOTH:
            numbers = {key: scores[key][row] for key in SIZED}
            numbers |= {f"corrected, {how}": s.corrected[row] for how, s in screens.items()}
            case["sizes"] = _sizes(g.lens, plant.pair, numbers)
    edges = {"edges": _edges(g, plant)} if kind == "gated" else {}
    return {"sites": len(lens.sites), "cases": cases, **edges}


def _case(
    g: Evaluations, row: int, scores: Mapping[str, Tensor], causes: Collection[str]
) -> dict[str, Any]:
    """One question: places of its causes by score, effects, signals."""
    members = np.array([path in causes for path in _paths(g.lens)])
    signals = _signals(g, row, scores)
    return {
        "ends": g.ends[:, row].tolist(),
        "places": {key: places(values, members) for key, values in scores.items()},
        "effects": {how: _extremes(scores[how], members) for how in ENDS},
        "signals": signals,
        "says": {
            "remainder": _verdict(g, row, float(scores["first_order@0"].sum()), signals["way"]),
            "violent": g.lens.plan.relative_norm > VIOLENT,
        },
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


def _sizes(
    lens: ll.LoraLens, pair: Collection[str], numbers: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """The numbers of the pair by each score, the first module's first, and all sums, in logits."""
    paths = _paths(lens)
    return {
        key: {
            "pair": [float(values[paths.index(path)]) for path in pair],
            "sum": float(values.sum()),
            "sum of sizes": float(values.abs().sum()),
        }
        for key, values in numbers.items()
    }


def _edges(g: Evaluations, plant: Plant) -> dict[str, Any]:
    """The edge from the writer to the gate's attention: its effect, and its place among all."""
    lens = g.lens
    writer, gate = plant.pair
    row = _paths(lens).index(writer)
    reader = f"blocks.{block_of(gate)}.attn"
    pairs = [(lens.sites[row].name, reader)]
    path = ll.patch_edges(lens, g.prompts, g.readout, pairs, "leave_one_out", progress=False)
    by_gate: dict[str, Any] = {}
    for at in (0.0, 0.5, 1.0):
        edges = ll.edges(lens, g.prompts, g.readout, at=at, progress=False)
        values = edges.per_edge[0].cpu()
        exists = edges.exists.cpu()
        members = torch.zeros_like(exists)
        members[row, edges.readers.index(reader)] = True
        readers = exists[row]
        by_gate[f"{at:g}"] = {
            "among all": places(values[exists], members[exists].numpy())[0],
            "of its writer": places(values[row, readers], members[row, readers].numpy())[0],
        }
    return {"left out": float(path.values[0, 0]), "edges": int(exists.sum()), "places": by_gate}


def _signals(g: Evaluations, row: int, scores: Mapping[str, Tensor]) -> dict[str, float]:
    """What costs no intervention; sums beside the shift, and beside Σ|a|, which is never small."""
    first, half, last = (scores[f"first_order@{at}"] for at in ("0", "0.5", "1"))
    base, adapted = g.ends[:, row].tolist()
    shift = adapted - base
    size = float(first.abs().sum())
    largest = max(size, float(last.abs().sum()))
    off = [abs(float(a.sum()) - shift) / abs(shift) for a in (first, last)]
    strengths = torch.tensor(WAY, dtype=torch.float64)
    way = g.along(WAY)[:, row].cpu().double() - base
    left = ((way - strengths * first.sum()) / way).abs()
    return {
        "strength": g.lens.plan.relative_norm,
        "shift": abs(shift),
        "sum_off_0": off[0],
        "sum_off_1": off[1],
        "ends_off": max(off) * abs(shift) / max(largest, abs(shift)),
        "way": float(left.max()),
        "ends_apart": apart(first[None], last[None]),
        "half_apart_0": apart(half[None], first[None]),
        "half_apart_1": apart(half[None], last[None]),
        "relative_gap": float((last - first).abs().sum()) / size,
        "gap": float((last - first).abs().sum()) / largest,
        "curvature": float(scores["hessian@0"].abs().sum()) / (2 * size),
    }


def _verdict(g: Evaluations, row: int, total: float, worst: float) -> str:
    """The kind of `ll.remainder`'s verdict; a shift of logits stands far above all rounding."""
    base, adapted = g.ends[:, row].tolist()
    floor = SIGMAS * float(g.floor[row])
    shift = adapted - base
    return Verdict(shift, shift - total, floor, floor, worst, None).kind


def _screened(g: Evaluations, how: How, at: float, scores: Mapping[str, Tensor]) -> Reliability:
    """`ll.reliability`, its screen taken from the effects that were measured anyway."""
    first = attribution_of(g, scores[f"first_order@{at:g}"], "first_order")
    ended = dataclasses.replace(first, at=at)
    return judged(g, ended, how, lambda sites: scores[how][:, sites])


def _sums_off(g: Evaluations, row: int, numbers: list[Tensor]) -> float:
    """How far the worse of two sums is from the shift, by the largest sum of sizes."""
    shift = float(g.ends[1, row] - g.ends[0, row])
    off = max(abs(float(values[row].sum()) - shift) for values in numbers)
    sizes = [float(values[row].abs().sum()) for values in numbers]
    return off / max(*sizes, abs(shift))


def described(recipe: Recipe, plant: Plant) -> dict[str, Any]:
    """How it was made, and what interventions say."""
    return {
        "kind": recipe.kind,
        "seed": recipe.seed,
        "facts": recipe.facts[: len(plant.questions)],
        "prompts": [question.prompt for question in plant.questions],
        "causes": [sorted(paths) for paths in plant.causes],
        "ranks": sorted({plant.updates[path].rank for paths in plant.causes for path in paths}),
        "decoys": Counter(plant.sorts.values()),
        "attempts": plant.attempts,
        "enters": plant.enters,
        "confirmed": plant.confirmed,
    }


def short(value: Any) -> Any:
    """Every number to four digits."""
    if isinstance(value, Mapping):
        return {key: short(part) for key, part in value.items()}
    return [short(part) for part in value] if isinstance(value, list | tuple) else rounded(value)


def recipes_of(base: str) -> tuple[Recipe, ...]:
    """The plants of a base: the embedded model's, or a second base's."""
    return RECIPES if is_embedded(base) else SECOND


def collected(folder: Path, base: str) -> dict[str, Any]:
    """What is stored of a base: the plants that are in the folder, and how they were made."""
    files = {recipe.name: folder / f"{recipe.name}.json" for recipe in recipes_of(base)}
    plants = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    option = "" if is_embedded(base) else f" --base {Path(base).name}"
    return {"about": {"command": COMMAND + option, **versions()}, "plants": plants}


def write(folder: Path, base: str, *, are_some: bool = False) -> None:
    """Write docs/planted.json, one line a plant, with the numbers of other bases as they were.

    Args:
        folder: of results, one file a plant.
        base: the embedded model's name, or another base's folder.
        are_some: whether plants of this base that are not in the folder stay as they were.
    """
    numbers = json.loads(NUMBERS.read_text())
    others = numbers.get("elsewhere", {})
    stored = numbers if is_embedded(base) else others.get(Path(base).name, {})
    there = collected(folder, base)
    if are_some:
        plants = {**stored.get("plants", {}), **there["plants"]}
        order = [recipe.name for recipe in recipes_of(base) if recipe.name in plants]
        there["plants"] = {name: plants[name] for name in order}
    if is_embedded(base):
        numbers |= there
    else:
        numbers["elsewhere"] = {**others, Path(base).name: there}
    elsewhere = ",\n".join(
        f"{json.dumps(name)}: {{{text(part)}}}"
        for name, part in numbers.get("elsewhere", {}).items()
    )
    NUMBERS.write_text(f'{{{text(numbers)}, "elsewhere": {{\n{elsewhere}\n}}}}\n')


def text(part: Mapping[str, Any]) -> str:
    """One base in the file, without its braces."""
    plants = part["plants"].items()
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(plant)}" for name, plant in plants)
    return f'"about": {json.dumps(part["about"])}, "plants": {{\n{lines}\n}}'


def main() -> None:
    parser = argparse.ArgumentParser(description="Plant, confirm and judge.")
    parser.add_argument("--cache", type=Path, required=True, help="folder of results, one a plant")
    parser.add_argument("--only", nargs="*", help="names of plants")
    parser.add_argument("--base", default=EMBEDDED_NAME, help="the embedded model, or a folder")
    asked = parser.parse_args()
    asked.cache.mkdir(parents=True, exist_ok=True)
    chosen = [r for r in recipes_of(asked.base) if not asked.only or r.name in asked.only]
    left = [r for r in chosen if not (asked.cache / f"{r.name}.json").is_file()]
    bed = Bed.of(*load_base(asked.base)) if left else None
    for recipe in tqdm(left, desc="plants"):
        start = time.process_time()
        plant = planted(bed, recipe)
        result = described(recipe, plant)
        if plant.enters:
            result |= measured(bed, plant, recipe.kind)
        result["seconds"] = time.process_time() - start
        unfinished = asked.cache / f"{recipe.name}.part"
        unfinished.write_text(json.dumps(short(result)) + "\n")
        unfinished.rename(asked.cache / f"{recipe.name}.json")
    write(asked.cache, asked.base, are_some=bool(asked.only))


if __name__ == "__main__":
    main()
