"""Plant, confirm and judge: where each attribution ranks the causes of a plant, and what warns.

    python -m benchmarks.planted.judged --cache FOLDER [--only NAME …] [--base NAME|FOLDER]

Each plant has a file, FOLDER/<name>.json. Plants whose file is there are left alone, so a run may
be interrupted. At the end docs/planted.json is written from all files: plants of the embedded base
as `plants`, plants of another base under its name in `elsewhere`. With --only, plants without a
file in the folder keep the numbers that are stored. It takes about an hour of one core.

1. Every score of `SCORES` is computed on the plant's questions, by `benchmarks/evidence/methods.py`
   where that has it. Sites are ranked by magnitude.
2. Of a ranking the *places* of the causes are stored, 1 the first, ties at their mean. With n sites
   and k causes

       AUROC = 1 − (Σ places − k(k + 1)/2) / (k(n − k)),    recovery = share of places ≤ k

3. Of a gated plant, the place and the effect of the edge from its writer to its gate's attention
   are stored; of a smooth plant, what the scores say of the pair in logits (`sizes`).
4. So are the signals that might warn, from derivatives and from what `ll.reliability` measures,
   and the warnings that the package gives.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from tqdm import tqdm

import lens_lora as ll
from benchmarks.evidence.bases import is_embedded, load_base
from benchmarks.evidence.methods import PARTS, RELP_LIVE
from benchmarks.evidence.results import DOCS, rounded
from benchmarks.evidence.scored import attribution_of
from benchmarks.evidence.signals import apart
from benchmarks.evidence.trained_cases import question as bound
from benchmarks.planted.gated import block_of
from benchmarks.planted.kinds import planted
from benchmarks.planted.plants import RECIPES, SECOND, SMOOTH, Bed, Plant, Recipe
from lens_lora._version import versions
from lens_lora.core import Attribution, Evaluations
from lens_lora.core.analyses.components import squared_norms
from lens_lora.core.analyses.patching import How
from lens_lora.core.analyses.verdict import CHECKPOINTS as WAY
from lens_lora.core.analyses.verdict import Verdict
from lens_lora.core.results.signs import SIGMAS
from lens_lora.demonstration.embedded import EMBEDDED_NAME
from lens_lora.hosts.build import hooked_model
from lens_lora.judging.reliability import Reliability, judged
from lens_lora.path.path_attribution import path_attribution

NUMBERS = DOCS / "planted.json"
COMMAND = "python -m benchmarks.planted.judged --cache FOLDER"
# Two scores are tied if, as shares of the largest, they agree to so many decimal places.
DIGITS = 6
# Keeps scores that are all zero from being divided by zero.
TINY = 1e-30
# Scores in the readout's units, whose size can be compared with an effect.
SIZED = (
    "first_order@0",
    "first_order@0.5",
    "first_order@1",
    "path",
    "second_order@0",
    "add_one",
    "leave_one_out",
)
# Measured effects, and the gate value at which first order stands for each.
ENDS: dict[How, float] = {"add_one": 0.0, "leave_one_out": 1.0}


def _norms(g: Evaluations) -> dict[str, Tensor]:
    """‖Jᵀu‖, ‖δz‖ and their product, from one pass."""
    squares = squared_norms(g)
    gradient = g.reading.by_prompt(squares["gradient"]).sqrt()
    delta = g.reading.by_prompt(squares["delta"]).sqrt()
    return {"gradient": gradient, "update_norm": delta, "norm_product": gradient * delta}


def _size_of_change(g: Evaluations) -> Tensor:
    """‖ΔW‖ of each site, or ‖Δb‖ of a constant, [prompt, site]."""
    sizes: list[float] = []
    for path in _paths(g.lens):
        update = g.lens.adapter.modules[path]
        sizes.append(float(np.hypot(update.norm(), update.bias_norm())))
    return torch.tensor(sizes).expand(g.reading.batch, -1)


def _random(g: Evaluations) -> Tensor:
    """Random scores, the chance level of every ranking, [prompt, site]."""
    generator = torch.Generator().manual_seed(len(g.reading.rows.tokens[0]))
    return torch.rand(g.reading.batch, len(g.lens.sites), generator=generator)


def _path(g: Evaluations) -> Tensor:
    """The path integral to 1 %, or of 16 nodes, [prompt, site]."""
    return path_attribution.of(g, tol=1e-2, max_nodes=17).per_site


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
    """The module of every site."""
    return [site.module for site in lens.sites]


@functools.lru_cache(maxsize=1)
def _hooked(model: Any, tokenizer: Any) -> Any:
    """A hooked model over a copy of the base.

    A bridge renames the modules of the model that it wraps, and plants find modules by their names.
    """
    return hooked_model(copy.deepcopy(model), tokenizer)[0]


def question_of(bed: Bed, plant: Plant) -> Evaluations:
    """The function g of the plant's lens over its questions, each with its margin."""
    adapter = ll.Adapter.from_factors(plant.updates, name="plant")
    # With a BOS before each prompt, as `prompt_ids` puts one where the plants are made.
    lens = ll.LoraLens(_hooked(bed.model, bed.tokenizer), adapter, prepend_bos=True)
    questions = []
    for question in plant.questions:
        doc, pre = question.words
        questions.append({"prompt": question.prompt, "doc": doc, "pre": pre})
    return bound(lens, questions)


