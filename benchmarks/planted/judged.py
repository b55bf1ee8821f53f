"""Plant, confirm and judge: where each attribution ranks the causes of a plant, and what warns.

    python -m benchmarks.planted.judged --cache FOLDER [--only NAME …] [--base NAME|FOLDER]

Each plant has a file, FOLDER/<name>.json. Plants whose file is there are left alone, so a run may
be interrupted. At the end docs/planted.json is written from all files: plants of the embedded base
as `plants`, plants of another base under its name in `elsewhere`. With --only, plants without a
file in the folder keep the numbers that are stored. It takes about an hour of one core.

1. Every score of `SCORES` is computed on the plant's questions, by `benchmarks/evidence/methods.py`
   where that has it. Sites are ranked by magnitude.
2. For each ranking the *places* of the causes are stored: 1 is the first, and ties have the mean of
   their places. With n sites and k causes

       AUROC = 1 − (Σ places − k(k + 1)/2) / (k(n − k)),    recovery = share of places ≤ k

3. For a gated plant, the place and the effect of the edge from its writer to its gate's attention
   are stored as well; for a smooth plant, what the scores say of the pair in logits (`sizes`).
4. The signals that might warn are stored, from derivatives and from what `ll.reliability` measures,
   and so are the warnings that the package gives.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from benchmarks.evidence.trained_cases import question as function_of_questions
from benchmarks.only import refuse_unknown
from benchmarks.planted.gated import block_of
from benchmarks.planted.kinds import planted
from benchmarks.planted.plants import RECIPES, SECOND, SMOOTH, Bed, Plant, Recipe
from lens_lora._version import versions
from lens_lora.core import Attribution, Evaluations
from lens_lora.core.analyses.components import squared_norms
from lens_lora.core.analyses.patching import How
from lens_lora.core.analyses.verdict import CHECKPOINTS as STRENGTHS
from lens_lora.core.analyses.verdict import Verdict
from lens_lora.core.results.signs import SIGMAS
from lens_lora.demonstration.embedded import EMBEDDED_NAME
from lens_lora.hosts.build import hooked_model
from lens_lora.judging.reliability import Reliability, judged
from lens_lora.path.path_attribution import path_attribution
from lens_lora.shifts.kl_shares import SharesVerdict

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
    """‖Jᵀu‖, ‖δz‖ and their product, each [prompt, site], from one pass."""
    squares = squared_norms(g)
    gradient = g.reading.by_prompt(squares["gradient"]).sqrt()
    delta = g.reading.by_prompt(squares["delta"]).sqrt()
    return {"gradient": gradient, "update_norm": delta, "norm_product": gradient * delta}


def _modules(lens: ll.LoraLens) -> list[str]:
    """The module of every site."""
    return [site.module for site in lens.sites]


def _size_of_change(g: Evaluations) -> Tensor:
    """‖ΔW‖ of each site, or ‖Δb‖ of a constant, [prompt, site]."""
    sizes: list[float] = []
    for module in _modules(g.lens):
        update = g.lens.adapter.modules[module]
        sizes.append(float(np.hypot(update.norm(), update.bias_norm())))
    return torch.tensor(sizes).expand(g.reading.batch, -1)


def _random(g: Evaluations) -> Tensor:
    """Random scores, by which a ranking is at chance level, [prompt, site]."""
    generator = torch.Generator().manual_seed(len(g.reading.rows.tokens[0]))
    return torch.rand(g.reading.batch, len(g.lens.sites), generator=generator)


def _path_integral(g: Evaluations) -> Tensor:
    """The path integral with an error of 1 %, or with 16 nodes, [prompt, site]."""
    return path_attribution.of(g, tol=1e-2, max_nodes=17).per_site


RELP_KEY = f"first_order/{RELP_LIVE.key}@0"
SCORES: dict[str, Callable[[Evaluations], Tensor]] = {
    **{key: PARTS[key] for key in ("first_order@0", "first_order@0.5", "first_order@1")},
    "path": _path_integral,
    "hessian@0": PARTS["hessian@0"],
    "add_one": PARTS["add_one"],
    "leave_one_out": PARTS["leave_one_out"],
    RELP_KEY: PARTS[RELP_KEY],
    "change": _size_of_change,
    "random": _random,
}


@functools.lru_cache(maxsize=1)
def _hooked(model: Any, tokenizer: Any) -> Any:
    """A hooked model over a copy of the base.

    A bridge renames the modules of the model that it wraps, and plants find modules by their names.
    """
    return hooked_model(copy.deepcopy(model), tokenizer)[0]


def question_of(bed: Bed, plant: Plant) -> Evaluations:
    """The function g of the plant's lens over its questions, each with its margin."""
    adapter = ll.Adapter.from_factors(plant.updates, name="plant")
    # `prompt_ids`, by which plants are made, puts a BOS before each prompt as well.
    lens = ll.LoraLens(_hooked(bed.model, bed.tokenizer), adapter, prepend_bos=True)
    questions = []
    for question in plant.questions:
        doc, pre = question.words
        questions.append({"prompt": question.prompt, "doc": doc, "pre": pre})
    return function_of_questions(lens, questions)


