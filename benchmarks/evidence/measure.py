"""Measure every method of attribution on every adapter of a folder, against real interventions.

    python -m benchmarks.evidence.measure --adapters FOLDER --out RESULTS [--again] [--only NAME …]

Each FOLDER/<name>/ holds a PEFT adapter and task.json: name, cluster (the training task), base,
kind, rank, targets, lr, steps, dora, rslora, and prompts {trained, paraphrase, neighbour,
unrelated}, each a list of {prompt, doc, pre} or {prompt, response}. For each adapter one file,
RESULTS/<name>.json; those that are there are left alone, so a run may be interrupted. So are those
of which docs/faithfulness.json holds numbers, unless `--again`.

1. On each kind of prompt: every score (`methods.py`) and the measured effects of every site.
2. Agreement of scores with effects, and rankings made on the trained wording judged on each kind
   (`scored.py`).
3. What each costs (`counted.py`), counted and timed on the trained wording.
4. What is attainable: the best fifth of the sites that is found (`ll.best_subset`), on the trained
   wording and, as a ceiling of its own, on the paraphrases.
5. Null adapters, and signals that cost no intervention.

Of long prompts (with a response) one of each kind is taken, without path/8, hessian_steps/4 and
the diagonal of H. Four minutes of one core an adapter, some fifteen with long prompts.

With `--lean` it is a minute, for a base of a large vocabulary: one prompt of each kind and no
neighbours, a response by its first three tokens, neither held rules nor the best fifth nor the
diagonal of H; on unrelated text the main methods alone. `--only` is an order too.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

import lens_lora as ll
from benchmarks.evidence.counted import Cost, Counter, plain_seconds
from benchmarks.evidence.methods import (
    COMPOSED,
    CURVATURE,
    EFFECTS,
    PARTS,
    curvature,
    methods_of,
    parts_for,
)
from benchmarks.evidence.results import read, rounded
from benchmarks.evidence.scored import Judge, Row, agreement, held_out, sums
from benchmarks.evidence.signals import signals_of
from benchmarks.evidence.trained_cases import (
    Case,
    by_sites,
    cases_in,
    chosen,
    is_long,
    lean,
    lens_of,
    question,
    questions_of,
    unrelated_case,
)
from lens_lora._version import versions
from lens_lora.core import Evaluations
from lens_lora.errors import LensLoraError
from lens_lora.judging.best_subset import best_subset

# The kinds of prompt that ask what was trained.
OWN = ("trained", "paraphrase")
FIFTH = 0.2
_NULL_SEED = 0
# Names that `ll.best_subset` keeps for its own starts.
BASELINES = ("weight_norm", "update_norm")


@dataclasses.dataclass
class Run:
    """One adapter's measurements as they come.

    Attributes:
        case: the adapter and its prompts.
        lens: the lens over its base.
        most: how many prompts of each kind are taken.
        is_long: whether the prompts are long, so that less is run.
        is_lean: whether the protocol is the lean one.
        rows: the rows of the long table of scores.
        costs: the cost of each part or method, over the prompts that it was timed on.
        left_out: the reason for each part or method that the library refused to run.
    """

    case: Case
    lens: ll.LoraLens
    most: int
    is_long: bool
    is_lean: bool = False
    rows: list[Row] = dataclasses.field(default_factory=list[Row])
    costs: dict[str, Cost] = dataclasses.field(default_factory=dict[str, Cost])
    left_out: dict[str, str] = dataclasses.field(default_factory=dict[str, str])

    def timed(self, key: str, work: Callable[[], Any]) -> Any:
        """Do the work and keep its cost; None where the library refuses it."""
        try:
            result, cost = Counter(self.lens).run(work)
        except LensLoraError as error:
            self.left_out[key] = str(error)
            return None
        self.costs[key] = cost
        return result

    def parts(self, kind: str, g: Evaluations) -> dict[str, Tensor]:
        """Every part on these prompts; its cost is counted on the trained wording."""
        found: dict[str, Tensor] = {}
        works = parts_for(kind, is_long=self.is_long, is_lean=self.is_lean)
        for key in tqdm(works, desc=f"{self.case.name}, {kind}", leave=False):
            if key in self.left_out:
                continue
            work = functools.partial(works[key], g)
            values = self.timed(key, work) if kind == "trained" else work()
            if values is not None:
                found[key] = values.cpu().double()
        return found


def measure(case: Case, every: list[Case], most: int, *, is_lean: bool = False) -> dict[str, Any]:
    """Run the whole protocol on one adapter; the result is what its file holds."""
    start = time.process_time()
    run = run_of(case, most, is_lean=is_lean)
    questions = questions_of(run.case, run.lens, run.most)
    for g in questions.values():
        compute_ends(g)
    parts = {kind: run.parts(kind, g) for kind, g in questions.items()}
    trained_rows = questions["trained"].reading.rows
    plain = plain_seconds(run.lens, trained_rows)
    scores = {kind: methods_of(of_kind) for kind, of_kind in parts.items()}
    nulls = null_scores(run, every)
    sets: dict[str, Tensor] = {}
    ceilings: dict[str, Any] = {}
    if not is_lean:
        sets, ceilings = ceilings_of(run, scores)
    judge = Judge(questions["trained"], {**scores["trained"], **nulls}, sets)
    for kind, g in questions.items():
        effects = {how: parts[kind][how] for how in EFFECTS}
        run.rows += rows_of_kind(kind, g, scores, effects, judge)
    curvature_costs: dict[str, dict[str, float]] = {}
    if not (is_lean or run.is_long):
        curvature_costs = curvature_rows(run)
    costs = costs_of(run, trained_rows.tokens.shape[0], plain)
    return {
        **run.case.described,
        "sites": len(run.lens.sites),
        "lean": is_lean,
        "questions": {kind: described(g) for kind, g in questions.items()},
        "scores": [clean(row) for row in run.rows],
        "costs": {**costs, **curvature_costs},
        "ceilings": ceilings,
        "signals": {kind: signals_of(g, parts[kind]) for kind, g in questions.items()},
        "left_out": run.left_out,
        "plain_pass_seconds": plain,
        "seconds": time.process_time() - start,
        "versions": versions(),
    }


def run_of(case: Case, most: int, *, is_lean: bool) -> Run:
    """The run of an adapter, with its lens; long prompts and the lean protocol take one of each."""
    lens = lens_of(case)
    if is_lean:
        case = lean(case, lens.model.tokenizer)
    prompts_are_long = is_long(case, lens)
    takes_one = is_lean or prompts_are_long
    return Run(
        case=case,
        lens=lens,
        most=1 if takes_one else most,
        is_long=prompts_are_long,
        is_lean=is_lean,
    )


def compute_ends(g: Evaluations) -> None:
    """Compute both exact ends and the noise floor, which g keeps.

    No method is charged for them afterwards.
    """
    g.ends  # noqa: B018
    g.floor  # noqa: B018


def rows_of_kind(
    kind: str,
    g: Evaluations,
    scores: dict[str, dict[str, Tensor]],
    effects: dict[str, Tensor],
    judge: Judge,
) -> list[Row]:
    """How well the scores answer each question on one kind of prompt.

    Args:
        kind: the kind of prompt.
        g: over the prompts of this kind.
        scores: each method's values, by kind of prompt.
        effects: the measured effects on these prompts.
        judge: of the rankings that were made on the trained wording.
    """
    rows = agreement(kind, g, scores[kind], effects)
    rows += sums(kind, g, scores[kind])
    if kind != "trained":
        rows += held_out(kind, judge.trained, scores["trained"], g, effects)
    rows += judge.rows(kind, g)
    return rows


def described(g: Evaluations) -> dict[str, Any]:
    """The prompts, the readout, its values on both exact ends, and the noise floor."""
    base, adapted = g.ends.cpu().double()
    return {
        "prompts": ["".join(tokens) for tokens in g.str_tokens],
        "readout": g.labels()["readout"],
        "base": base.tolist(),
        "adapted": adapted.tolist(),
        "noise_floor": g.floor.cpu().double().tolist(),
    }


def null_scores(run: Run, every: list[Case]) -> dict[str, Tensor]:
    """First order at ½ of adapters that know nothing of this task, as rankings of this one."""
    trained_prompts = chosen(run.case, "trained", run.most)

    def ranking_by(make_adapter: Callable[[], ll.Adapter]) -> Tensor:
        lens = lens_of(run.case, make_adapter())
        g = question(lens, trained_prompts)
        first = ll.first_order(lens, g.prompts, g.readout, at=0.5)
        return by_sites(first, run.lens)

    adapters = {"null_adapter": lambda: run.lens.adapter.null(_NULL_SEED)}
    unrelated = unrelated_case(run.case, every)
    if unrelated is not None:
        adapters["unrelated_adapter"] = lambda: ll.load_adapter(unrelated.folder)
    scores: dict[str, Tensor] = {}
    for key, make_adapter in adapters.items():
        values = run.timed(key, functools.partial(ranking_by, make_adapter))
        if values is not None:
            scores[key] = values.cpu().double()
    return scores


def ceilings_of(
    run: Run, scores: dict[str, dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The best fifth of the sites that is found on each of the adapter's own wordings.

    Returns:
        The sets by key, which are judged on other prompts too, and by kind of prompt what each
        keeps of the shift where it was found.
    """
    sets: dict[str, Tensor] = {}
    kept: dict[str, Any] = {}
    for kind in OWN:
        if kind not in scores:
            continue
        g = question(run.lens, chosen(run.case, kind, run.most))
        starts = {key: values for key, values in scores[kind].items() if key not in BASELINES}
        search = functools.partial(
            best_subset,
            run.lens,
            g.prompts,
            g.readout,
            size=FIFTH,
            starts=starts,
            progress=False,
        )
        key = "best_subset" if kind == "trained" else f"best_subset/{kind}"
        best = run.timed(key, search)
        if best is None:
            continue
        sets[key] = best.members[0]
        kept[kind] = {
            "kept": float(best.kept[0]),
            "found_by": best.found_by[0],
            "count": best.counts[0],
            "gradients": best.gradients,
            "forwards": best.forwards,
        }
    return sets, kept


