"""Sections of the page on faithfulness, as markdown tables, from stored numbers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pandas as pd

from benchmarks.evidence.intervals import summary
from benchmarks.evidence.results import Numbers, cases_of
from benchmarks.evidence.tables import (
    END,
    FIRST,
    HALF,
    MAIN,
    Question,
    by_prompts,
    cost_table,
    markdown,
    named,
    number,
    of_question,
    question_table,
    span,
    with_worst,
)
from benchmarks.evidence.violent import BROKEN, Counts, confusion, curve, warned_cases
from benchmarks.evidence.words import (
    ADD,
    ADD_ELSEWHERE,
    ADD_ERROR,
    CLOSE,
    FEW,
    FLOORS,
    KEEP,
    OUT,
    OUT_ELSEWHERE,
    OUT_ERROR,
    SUM,
)
from lens_lora.core import Attribution

SIGNALS = {
    "strength": "‖ΔW‖ / ‖W‖",
    "shift": "the shift itself",
    "sum_off_0": "Σ first order at 0 off the shift",
    "sum_off_1": "Σ first order at 1 off the shift",
    "ends_apart": "ranks at 0 and at 1 apart",
    "half_apart_0": "ranks at ½ and at 0 apart",
    "half_apart_1": "ranks at ½ and at 1 apart",
    "relative_gap": "first order at 1 and at 0 apart",
    "path_gap": "four nodes of the path off the shift",
    "strongest": "‖ΔW‖ / ‖W‖ of the strongest module",
    "way": "first order at 0 off the shift on the way",
}
KL_SPLITS = {
    "shares": ("½ vᵀFv, `ll.kl_shares`", "5"),
    END: ("gradient of the KL at 1", "3"),
    HALF: ("gradient of the KL at ½", "3"),
    "path/2": ("path, 2 nodes", "6"),
}
ERRORS = ("error", "error_fixed", "error_corrected")
Warned = dict[str, Any]
WARNED_OF = {
    "leave_one_out": ("Leaving one module out, by first order at 1", OUT, END),
    "add_one": ("Adding one module, by first order at 0", ADD, FIRST),
}
WAYS = {"median": "median", "mean": "bootstrapped mean"}
WARNED_HEAD = ["on the tasks that choose", "on those that confirm"]
SECTIONS = (
    ("Adding one module", (ADD, ADD_ERROR)),
    ("Leaving one module out", (OUT, OUT_ERROR)),
    ("Dividing the shift", (SUM,)),
    ("Which modules carry the shift", (KEEP, CLOSE)),
    ("The best fifth of the modules", (FEW,)),
)


def sections(scores: pd.DataFrame, costs: pd.DataFrame, base: str) -> list[tuple[str, str]]:
    """Title and table of each question that a base was asked, and what every method costs."""
    tables = []
    for title, questions in SECTIONS:
        is_asked = len(of_question(scores, questions[0], base)) > 0
        if is_asked:
            tables.append((title, question_table(scores, questions, base)))
    tables.append(("Costs", cost_table(costs, base)))
    return tables


def other_prompts(scores: pd.DataFrame, base: str) -> list[tuple[str, str]]:
    """The main methods by kind of prompt; where modules are kept, beside their floors."""
    methods_of = dict.fromkeys((ADD, ADD_ELSEWHERE, OUT, OUT_ELSEWHERE), MAIN)
    for question in (KEEP, CLOSE):
        methods_of[question] = (*MAIN, *FLOORS)
    tables = []
    for question, methods in methods_of.items():
        title = f"{question.words} ({question.metric})"
        tables.append((title, by_prompts(scores, question, base, methods)))
    return tables


def second_order(scores: pd.DataFrame, costs: pd.DataFrame, base: str) -> list[tuple[str, str]]:
    """Errors on the first trained prompt, where the diagonal of H was computed."""
    tables = []
    for question in (ADD_ERROR, OUT_ERROR):
        on_first = dataclasses.replace(question, prompts=("trained, first",))
        tables.append((on_first.words, question_table(scores, [on_first], base, costs)))
    return tables


def flags(warned: Warned) -> str:
    """How the flags of `ll.reliability` fare on the tasks that chose nothing, by question."""
    rows = []
    for how, words in (("add_one", ADD.short), ("leave_one_out", OUT.short)):
        cases = _confirming(warned, lambda kind, how=how: kind["flags"][how])
        total = cases[["wrong", "flagged", "hit"]].sum()
        precision = _share(total["hit"], total["flagged"])
        recall = _share(total["hit"], total["wrong"])
        means = cases.groupby("cluster")[list(ERRORS)].mean()
        errors = [with_worst(summary(means[e], larger_is_better=False)) for e in ERRORS]
        silent = f"{int((cases['flagged'] == 0).sum())} of {len(cases)}"
        run = f"{cases['screened'].median():.0f}"
        rows.append([words, str(len(means)), silent, precision, recall, *errors, run])
    head = ["question", "tasks", "no flag", "precision", "recall", "plain", "flagged", "all", "run"]
    return markdown(head, rows)


def _confirming(warned: Warned, fields_of: Callable[[Warned], dict[str, float]]) -> pd.DataFrame:
    """One row per case of the tasks that chose nothing: its cluster, and fields of the case."""
    rows = []
    for one in warned.values():
        if not one["confirms"]:
            continue
        for kind in one["kinds"].values():
            rows.append({"cluster": one["cluster"], **fields_of(kind)})
    return pd.DataFrame(rows)


def _share(part: int, whole: int) -> str:
    """A share with two digits, and a dash where the whole is zero."""
    if not whole:
        return "—"
    return f"{part / whole:.2f}"


def warnings(numbers: Numbers, scores: pd.DataFrame, base: str) -> list[str]:
    """How many cases of each question are broken, and every warning's counts, the best first.

    The adapters of the page choose too, where they were measured.
    """
    parts = []
    for how, (words, question, method) in WARNED_OF.items():
        stored = own_cases(numbers, scores, question, base)
        stored = stored[stored["method"] == method]
        of_page = stored.assign(confirms=False, broken=stored["agreement"] < BROKEN)
        cases = pd.concat([warned_cases(numbers["warned"], how), of_page], ignore_index=True)
        choosing = _broken_count(cases[~cases["confirms"]])
        confirming = _broken_count(cases[cases["confirms"]])
        parts.append(
            f"**{words}.** Broken: {choosing} on the tasks that choose, {confirming} on those that "
            "confirm."
        )
        parts.append(_signal_table(cases))
    return parts


def _broken_count(cases: pd.DataFrame) -> str:
    """How many cases are broken, and of how many adapters they are."""
    broken = cases[cases["broken"]]
    return f"{len(broken)} of {len(cases)} cases ({broken['adapter'].nunique()} adapters)"


def _signal_table(cases: pd.DataFrame) -> str:
    """One line per signal with its threshold and counts, the best on the choosing tasks first."""
    found = {name: confusion(cases, signal) for signal, name in SIGNALS.items()}
    rows = []
    for name in sorted(found, key=lambda name: -found[name][1].f1):
        threshold, choosing, confirming = found[name]
        rows.append([name, f"{threshold:.3g}", _counted(choosing), _counted(confirming)])
    return markdown(["warning: … above", "threshold", *WARNED_HEAD], rows)


def warned_elsewhere(numbers: Numbers, scores: pd.DataFrame, base: str) -> str:
    """Count cases that the library warns of, on a base that chose and confirmed nothing."""
    parts = []
    for words, question, method in WARNED_OF.values():
        cases = own_cases(numbers, scores, question, base)
        cases = cases[cases["method"] == method]
        warned = cases["strength"] > Attribution.VIOLENT
        broken = cases["agreement"] < BROKEN
        both = warned & broken
        parts.append(
            f"{words[0].lower()}{words[1:]}: {int(warned.sum())} of {len(cases)} cases warned of, "
            f"{int(broken.sum())} broken, {int(both.sum())} both"
        )
    return f"On {base}, {'; '.join(parts)}."


def kl_ranks(warned: Warned) -> tuple[str, str]:
    """On the tasks that chose nothing: how a KL's split is ranked, and how the verdict fares."""
    cases = _confirming(warned, lambda kind: kind["kl"])
    means = cases.groupby("cluster").mean()
    rows = []
    for key, (name, passes) in KL_SPLITS.items():
        found = summary(means[key])
        rows.append([name, str(found.tasks), span(found), number(found.worst), passes])
    with_path = cases["shares"]
    with_half = cases[f"shares, {HALF}"]
    with_end = cases[f"shares, {END}"]
    broken = int((with_path < BROKEN).sum())
    judged_broken = int((with_half < BROKEN).sum())
    half_gap = (with_half - with_path).abs().mean()
    end_gap = (with_end - with_path).abs().mean()
    says = (
        f"The shares are broken in {broken} of {len(cases)} cases; "
        f"their `verdict` says so in {judged_broken}. Their rank "
        f"correlation with the gradient at ½ is within {half_gap:.2f} of that with the path's "
        f"split in the mean, with the gradient at 1 within {end_gap:.2f}."
    )
    return markdown(["numbers", "tasks", "median", "worst", "passes"], rows), says