class Measures(NamedTuple):
    """What is computed for all questions of a plant at once.

    Attributes:
        scores: every score by its key, [prompt, site].
        screens: by measured effect, what `ll.reliability` finds about first order.
        verdicts_of_kl: a verdict of `ll.kl_shares` for each question.
    """

    scores: Mapping[str, Tensor]
    screens: Mapping[How, Reliability]
    verdicts_of_kl: Sequence[SharesVerdict]

    def scores_of(self, row: int) -> dict[str, Tensor]:
        """The scores of one question, [site]."""
        return {key: values[row] for key, values in self.scores.items()}


def measures_of(g: Evaluations) -> Measures:
    """Compute all scores of a plant's questions, and what is measured about them."""
    shares = ll.kl_shares(g.lens, g.prompts, scales=(), progress=False)
    scores = scores_of(g, shares.attribution.per_site)
    screens = {how: screened(g, how, gate, scores) for how, gate in ENDS.items()}
    return Measures(scores, screens, shares.verdict)


def measured(bed: Bed, plant: Plant, kind: str) -> dict[str, Any]:
    """Everything that is stored about a plant besides how it was made.

    Returns:
        `sites`, their number; `cases`, an entry for each question; and `edges`, if it is gated.
    """
    g = question_of(bed, plant)
    measures = measures_of(g)
    cases: list[dict[str, Any]] = []
    for row, causes in enumerate(plant.causes):
        case = _case(g, row, causes, measures)
        if kind in SMOOTH:
            case = {**case, "sizes": _sizes_of_pair(g.lens, row, plant.pair, measures)}
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


def _case(g: Evaluations, row: int, causes: Collection[str], measures: Measures) -> dict[str, Any]:
    """Everything that is stored about one question of any plant.

    Returns:
        `ends`: g(0) and g(1).
        `places`: the places of the causes by each score.
        `effects`: by measured effect, the weakest cause's and the strongest other site's.
        `signals`: what might warn, as numbers.
        `says`: what the package warns of.
        `kl`: the kind of verdict on the shares of the KL.
    """
    scores = measures.scores_of(row)
    is_cause = np.array([module in causes for module in _modules(g.lens)])
    corrected = [screen.corrected for screen in measures.screens.values()]
    signals = _signals(g, row, scores)
    signals["screened"] = sums_off(g, row, corrected)
    return {
        "ends": g.ends[:, row].tolist(),
        "places": {key: places(values, is_cause) for key, values in scores.items()},
        "effects": {how: _extremes(scores[how], is_cause) for how in ENDS},
        "signals": signals,
        "says": _warnings(g, row, measures, error_on_way=signals["way"]),
        "kl": measures.verdicts_of_kl[row].kind,
    }


def _warnings(g: Evaluations, row: int, measures: Measures, error_on_way: float) -> dict[str, Any]:
    """What the package says about one question, each by the name of what says it."""
    sum_of_first = float(measures.scores["first_order@0"][row].sum())
    warnings: dict[str, Any] = {
        "remainder": _verdict(g, row, sum_of_first, error_on_way),
        "violent": g.lens.plan.relative_norm > Attribution.VIOLENT,
    }
    for how, screen in measures.screens.items():
        warnings[f"flags, {how}"] = screen.flagged_sites(row)
    return warnings


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


def _sizes_of_pair(
    lens: ll.LoraLens, row: int, pair: Collection[str], measures: Measures
) -> dict[str, dict[str, Any]]:
    """What each score says about the pair of a smooth plant, and its sums, in logits.

    Args:
        lens: the plant's.
        row: the question.
        pair: two modules.
        measures: of all questions.
    """
    values_of_key = {key: measures.scores[key][row] for key in SIZED}
    for how, screen in measures.screens.items():
        values_of_key[f"corrected, {how}"] = screen.corrected[row]
    modules = _modules(lens)
    sites = [modules.index(module) for module in pair]
    sizes: dict[str, dict[str, Any]] = {}
    for key, values in values_of_key.items():
        sizes[key] = {
            "pair": [float(values[site]) for site in sites],
            "sum": float(values.sum()),
            "sum of sizes": float(values.abs().sum()),
        }
    return sizes


