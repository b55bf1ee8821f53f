"""Sections of the page on faithfulness, as markdown tables, from stored numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd
from intervals import summary
from results import Numbers, cases_of
from tables import (
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
from violent import BROKEN, Counts, confusion, curve, warned_cases
from words import (
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

from lens_lora.core import VIOLENT

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
    asked = [
        (title, question_table(scores, questions, base))
        for title, questions in SECTIONS
        if len(of_question(scores, questions[0], base))
    ]
    return [*asked, ("Costs", cost_table(costs, base))]


def other_prompts(scores: pd.DataFrame, base: str) -> list[tuple[str, str]]:
    """The main methods by kind of prompt; where modules are kept, beside their floors."""
    main = dict.fromkeys((ADD, ADD_ELSEWHERE, OUT, OUT_ELSEWHERE), MAIN)
    return [
        (f"{question.words} ({question.metric})", by_prompts(scores, question, base, methods))
        for question, methods in {**main, KEEP: (*MAIN, *FLOORS), CLOSE: (*MAIN, *FLOORS)}.items()
    ]


def second_order(scores: pd.DataFrame, costs: pd.DataFrame, base: str) -> list[tuple[str, str]]:
    """Errors on the first trained prompt, where the diagonal of H was computed."""
    asked = [dataclasses.replace(of, prompts=("trained, first",)) for of in (ADD_ERROR, OUT_ERROR)]
    return [(one.words, question_table(scores, [one], base, costs)) for one in asked]


def flags(warned: Warned) -> str:
    """How the flags of `ll.reliability` fare on the tasks that chose nothing, by question."""
    rows = []
    for how, words in (("add_one", ADD.short), ("leave_one_out", OUT.short)):
        found = pd.DataFrame(
            [
                {"cluster": one["cluster"], **of["flags"][how]}
                for one in warned.values()
                for of in one["kinds"].values()
                if one["confirms"]
            ]
        )
        total = found[["wrong", "flagged", "hit"]].sum()
        shares = [
            f"{total['hit'] / total[of]:.2f}" if total[of] else "—" for of in ("flagged", "wrong")
        ]
        means = found.groupby("cluster")[list(ERRORS)].mean()
        errors = [with_worst(summary(means[e], larger_is_better=False)) for e in ERRORS]
        silent = f"{int((found['flagged'] == 0).sum())} of {len(found)}"
        run = f"{found['screened'].median():.0f}"
        rows.append([words, str(len(means)), silent, *shares, *errors, run])
    head = ["question", "tasks", "no flag", "precision", "recall", "plain", "flagged", "all", "run"]
    return markdown(head, rows)


def warnings(numbers: Numbers, scores: pd.DataFrame, base: str) -> list[str]:
    """How many cases of each question are broken, and every warning's counts, the best first.

    The adapters of the page choose too, where they were measured.
    """
    parts = []
    for how, (words, asked, method) in WARNED_OF.items():
        stored = own_cases(numbers, scores, asked, base)
        stored = stored[stored["method"] == method]
        of_page = stored.assign(confirms=False, broken=stored["agreement"] < BROKEN)
        cases = pd.concat([warned_cases(numbers["warned"], how), of_page], ignore_index=True)
        found = {name: confusion(cases, signal) for signal, name in SIGNALS.items()}
        order = sorted(found, key=lambda name: -found[name][1].f1)
        rows = [[name, f"{found[name][0]:.3g}", *map(_counted, found[name][1:])] for name in order]
        counts = [
            f"{int(some['broken'].sum())} of {len(some)} cases ({adapters} adapters)"
            for confirms, some in cases.groupby("confirms")
            if (adapters := some[some["broken"]]["adapter"].nunique()) is not None
        ]
        parts.append(
            f"**{words}.** Broken: {counts[0]} on the tasks that choose, {counts[1]} on those that "
            "confirm."
        )
        parts.append(markdown(["warning: … above", "threshold", *WARNED_HEAD], rows))
    return parts


def warned_elsewhere(numbers: Numbers, scores: pd.DataFrame, base: str) -> str:
    """What the library's warning says on a base that chose and confirmed nothing."""
    parts = []
    for words, asked, method in WARNED_OF.values():
        cases = own_cases(numbers, scores, asked, base)
        cases = cases[cases["method"] == method]
        warned = cases["strength"] > VIOLENT
        broken = cases["agreement"] < BROKEN
        parts.append(
            f"{words[0].lower()}{words[1:]}: {int(warned.sum())} of {len(cases)} cases warned of, "
            f"{int(broken.sum())} broken, {int((warned & broken).sum())} both"
        )
    return f"On {base}, {'; '.join(parts)}."