def curvature_rows(run: Run) -> dict[str, dict[str, float]]:
    """Second order of each effect on the first trained prompt; its costs, for that prompt."""
    first_prompt = run.case.task["prompts"]["trained"][:1]
    g = question(run.lens, first_prompt)
    g.ends  # noqa: B018  (computed here, so that no method is charged for it)
    effects = {how: PARTS[how](g).cpu().double() for how in EFFECTS}
    scores = {key: PARTS[key](g).cpu().double() for key in ("first_order@0", "first_order@1")}
    plain = plain_seconds(run.lens, g.reading.rows)
    rows = g.reading.rows.tokens.shape[0]
    costs: dict[str, dict[str, float]] = {}
    for at, hows in CURVATURE:
        key_of_both = f"curvature@{at:g}"
        expanded = run.timed(key_of_both, functools.partial(curvature, at, hows, g))
        if expanded is None:
            continue
        cost = run.costs.pop(key_of_both)
        # A backward pass of first order, one of the graph, and two through both for each site.
        cost.backward = 2.0 * rows * (1 + len(run.lens.sites))
        for key, values in expanded.items():
            scores[key] = values.cpu().double()
            costs[key] = cost.in_plain_passes(rows, plain)
    run.rows += agreement("trained, first", g, scores, effects)
    return costs


