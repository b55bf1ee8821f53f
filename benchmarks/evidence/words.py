"""Recommendations, written from the stored numbers.

Per question: the cheapest method within the interval of the best, and what measuring costs instead;
how often it is right, and on which adapters it is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pandas as pd
from intervals import Standing, cheapest_of_the_best, cluster_means, difference
from results import Numbers, costs_of, scores_of
from tables import (
    END,
    FIRST,
    HALF,
    HELD,
    PATH,
    RELP,
    RELP_LIVE,
    Question,
    cost_in_words,
    markdown,
    mean_costs,
    named,
    of_question,
    span,
    standings,
)
from violent import BROKEN

from lens_lora.results.attribution import VIOLENT

MEASURED = ("add_one", "leave_one_out")
OWN = ("trained", "paraphrase")
ADD = Question("add_one", "spearman", True, OWN, "What would adding this module to the base do?")
ADD_ERROR = dataclasses.replace(ADD, metric="error", larger=False)
OUT = Question(
    "leave_one_out", "spearman", True, OWN, "What would removing it from the adapted model do?"
)
OUT_ERROR = dataclasses.replace(OUT, metric="error", larger=False)
ADD_ELSEWHERE, OUT_ELSEWHERE = (
    dataclasses.replace(
        question,
        key=f"{question.key}/held_out",
        words=f"{question.words} With the numbers of the trained wording:",
    )
    for question in (ADD, OUT)
)
KEEP = Question("keep", "cpr", True, ("paraphrase",), "Which modules carry the shift?")
CLOSE = Question(
    "keep", "cmd", False, ("paraphrase",), "Which modules reproduce the adapted model's readout?"
)
FEW = Question(
    "keep", "of the best found", True, ("paraphrase",), "Which fifth of the modules keeps most?"
)
SUM = Question(
    "sum", "incompleteness", False, OWN, "How is the whole shift divided among the modules?"
)
ASKED = (ADD, OUT, SUM, KEEP, FEW)
CHEAP = 30.0  # F, up to which the advice for one prompt is to measure
ONE = ("trained, first",)
# A metric's bound, and what is within it; a share of the shift has none.
RIGHT = {
    "spearman": (BROKEN, "modules in the measured order (Spearman ≥ 0.9)"),
    "incompleteness": (0.1, "a sum within 10 % of the shift"),
    "of the best found": (0.9, "≥ 90 % of what the best fifth keeps"),
}
WORST = 3  # adapters that are named
ENDS = "the result calls {violent} of these {off} violent; `ll.reliability` flags modules"
NOTICED = {
    ADD: ENDS,
    OUT: ENDS,
    SUM: "the result states its error: `completeness_error`, `quadrature.met`",
    FEW: "`ll.faithfulness` runs the chosen modules, `ll.best_subset` says what could be kept",
}
# Question, method, what it would replace.
COMPARED = (
    (KEEP, PATH, HALF),
    (KEEP, END, FIRST),
    (KEEP, "mean(first_order@0, first_order@1)", HALF),
    (KEEP, "signed_weight_norm", HALF),
    (KEEP, "unrelated_adapter", "random"),
    (ADD, f"first_order/{HELD}@0", FIRST),
    (ADD, f"first_order/{RELP}@0", FIRST),
    (ADD_ERROR, f"first_order/{RELP}@0", FIRST),
    (ADD_ERROR, f"first_order/{RELP_LIVE}@0", FIRST),
    (OUT, f"first_order/{RELP}@1", END),
    (SUM, "second_order@0", FIRST),
    (SUM, "hessian_steps/2", PATH),
    (dataclasses.replace(ADD_ERROR, prompts=ONE), "second_order/add_one@0", FIRST),
    (dataclasses.replace(OUT_ERROR, prompts=ONE), "second_order/leave_one_out@1", END),
    (dataclasses.replace(OUT_ERROR, prompts=ONE), "second_order/leave_one_out@0", FIRST),
)


@dataclasses.dataclass(frozen=True)
class Advice:
    """What the table says about one question on one base.

    Attributes:
        best: the method of the best mean.
        cheapest: of those that tie with it, the one of least cost.
        cost: F of every method, by process time.
    """

    question: Question
    best: Standing
    cheapest: Standing
    cost: Mapping[str, float]


def is_estimate(method: str) -> bool:
    """Not one that runs every site, or a searched set, or a ranking that is no answer."""
    return not any(word in method for word in (*MEASURED, "best_subset", "null_adapter"))


def advice(scores: pd.DataFrame, costs: pd.DataFrame, question: Question, base: str) -> Advice:
    """The best estimate, and the cheapest within its interval."""
    passes, cost = (mean_costs(costs, base, of) for of in ("passes", "time"))
    priced = scores["method"].isin(list(passes)) & scores["method"].map(is_estimate)
    found = standings(scores[priced], question, base)
    return Advice(question, found[0], cheapest_of_the_best(found, passes), cost)


def recommendations(scores: pd.DataFrame, costs: pd.DataFrame, base: str) -> str:
    """One line per question."""
    rows = []
    for question in ASKED:
        found = advice(scores, costs, question, base)
        cheap, best = found.cheapest, found.best
        beside = "itself" if cheap.method == best.method else named(best.method)
        rows.append(
            [
                question.words,
                named(cheap.method),
                f"{question.metric} {span(cheap.score)}",
                cost_in_words(found.cost[cheap.method]),
                f"{beside}, {span(best.score)}",
                _measuring(question, found.cost),
            ]
        )
    head = ["your question", "cheapest within the interval of the best", "its score"]
    return markdown([*head, "F", "the best estimate", "or measure it"], rows)


def comparisons(scores: pd.DataFrame, base: str) -> str:
    """One line per pair of methods: the paired difference, better, worse or tie, and how often.

    A mean may be that of one task; on how many tasks the method is ahead is not.
    """
    rows = []
    for question, method, other in COMPARED:
        means = cluster_means(of_question(scores, question, base))
        if method not in means or other not in means:
            continue
        found = difference(means, method, other)
        better = (found.mean > 0) == question.larger
        verdict = "tie" if found.tie else "better" if better else "worse"
        cells = [named(method), named(other), f"{question.words} ({question.metric})"]
        apart = (means[method] - means[other]).dropna() * (1 if question.larger else -1)
        ahead = f"{int((apart > 0).sum())} of {found.clusters} tasks"
        rows.append([*cells, span(found, 3), verdict, ahead])
    return markdown(["does …", "beat …", "at", "mean difference", "answer", "ahead on"], rows)


def opening(numbers: Numbers, bases: list[str]) -> tuple[str, str]:
    """The page in short: on how many adapters each recommended estimate is right, and where not.

    The estimate is that of the first base, on all of them.
    """
    scores, costs = scores_of(numbers), costs_of(numbers)
    rows, wrong = [], []
    for question in ASKED:
        best = advice(scores, costs, question, bases[0])
        method, (bound, meant) = best.cheapest.method, RIGHT.get(question.metric, (None, "—"))
        each = {base: _by_adapter(scores, question, base, method) for base in bases}
        if bound is None:
            cells = [f"{e.mean():.2f} ({e.min():.2f} to {e.max():.2f})" for e in each.values()]
        else:
            off = {b: e[e < bound if question.larger else e > bound] for b, e in each.items()}
            cells = [f"{len(each[base]) - len(off[base])} of {len(each[base])}" for base in bases]
            named_off = "; ".join(_worst(off[b], question.larger, b) for b in bases if len(off[b]))
            names = [name for rest in off.values() for name in rest.index]
            strengths = [numbers["adapters"][n]["signals"]["trained"]["strength"] for n in names]
            violent = sum(strength > VIOLENT for strength in strengths)
            noticed = NOTICED[question].format(violent=violent, off=len(names)) if names else "—"
            wrong.append([question.words, named_off or "right on all", noticed])
        rows.append([question.words, named(method), meant, *cells, _measuring(question, best.cost)])
    head = ["your question", "the estimate", "right means", *bases, "or measure it"]
    return markdown(head, rows), markdown([head[0], "not right on", "how you notice"], wrong)


def _by_adapter(scores: pd.DataFrame, question: Question, base: str, method: str) -> pd.Series:
    rows = of_question(scores, question, base)
    return rows[rows["method"] == method].groupby("adapter")["value"].mean()


def _worst(off: pd.Series, larger: bool, base: str) -> str:
    """The adapters on which an estimate is furthest off, by name and score."""
    ordered = off.sort_values(ascending=larger)
    names = [f"{name} ({value:.2f})" for name, value in ordered.head(WORST).items()]
    more = len(ordered) - len(names)
    return f"{base}: {', '.join(names)}{f' and {more} more' if more else ''}"


def _measuring(question: Question, cost: Mapping[str, float]) -> str:
    if question.key in MEASURED and question.key in cost:
        said = f"exact, {cost_in_words(cost[question.key])} F"
        return f"**measure it**: {said}" if cost[question.key] <= CHEAP else said
    if question.key == "sum" or "best_subset" not in cost:
        return "—"
    return f"`best_subset`, {cost_in_words(cost['best_subset'])} F"