def kl_ranks(warned: Warned) -> tuple[str, str]:
    """On the tasks that chose nothing: how a KL's split is ranked, and how the verdict fares."""
    found = pd.DataFrame(
        [
            {"cluster": one["cluster"], **of["kl"]}
            for one in warned.values()
            for of in one["kinds"].values()
            if one["confirms"]
        ]
    )
    each = {key: summary(values) for key, values in found.groupby("cluster").mean().items()}
    rows = [
        [name, str(each[key].tasks), span(each[key]), number(each[key].worst), passes]
        for key, (name, passes) in KL_SPLITS.items()
    ]
    apart = {key: (found[f"shares, {key}"] - found["shares"]).abs().mean() for key in (HALF, END)}
    says = (
        f"The shares are broken in {int((found['shares'] < BROKEN).sum())} of {len(found)} cases; "
        f"their `verdict` says so in {int((found[f'shares, {HALF}'] < BROKEN).sum())}. Their rank "
        f"correlation with the gradient at ½ is within {apart[HALF]:.2f} of that with the path's "
        f"split in the mean, with the gradient at 1 within {apart[END]:.2f}."
    )
    return markdown(["numbers", "tasks", "median", "worst", "passes"], rows), says


def _counted(counts: Counts) -> str:
    return f"{counts.hit} · {counts.false} · {counts.missed} · {counts.silent}"


def violent(numbers: Numbers, scores: pd.DataFrame, base: str) -> list[str]:
    """Curves over strength as a table."""
    parts = []
    for question, method in ((ADD, FIRST), (OUT, END)):
        cases = own_cases(numbers, scores, question, base)
        curves = curve(cases[cases["method"].isin(MAIN)])
        strengths = [f"{at:.2g}, {found.tasks} tasks" for at, found in curves[method]]
        rows = [[named(m), *(span(found) for _, found in curves[m])] for m in MAIN if m in curves]
        parts.append(
            f"**{question.words}** Rank correlation in quarters of the adapters, by strength "
            f"(median ‖ΔW‖ / ‖W‖ of each)."
        )
        parts.append(markdown(["method", *strengths], rows))
    return parts


def own_cases(
    numbers: Numbers, scores: pd.DataFrame, question: Question, base: str
) -> pd.DataFrame:
    cases = cases_of(numbers, scores, question.key)
    return cases[(cases["base"] == base) & cases["prompts"].isin(question.prompts)]


def coverage(resampled: Numbers) -> str:
    """How often each interval holds the number of all tasks, by how many a sample has."""
    rows = [
        [asked, named(of["method"]), *(f"{of[n][key]:.3f}" for key in WAYS for n in ("17", "6"))]
        for asked, of in resampled["coverage"].items()
    ]
    head = [f"{words}, {n}" for words in WAYS.values() for n in ("17", "6")]
    return markdown(["number", "method", *head], rows)


def adapters(numbers: Numbers) -> str:
    rows = []
    for name, one in sorted(numbers["adapters"].items(), key=lambda item: item[1]["cluster"]):
        base, adapted = one["ends"]["trained"][0]
        extra = " ".join(word for word in ("dora", "rslora") if one[word])
        strength_ = one["signals"]["trained"]["strength"]
        cells = [name, one["cluster"], one["base"], one["kind"], str(one["rank"]), one["targets"]]
        how = [f"{one['lr']:g}", extra or "—", f"{strength_:.2g}", f"{base:+.1f} → {adapted:+.1f}"]
        rows.append([*cells, *how])
    head = ["adapter", "task", "base", "kind", "rank", "targets", "rate", "variant"]
    return markdown([*head, "‖ΔW‖ / ‖W‖", "readout, first trained prompt"], rows)