def _counted(counts: Counts) -> str:
    return f"{counts.hit} · {counts.false} · {counts.missed} · {counts.silent}"


def violent(numbers: Numbers, scores: pd.DataFrame, base: str) -> list[str]:
    """The rank correlations of the main methods by strength, as a table for each question."""
    parts = []
    for question, method in ((ADD, FIRST), (OUT, END)):
        cases = own_cases(numbers, scores, question, base)
        curves = curve(cases[cases["method"].isin(MAIN)])
        strengths = [f"{at:.2g}, {found.tasks} tasks" for at, found in curves[method]]
        rows = []
        for shown in MAIN:
            if shown in curves:
                correlations = [span(found) for _, found in curves[shown]]
                rows.append([named(shown), *correlations])
        parts.append(
            f"**{question.words}** Rank correlation in quarters of the adapters, by strength "
            f"(median ‖ΔW‖ / ‖W‖ of each)."
        )
        parts.append(markdown(["method", *strengths], rows))
    return parts


def own_cases(
    numbers: Numbers, scores: pd.DataFrame, question: Question, base: str
) -> pd.DataFrame:
    """The cases of a question on one base, on the kinds of prompt that the question is of."""
    cases = cases_of(numbers, scores, question.key)
    return cases[(cases["base"] == base) & cases["prompts"].isin(question.prompts)]