def measured(bed: Bed, plant: Plant, kind: str) -> dict[str, Any]:
    """Everything that is stored of a plant besides how it was made: its `sites`, `cases`, `edges`.

    `cases` has an entry for each question.
    """
    g = question_of(bed, plant)
    shares = ll.kl_shares(g.lens, g.prompts, scales=(), progress=False)
    scores = scores_of(g, shares.attribution.per_site)
    screens = {how: screened(g, how, at, scores) for how, at in ENDS.items()}
    corrected = [screen.corrected for screen in screens.values()]
    cases: list[dict[str, Any]] = []
    for row, causes in enumerate(plant.causes):
        scores_of_row = {key: values[row] for key, values in scores.items()}
        case = _case(g, row, scores_of_row, causes)
        case["kl"] = shares.verdict[row].kind
        case["signals"]["screened"] = sums_off(g, row, corrected)
        for how, screen in screens.items():
            case["says"][f"flags, {how}"] = screen.flagged_sites(row)
        if kind in SMOOTH:
            numbers = {key: scores_of_row[key] for key in SIZED}
            for how, screen in screens.items():
                numbers[f"corrected, {how}"] = screen.corrected[row]
            case["sizes"] = _sizes(g.lens, plant.pair, numbers)
        cases.append(case)
    stored: dict[str, Any] = {"sites": len(g.lens.sites), "cases": cases}
    if kind == "gated":
        stored["edges"] = _edges(g, plant)
    return stored


def scores_of(g: Evaluations, kl_shares: Tensor) -> dict[str, Tensor]:
    """Every score by its key, [prompt, site].

    Args:
        g: the function.
        kl_shares: the shares of the KL, which is no readout of g.
    """
    scores = {key: score(g) for key, score in SCORES.items()}
    scores |= _norms(g)
    scores["kl_shares"] = kl_shares
    scores["second_order@0"] = scores["first_order@0"] + scores["hessian@0"] / 2
    return {key: values.cpu().double() for key, values in scores.items()}


def _case(
    g: Evaluations, row: int, scores: Mapping[str, Tensor], causes: Collection[str]
) -> dict[str, Any]:
    """One question: the places of its causes by each score, the effects, and the signals."""
    is_cause = np.array([path in causes for path in _paths(g.lens)])
    signals = _signals(g, row, scores)
    return {
        "ends": g.ends[:, row].tolist(),
        "places": {key: places(values, is_cause) for key, values in scores.items()},
        "effects": {how: _extremes(scores[how], is_cause) for how in ENDS},
        "signals": signals,
        "says": {
            "remainder": _verdict(g, row, float(scores["first_order@0"].sum()), signals["way"]),
            "violent": g.lens.plan.relative_norm > Attribution.VIOLENT,
        },
    }


def places(values: Tensor, members: np.ndarray) -> list[float]:
    """Where the members stand when sites are ordered by magnitude, the largest first."""
    sizes = values.abs().numpy()
    largest = max(float(sizes.max()), TINY)
    shares_of_largest = np.round(sizes / largest, DIGITS)
    # `rankdata` begins with the smallest number, and gives ties their mean place.
    place_of_site = rankdata(-shares_of_largest)
    return sorted(place_of_site[members].tolist())


def _extremes(effects: Tensor, is_cause: np.ndarray) -> dict[str, float]:
    """The smallest effect of a cause, and the largest of any other site, in logits."""
    sizes = effects.abs().numpy()
    return {
        "weakest cause": float(sizes[is_cause].min()),
        "strongest other": float(sizes[~is_cause].max()),
    }