def costs_of(run: Run, rows: int, plain: float) -> dict[str, dict[str, float]]:
    """The cost of each method, in plain passes a prompt; a composed one's is that of its parts."""
    costs = dict(run.costs)
    for key, composed in COMPOSED.items():
        if all(part in run.costs for part in composed.needed):
            costs_of_parts = [run.costs[part] for part in composed.needed]
            costs[key] = sum(costs_of_parts, start=Cost())
    return {key: cost.in_plain_passes(rows, plain) for key, cost in costs.items()}


def clean(row: Row) -> Row:
    """Round a row's value to four digits; it is null where it does not exist."""
    return {**row, "value": rounded(float(row["value"]))}


def main() -> None:
    parser = argparse.ArgumentParser(description="Attributions against interventions.")
    parser.add_argument("--adapters", type=Path, required=True, help="folder of adapters")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--only", nargs="*", help="names of adapters")
    parser.add_argument("--again", action="store_true", help="also what the docs have numbers of")
    parser.add_argument("--most", type=int, default=3, help="prompts of each kind")
    parser.add_argument(
        "--lean", action="store_true", help="one prompt of each kind, fewer methods"
    )
    options = parser.parse_args()
    every = cases_in(options.adapters)
    unknown = set(options.only or ()) - {case.name for case in every}
    if unknown:
        parser.error(f"no adapter {', '.join(sorted(unknown))} in {options.adapters}")
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = in_order(every, options.only)
    stored = set() if options.again else set(read()["adapters"])
    known = sum(case.name in stored for case in wanted)
    if known:
        print(
            f"docs/faithfulness.json has {known} of {len(wanted)} adapters; --again measures them."
        )
    to_do: list[Case] = []
    for case in wanted:
        is_measured = case.name in stored or result_file(options.out, case).is_file()
        if not is_measured:
            to_do.append(case)
    to_do.sort(key=lambda case: case.task["base"])  # so that each base is loaded once
    for case in tqdm(to_do, desc="adapters"):
        result = measure(case, every, options.most, is_lean=options.lean)
        # The file appears under its name only when it is whole.
        unfinished = options.out / f"{case.name}.json.part"
        unfinished.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        unfinished.rename(result_file(options.out, case))
        tqdm.write(f"{case.name}: {result['seconds']:.0f} s")


def result_file(folder: Path, case: Case) -> Path:
    """Where an adapter's result is stored."""
    return folder / f"{case.name}.json"


def in_order(every: list[Case], names: list[str] | None) -> list[Case]:
    """The cases of these names, in their order; of no names all cases, facts first."""
    if names:
        by_name = {case.name: case for case in every}
        return [by_name[name] for name in dict.fromkeys(names)]
    return sorted(every, key=lambda case: case.task["kind"] != "fact")


if __name__ == "__main__":
    main()