def coverage(resampled: Numbers) -> str:
    """How often each interval holds the number of all tasks, by how many a sample has."""
    columns = list(itertools.product(WAYS, ("17", "6")))
    head = [f"{WAYS[way]}, {size}" for way, size in columns]
    rows = []
    for label, found in resampled["coverage"].items():
        shares = [f"{found[size][way]:.3f}" for way, size in columns]
        rows.append([label, named(found["method"]), *shares])
    return markdown(["number", "method", *head], rows)


def adapters(numbers: Numbers) -> str:
    """One line per adapter, by task: how it was trained, its strength and its shift."""
    rows = []
    for name, one in sorted(numbers["adapters"].items(), key=lambda item: item[1]["cluster"]):
        base, adapted = one["ends"]["trained"][0]
        variants = [word for word in ("dora", "rslora") if one[word]]
        strength = one["signals"]["trained"]["strength"]
        cells = {
            "adapter": name,
            "task": one["cluster"],
            "base": one["base"],
            "kind": one["kind"],
            "rank": str(one["rank"]),
            "targets": one["targets"],
            "rate": f"{one['lr']:g}",
            "variant": " ".join(variants) or "—",
            "‖ΔW‖ / ‖W‖": f"{strength:.2g}",
            "readout, first trained prompt": f"{base:+.1f} → {adapted:+.1f}",
        }
        rows.append(cells)
    return markdown(list(rows[0]), [list(cells.values()) for cells in rows])