def _sizes(
    lens: ll.LoraLens, pair: Collection[str], numbers: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """What each score says of the pair, the first module first, and its sums, in logits."""
    paths = _paths(lens)
    rows = [paths.index(path) for path in pair]
    sizes: dict[str, dict[str, Any]] = {}
    for key, values in numbers.items():
        sizes[key] = {
            "pair": [float(values[row]) for row in rows],
            "sum": float(values.sum()),
            "sum of sizes": float(values.abs().sum()),
        }
    return sizes


def _edges(g: Evaluations, plant: Plant) -> dict[str, Any]:
    """The edge from the writer to the gate's attention: its effect, and its place among all."""
    lens = g.lens
    writer, gate = plant.pair
    site = _paths(lens).index(writer)
    reader = f"blocks.{block_of(gate)}.attn"
    pairs = [(lens.sites[site].name, reader)]
    left_out = ll.patch_edges(lens, g.prompts, g.readout, pairs, "leave_one_out", progress=False)
    count = 0
    by_gate: dict[str, Any] = {}
    for at in (0.0, 0.5, 1.0):
        edges = ll.edges(lens, g.prompts, g.readout, at=at, progress=False)
        values = edges.per_edge[0].cpu()
        exists = edges.exists.cpu()
        is_edge = torch.zeros_like(exists)
        is_edge[site, edges.readers.index(reader)] = True
        count = int(exists.sum())
        # [writer, reader] becomes a list: of every edge, and of the edges of this writer.
        (among_all,) = places(values[exists], is_edge[exists].numpy())
        of_writer = exists[site]
        (among_its_own,) = places(values[site, of_writer], is_edge[site, of_writer].numpy())
        by_gate[f"{at:g}"] = {"among all": among_all, "of its writer": among_its_own}
    return {"left out": float(left_out.values[0, 0]), "edges": count, "places": by_gate}


def _signals(g: Evaluations, row: int, scores: Mapping[str, Tensor]) -> dict[str, float]:
    """The signals that cost no intervention.

    Errors of sums are divided by the shift, and by Σ|a|, which is never small.
    """
    first = scores["first_order@0"]
    half = scores["first_order@0.5"]
    last = scores["first_order@1"]
    base, adapted = g.ends[:, row].tolist()
    shift = adapted - base
    sum_off_0 = abs(float(first.sum()) - shift) / abs(shift)
    sum_off_1 = abs(float(last.sum()) - shift) / abs(shift)
    size_of_first = float(first.abs().sum())
    largest_size = max(size_of_first, float(last.abs().sum()))
    gap = float((last - first).abs().sum())
    # The error of first order at 0 on the way from the base to the adapted model, as a share.
    strengths = torch.tensor(WAY, dtype=torch.float64)
    shift_on_way = g.along(WAY)[:, row].cpu().double() - base
    off_on_way = ((shift_on_way - strengths * first.sum()) / shift_on_way).abs()
    return {
        "strength": g.lens.plan.relative_norm,
        "shift": abs(shift),
        "sum_off_0": sum_off_0,
        "sum_off_1": sum_off_1,
        "ends_off": max(sum_off_0, sum_off_1) * abs(shift) / max(largest_size, abs(shift)),
        "way": float(off_on_way.max()),
        "ends_apart": apart(first[None], last[None]),
        "half_apart_0": apart(half[None], first[None]),
        "half_apart_1": apart(half[None], last[None]),
        "relative_gap": gap / size_of_first,
        "gap": gap / largest_size,
        "curvature": float(scores["hessian@0"].abs().sum()) / (2 * size_of_first),
    }


def _verdict(g: Evaluations, row: int, total: float, worst: float) -> str:
    """The kind of verdict that `ll.remainder` gives on one question.

    Args:
        g: the function.
        row: the question.
        total: the sum of first order at 0.
        worst: the error of first order on the way, as a share (`way` of `_signals`).
    """
    base, adapted = g.ends[:, row].tolist()
    floor = SIGMAS * float(g.floor[row])
    shift = adapted - base
    verdict = Verdict(
        shift=shift,
        remainder=shift - total,
        floor=floor,
        remainder_floor=floor,
        worst=worst,
        worst_scale=None,
    )
    return verdict.kind


def screened(g: Evaluations, how: How, at: float, scores: Mapping[str, Tensor]) -> Reliability:
    """The result of `ll.reliability`, from effects that are measured already."""
    values = scores[f"first_order@{at:g}"]
    first = dataclasses.replace(attribution_of(g, values, "first_order"), at=at)

    def stored_effects(sites: list[int]) -> Tensor:
        return scores[how][:, sites]

    return judged(g, first, how, stored_effects)


def sums_off(g: Evaluations, row: int, numbers: list[Tensor]) -> float:
    """The error of the worse of two sums, over the largest sum of sizes or the shift."""
    shift = float(g.ends[1, row] - g.ends[0, row])
    errors = [abs(float(values[row].sum()) - shift) for values in numbers]
    sizes = [float(values[row].abs().sum()) for values in numbers]
    return max(errors) / max(*sizes, abs(shift))


def described(recipe: Recipe, plant: Plant) -> dict[str, Any]:
    """How a plant was made, and what interventions say of it."""
    causes: set[str] = set()
    for paths in plant.causes:
        causes |= paths
    return {
        "kind": recipe.kind,
        "seed": recipe.seed,
        "facts": recipe.facts[: len(plant.questions)],
        "prompts": [question.prompt for question in plant.questions],
        "causes": [sorted(paths) for paths in plant.causes],
        "ranks": sorted({plant.updates[path].rank for path in causes}),
        "decoys": Counter(plant.sorts.values()),
        "attempts": plant.attempts,
        "enters": plant.enters,
        "confirmed": plant.confirmed,
    }


def short(value: Any) -> Any:
    """Round every number of nested lists and dictionaries to four digits."""
    if isinstance(value, Mapping):
        return {key: short(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [short(part) for part in value]
    return rounded(value)


def recipes_of(base: str) -> tuple[Recipe, ...]:
    """The plants of a base: the embedded model's, or a second base's."""
    return RECIPES if is_embedded(base) else SECOND


def collected(folder: Path, base: str) -> dict[str, Any]:
    """What is stored of a base: the plants that are in the folder, and how they were made."""
    plants = {}
    for recipe in recipes_of(base):
        file = folder / f"{recipe.name}.json"
        if file.is_file():
            plants[recipe.name] = json.loads(file.read_text())
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
    elsewhere = numbers.get("elsewhere", {})
    stored = numbers if is_embedded(base) else elsewhere.get(Path(base).name, {})
    new = collected(folder, base)
    if are_some:
        plants = {**stored.get("plants", {}), **new["plants"]}
        order = [recipe.name for recipe in recipes_of(base) if recipe.name in plants]
        new["plants"] = {name: plants[name] for name in order}
    if is_embedded(base):
        numbers |= new
    else:
        elsewhere = {**elsewhere, Path(base).name: new}
    lines = [f"{json.dumps(name)}: {{{text(part)}}}" for name, part in elsewhere.items()]
    others = ",\n".join(lines)
    NUMBERS.write_text(f'{{{text(numbers)}, "elsewhere": {{\n{others}\n}}}}\n')


def text(part: Mapping[str, Any]) -> str:
    """One base as it is written in docs/planted.json, a line for each plant, without its braces."""
    lines: list[str] = []
    for name, plant in part["plants"].items():
        lines.append(f"{json.dumps(name)}: {json.dumps(plant)}")
    plants = ",\n".join(lines)
    return f'"about": {json.dumps(part["about"])}, "plants": {{\n{plants}\n}}'


def main() -> None:
    parser = argparse.ArgumentParser(description="Plant, confirm and judge.")
    parser.add_argument("--cache", type=Path, required=True, help="folder of results, one a plant")
    parser.add_argument("--only", nargs="*", help="names of plants")
    parser.add_argument("--base", default=EMBEDDED_NAME, help="the embedded model, or a folder")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    recipes = list(recipes_of(options.base))
    if options.only:
        recipes = [recipe for recipe in recipes if recipe.name in options.only]
    to_do = [recipe for recipe in recipes if not (options.cache / f"{recipe.name}.json").is_file()]
    bed = Bed.of(*load_base(options.base)) if to_do else None
    for recipe in tqdm(to_do, desc="plants"):
        start = time.process_time()
        plant = planted(bed, recipe)
        result = described(recipe, plant)
        if plant.enters:
            result |= measured(bed, plant, recipe.kind)
        result["seconds"] = time.process_time() - start
        # The file appears under its name only when it is whole.
        unfinished = options.cache / f"{recipe.name}.part"
        unfinished.write_text(json.dumps(short(result)) + "\n")
        unfinished.rename(options.cache / f"{recipe.name}.json")
    write(options.cache, options.base, are_some=bool(options.only))


if __name__ == "__main__":
    main()
