"""Sections of the page on faithfulness, as markdown tables, from stored numbers."""

from __future__ import annotations

import dataclasses

import pandas as pd
from intervals import interval
from results import Numbers, cases_of
from tables import (
    END,
    FIRST,
    MAIN,
    Question,
    by_prompts,
    markdown,
    named,
    of_question,
    question_table,
    span,
)
from violent import BROKEN, curve, warnings_of
from words import (
    ADD,
    ADD_ELSEWHERE,
    ADD_ERROR,
    CLOSE,
    FEW,
    KEEP,
    OUT,
    OUT_ELSEWHERE,
    OUT_ERROR,
    SUM,
)

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
}
OWN_FIRST, OWN_END = "second_order/add_one@0", "second_order/leave_one_out@1"
ERRORS = ("first_order_at_0", "corrected", "fixed", "plain", "equal_cost")
SECTIONS = (
    ("Adding one module", (ADD, ADD_ERROR)),
    ("Leaving one module out", (OUT, OUT_ERROR)),
    ("Dividing the shift", (SUM,)),
    ("Which modules carry the shift", (KEEP, CLOSE)),
    ("The best fifth of the modules", (FEW,)),
)


def sections(scores: pd.DataFrame, costs: pd.DataFrame, base: str) -> list[tuple[str, list[str]]]:
    """Title and tables of each question."""
    return [
        (title, [question_table(scores, costs, question, base) for question in questions])
        for title, questions in SECTIONS
    ]


def other_prompts(scores: pd.DataFrame, base: str) -> list[tuple[str, str]]:
    return [
        (f"{question.words} ({question.metric})", by_prompts(scores, question, base, MAIN))
        for question in (ADD, ADD_ELSEWHERE, OUT, OUT_ELSEWHERE, KEEP, CLOSE)
    ]


def second_order(
    scores: pd.DataFrame, costs: pd.DataFrame, base: str
) -> list[tuple[str, str, str]]:
    """Errors on the first trained prompt, where the diagonal of H was computed, and medians."""
    found = []
    for question, first, second in ((ADD_ERROR, FIRST, OWN_FIRST), (OUT_ERROR, END, OWN_END)):
        one = dataclasses.replace(question, prompts=("trained, first",))
        table = question_table(scores, costs, one, base)
        found.append((question.words, table, _medians(scores, one, base, first, second)))
    return found


def _medians(scores: pd.DataFrame, question: Question, base: str, first: str, second: str) -> str:
    """On how many adapters second order is nearer, as a mean may be that of one adapter."""
    rows = of_question(scores, question, base)
    each = rows.pivot_table(index="adapter", columns="method", values="value")[[first, second]]
    each = each.dropna()
    nearer, medians = int((each[second] < each[first]).sum()), each.median()
    return (
        f"{named(second)} is nearer than {named(first)} on {nearer} of {len(each)} adapters: its "
        f"median error is {medians[second]:.2g}, beside {medians[first]:.2g}. It errs most on "
        f"{each[second].idxmax()}, by {each[second].max():.2g}."
    )


def flags(table: pd.DataFrame) -> str:
    """One line per question and base: flags beside the plain answer and what equal passes buy."""
    rows = []
    for (question, base), found in table.groupby(["question", "base"], sort=False):
        total = found[["sites", "wrong", "flagged", "hit"]].sum()
        errors = [
            span(interval(found.groupby("cluster")[f"error_{name}"].mean())) for name in ERRORS
        ]
        shares = [
            f"{total['hit'] / total[of]:.2f}" if total[of] else "—" for of in ("flagged", "wrong")
        ]
        best = found[["error_fixed", "error_corrected"]].min(axis=1)
        gain = found.assign(value=found["error_equal_cost"] - best)
        ahead = interval(gain.groupby("cluster")["value"].mean())
        kind = "a measurement" if found["is_measurement"].all() else "an estimate"
        words = str(question).replace("_", " ")
        passes = f"{found['passes'].median():.0f}"
        rows.append([words, str(base), kind, *shares, *errors, span(ahead), passes])
    rows.sort(key=lambda row: row[0])
    head = ["question", "on", "the screen is", "precision", "recall", "at 0", "screened"]
    more = ["flagged run", "plain", "equal passes", "flags ahead by", "passes"]
    return markdown([*head, *more], rows)


def violent(numbers: Numbers, scores: pd.DataFrame, base: str) -> list[str]:
    """Curves over strength as a table, and warnings with their precision and recall."""
    parts = []
    for question, method in ((ADD, FIRST), (OUT, END)):
        cases = own_cases(numbers, scores, question, base)
        curves = curve(cases[cases["method"].isin(MAIN)])
        strengths = [f"{at:.2g}" for at, _ in curves[method]]
        rows = [[named(m), *(span(found) for _, found in curves[m])] for m in MAIN if m in curves]
        parts.append(
            f"**{question.words}** Rank correlation in quarters of the adapters, by strength "
            f"(median ‖ΔW‖ / ‖W‖ of each)."
        )
        parts.append(markdown(["method", *strengths], rows))
        parts += warning_table(cases, method)
    return parts


def own_cases(
    numbers: Numbers, scores: pd.DataFrame, question: Question, base: str
) -> pd.DataFrame:
    cases = cases_of(numbers, scores, question.key)
    return cases[(cases["base"] == base) & cases["prompts"].isin(question.prompts)]


def warning_table(cases: pd.DataFrame, method: str) -> list[str]:
    """Signals by their F1, best first."""
    rows = []
    for signal, (found, threshold) in warnings_of(cases, method, list(SIGNALS)).items():
        both = found.precision + found.recall
        score = 2 * found.precision * found.recall / both if both > 0 else 0.0
        shares = [
            "—" if share != share else f"{share:.2f}" for share in (found.precision, found.recall)
        ]
        cells = [SIGNALS[signal], f"{threshold:.3g}", *shares, f"{found.hit} of {found.warned}"]
        rows.append((score, cells))
    rows.sort(key=lambda row: -row[0])
    of_method = cases[cases["method"] == method]
    wrong = of_method[of_method["agreement"] < BROKEN]
    broken, total = len(wrong), len(of_method)
    head = ["warning: … above", "threshold", "precision", "recall", "right"]
    says = (
        f"{named(method).capitalize()} is broken (below {BROKEN}) in {broken} of {total} cases (an "
        "adapter on one kind of prompt)."
    )
    if not broken:
        return [f"{says} There is nothing to warn of."]
    if wrong["cluster"].nunique() < 2:
        return [f"{says} They are of one task, so no warning can be judged on another."]
    says += " Warnings, on tasks that their threshold was not chosen on:"
    return [says, markdown(head, [cells for _, cells in rows])]


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