def _edges(g: Evaluations, plant: Plant) -> dict[str, Any]:
    """The edge from the writer to the gate's attention: its effect, and its place among all."""
    lens = g.lens
    writer, gate = plant.pair
    site = _modules(lens).index(writer)
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
        # Every edge in one list, and then the edges of this writer.
        (among_all,) = places(values[exists], is_edge[exists].numpy())
        of_writer = exists[site]
        (among_its_own,) = places(values[site, of_writer], is_edge[site, of_writer].numpy())
        by_gate[f"{at:g}"] = {"among all": among_all, "of its writer": among_its_own}
    return {"left out": float(left_out.values[0, 0]), "edges": count, "places": by_gate}


def _signals(g: Evaluations, row: int, scores: Mapping[str, Tensor]) -> dict[str, float]:
    """The signals of one question that cost no intervention.

    With a₀, a½ and a₁ first order at ε = 0, ½ and 1, h the Hessian's part of each site, and the
    shift Δ = g(1) − g(0):

        strength        ‖ΔW‖ / ‖W‖
        shift           |Δ|
        sum_off_0       |Σ a₀ − Δ| / |Δ|
        sum_off_1       |Σ a₁ − Δ| / |Δ|
        ends_off        max(|Σ a₀ − Δ|, |Σ a₁ − Δ|) / max(Σ |a₀|, Σ |a₁|, |Δ|)
        way             the largest |g(ε) − g(0) − ε Σ a₀| / |g(ε) − g(0)| at STRENGTHS ε
        ends_apart      1 − Spearman's correlation of a₀ and a₁
        half_apart_0    the same of a½ and a₀
        half_apart_1    the same of a½ and a₁
        relative_gap    Σ |a₁ − a₀| / Σ |a₀|
        gap             Σ |a₁ − a₀| / max(Σ |a₀|, Σ |a₁|)
        curvature       Σ |h| / (2 Σ |a₀|)

    The shift may be close to zero, where a share of it says little; Σ |a₀| is never small.
    """
    at_0 = scores["first_order@0"]
    at_half = scores["first_order@0.5"]
    at_1 = scores["first_order@1"]
    base, adapted = g.ends[:, row].tolist()
    shift = adapted - base
    sum_off_0 = abs(float(at_0.sum()) - shift) / abs(shift)
    sum_off_1 = abs(float(at_1.sum()) - shift) / abs(shift)
    larger_error = max(sum_off_0, sum_off_1) * abs(shift)
    size_at_0 = float(at_0.abs().sum())
    larger_size = max(size_at_0, float(at_1.abs().sum()))
    gap = float((at_1 - at_0).abs().sum())
    curvature = float(scores["hessian@0"].abs().sum())
    return {
        "strength": g.lens.plan.relative_norm,
        "shift": abs(shift),
        "sum_off_0": sum_off_0,
        "sum_off_1": sum_off_1,
        "ends_off": larger_error / max(larger_size, abs(shift)),
        "way": _error_on_way(g, row, float(at_0.sum())),
        "ends_apart": apart(at_0[None], at_1[None]),
        "half_apart_0": apart(at_half[None], at_0[None]),
        "half_apart_1": apart(at_half[None], at_1[None]),
        "relative_gap": gap / size_at_0,
        "gap": gap / larger_size,
        "curvature": curvature / (2 * size_at_0),
    }


def _error_on_way(g: Evaluations, row: int, sum_of_first: float) -> float:
    """The largest error of first order at 0 on the way from the base to the adapted model.

    It is a share of the shift at that strength: |g(ε) − g(0) − ε Σ a₀| / |g(ε) − g(0)|.
    """
    base = g.ends[0, row].item()
    strengths = torch.tensor(STRENGTHS, dtype=torch.float64)
    shifts = g.along(STRENGTHS)[:, row].cpu().double() - base
    errors = (shifts - strengths * sum_of_first).abs() / shifts.abs()
    return float(errors.max())


def _verdict(g: Evaluations, row: int, total: float, worst: float) -> str:
    """The kind of verdict that `ll.remainder` gives on one question.

    Args:
        g: the function.
        row: the question.
        total: the sum of first order at 0.
        worst: the error of first order on the way, as a share (`_error_on_way`).
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


def rounded_throughout(value: Any) -> Any:
    """Round every number of nested lists and dictionaries to four digits."""
    if isinstance(value, Mapping):
        return {key: rounded_throughout(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded_throughout(part) for part in value]
    return rounded(value)


def recipes_of(base: str) -> tuple[Recipe, ...]:
    """The plants of a base: the embedded model's, or a second base's."""
    return RECIPES if is_embedded(base) else SECOND


def collected(folder: Path, base: str) -> dict[str, Any]:
    """What is stored about a base: the plants that are in the folder, and how they were made."""
    plants: dict[str, Any] = {}
    for recipe in recipes_of(base):
        file = folder / f"{recipe.name}.json"
        if file.is_file():
            plants[recipe.name] = json.loads(file.read_text())
    option = "" if is_embedded(base) else f" --base {Path(base).name}"
    return {"about": {"command": COMMAND + option, **versions()}, "plants": plants}


def with_kept(plants: Mapping[str, Any], kept: Mapping[str, Any], base: str) -> dict[str, Any]:
    """New plants and kept ones, in the order of the recipes. A new one replaces a kept one."""
    both = {**kept, **plants}
    return {recipe.name: both[recipe.name] for recipe in recipes_of(base) if recipe.name in both}


def merged_numbers(
    stored: Mapping[str, Any], folder: Path, base: str, *, keep_others: bool
) -> dict[str, Any]:
    """The numbers of docs/planted.json with those of one base replaced.

    Args:
        stored: the numbers as they are.
        folder: of results, one file a plant.
        base: the embedded model's name, or another base's folder.
        keep_others: whether plants of this base that are not in the folder stay as they are.

    Returns:
        `about` and `plants` of the embedded model, and the same of other bases in `elsewhere`.
    """
    elsewhere = dict(stored.get("elsewhere", {}))
    name = Path(base).name
    of_base = stored if is_embedded(base) else elsewhere.get(name, {})
    new = collected(folder, base)
    if keep_others:
        new["plants"] = with_kept(new["plants"], of_base.get("plants", {}), base)
    if is_embedded(base):
        return {**new, "elsewhere": elsewhere}
    elsewhere[name] = new
    return {"about": stored["about"], "plants": stored["plants"], "elsewhere": elsewhere}


def one_line_per_plant(numbers: Mapping[str, Any]) -> str:
    """The numbers as JSON with a line for each plant, so that a diff shows which have changed."""
    others: dict[str, str] = {}
    for name, of_base in numbers["elsewhere"].items():
        others[name] = in_one_line(parts_of_base(of_base))
    return in_one_line({**parts_of_base(numbers), "elsewhere": by_lines(others)}) + "\n"


def parts_of_base(of_base: Mapping[str, Any]) -> dict[str, str]:
    """What is stored about one base, each part as JSON."""
    plants = {name: json.dumps(plant) for name, plant in of_base["plants"].items()}
    return {"about": json.dumps(of_base["about"]), "plants": by_lines(plants)}


def in_one_line(members: Mapping[str, str]) -> str:
    """A JSON object whose values are JSON already."""
    pairs = [f"{json.dumps(name)}: {value}" for name, value in members.items()]
    return "{" + ", ".join(pairs) + "}"


def by_lines(members: Mapping[str, str]) -> str:
    """A JSON object whose values are JSON already, with a line for each."""
    pairs = [f"{json.dumps(name)}: {value}" for name, value in members.items()]
    return "{\n" + ",\n".join(pairs) + "\n}"


def write(folder: Path, base: str, *, keep_others: bool = False) -> None:
    """Write docs/planted.json with what is in a folder. The arguments are `merged_numbers`'s."""
    stored = json.loads(NUMBERS.read_text())
    numbers = merged_numbers(stored, folder, base, keep_others=keep_others)
    NUMBERS.write_text(one_line_per_plant(numbers))


def judge(bed: Bed, recipe: Recipe) -> dict[str, Any]:
    """Plant by a recipe, confirm and judge: all that is stored, and the seconds that it took."""
    start = time.process_time()
    plant = planted(bed, recipe)
    result = described(recipe, plant)
    if plant.enters:
        result |= measured(bed, plant, recipe.kind)
    result["seconds"] = time.process_time() - start
    return rounded_throughout(result)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plant, confirm and judge.")
    parser.add_argument("--cache", type=Path, required=True, help="folder of results, one a plant")
    parser.add_argument("--only", nargs="+", help="names of plants")
    parser.add_argument("--base", default=EMBEDDED_NAME, help="the embedded model, or a folder")
    options = parser.parse_args()
    recipes = list(recipes_of(options.base))
    refuse_unknown(parser, options.only, [recipe.name for recipe in recipes])
    options.cache.mkdir(parents=True, exist_ok=True)
    if options.only:
        recipes = [recipe for recipe in recipes if recipe.name in options.only]
    to_do = [recipe for recipe in recipes if not (options.cache / f"{recipe.name}.json").is_file()]
    bed = Bed.of(*load_base(options.base)) if to_do else None
    for recipe in tqdm(to_do, desc="plants"):
        result = judge(bed, recipe)
        # The file appears under its name only when it is whole.
        unfinished = options.cache / f"{recipe.name}.part"
        unfinished.write_text(json.dumps(result) + "\n")
        unfinished.rename(options.cache / f"{recipe.name}.json")
    write(options.cache, options.base, keep_others=bool(options.only))


if __name__ == "__main__":
    main()
