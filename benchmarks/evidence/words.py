"""The page in short, and its recommendations, written from the stored numbers.

Per question: the cheapest estimate that cannot be told from the best; whether other tasks would
have chosen it too (`resampled.py`), and what measuring costs instead; how often it is right, on
which adapters it is not, and what its numbers are worth on other prompts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from intervals import ALPHA, Summary, choice, cluster_means, sign_flip, summary, tied, verdicts
from results import Numbers, costs_of, is_met, scores_of
from tables import (
    CALLED,
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
    means_of,
    median_costs,
    named,
    number,
    of_question,
    span,
    summary_of,
    with_worst,
)
from violent import BROKEN

from lens_lora.core import VIOLENT

MEASURED = ("add_one", "leave_one_out")
OWN = ("trained", "paraphrase")
ADD = Question(
    "add_one", "spearman", True, OWN, "What would adding this module to the base do?", "adding one"
)
OUT = dataclasses.replace(
    ADD,
    key="leave_one_out",
    words="What would removing it from the adapted model do?",
    short="leaving one out",
)
ADD_ERROR, OUT_ERROR = (dataclasses.replace(q, metric="error", larger=False) for q in (ADD, OUT))
ADD_ELSEWHERE, OUT_ELSEWHERE = (
    dataclasses.replace(
        question,
        key=f"{question.key}/held_out",
        words=f"{question.words} With the numbers of the trained wording:",
    )
    for question in (ADD, OUT)
)
KEEP = Question(
    "keep", "cpr", True, ("paraphrase",), "Which modules carry the shift?", "what carries it"
)
CLOSE = dataclasses.replace(
    KEEP, metric="cmd", larger=False, words="Which modules reproduce the adapted model's readout?"
)
FEW = dataclasses.replace(
    KEEP,
    metric="of the best found",
    words="Which fifth of the modules keeps most?",
    short="the best fifth",
)
SUM = Question(
    "sum",
    "incompleteness",
    False,
    OWN,
    "How is the shift divided among the modules?",
    "dividing it",
)
ASKED = (ADD, OUT, SUM, KEEP, FEW)
ERRORS = {ADD: ADD_ERROR, OUT: OUT_ERROR}
ELSEWHERE = {ADD: ADD_ELSEWHERE, OUT: OUT_ELSEWHERE, KEEP: KEEP, FEW: FEW}
FLOORS = ("random", "signed_weight_norm")
CHEAP = 30.0  # F, up to which the advice for one prompt is to measure
STABLE = 0.8  # of the resamples of tasks that must choose a method before it is recommended
ONE = ("trained, first",)
RIGHT = {"spearman": BROKEN, "incompleteness": 0.1, "of the best found": 0.9}  # by metric
WORST = 3  # adapters that are named
# Question, method, what it would replace.
COMPARED = (
    (KEEP, HALF, FIRST),
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
    """What the tables say about one question.

    Attributes:
        method: the cheapest of the tie with the best, as a call runs it.
        members: the whole tie.
        shares: of the resamples of tasks, by what they choose, the most first.
        cost: F of every method, by process time.
    """

    question: Question
    method: str
    members: list[str]
    shares: Mapping[str, float]
    cost: Mapping[str, float]

    @property
    def chosen(self) -> float:
        """The share of the resamples that chooses this method."""
        return self.shares.get(self.method, 0.0)


def as_run(question: Question, method: str) -> str:
    """A rule of the path is one of those that `ll.path_attribution` runs."""
    return CALLED if question == SUM and method.startswith("path/") else method


def is_estimate(method: str) -> bool:
    """Not one that runs every site, or a searched set, or a ranking that is no answer."""
    return not any(word in method for word in (*MEASURED, "best_subset", "null_adapter"))


def estimates(
    scores: pd.DataFrame, costs: pd.DataFrame, question: Question, base: str
) -> tuple[pd.DataFrame, dict[str, float]]:
    """[cluster, method] of all that a recommendation may choose among, and their passes."""
    passes = median_costs(costs, base)
    means = means_of(scores, question, base)
    return means[[m for m in means if m in passes and is_estimate(m)]], passes


def advice(numbers: Numbers, scores: pd.DataFrame, base: str) -> list[Advice]:
    """The advice on each question."""
    costs = costs_of(numbers)
    found = []
    for question in ASKED:
        means, passes = estimates(scores, costs, question, base)
        chosen = choice(means, passes, larger_is_better=question.larger)
        members = tied(means, larger_is_better=question.larger)
        shares = numbers["resampled"]["choices"][question.label]
        method = as_run(question, chosen)
        time = median_costs(costs, base, "time")
        found.append(Advice(question, method, members, shares, time))
    return found


def recommendations(numbers: Numbers, base: str) -> tuple[str, list[str]]:
    """One line per question, and each tie by name."""
    scores = scores_of(numbers)
    rows = []
    ties = []
    for found in advice(numbers, scores, base):
        question = found.question
        score = summary_of(scores, found.question, base, found.method)
        is_stable = found.chosen >= STABLE
        many = len(found.members)
        word = "recommended" if is_stable else f"a tie of {many}" if many > 1 else "unstable"
        told = [_percent(found.chosen), word, span(score), number(score.worst), str(score.tasks)]
        rows.append([question.label, named(found.method), *told])
        if not is_stable:
            won = [f"{named(m)} {_percent(share)}" for m, share in list(found.shares.items())[:4]]
            members = "; ".join(map(named, found.members))
            ties.append(f"**{question.label}**: {members}. Chosen most: {'; '.join(won)}.")
    head = ["question", "cheapest of the tie", "chosen", "so", "median", "worst", "tasks"]
    return markdown(head, rows), ties


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def comparisons(scores: pd.DataFrame, base: str) -> str:
    """One line per pair of methods: the paired difference, the verdict, and how often ahead."""
    head = ["does …", "beat …", "at", "difference", "answer", "ahead on"]
    return markdown(head, compared(scores, base))


def compared(scores: pd.DataFrame, base: str) -> list[list[str]]:
    """The cells of `comparisons`, of the pairs that a base has."""
    columns = {}
    cells = []
    for row, (question, method, other) in enumerate(COMPARED):
        means = cluster_means(of_question(scores, question, base))
        if method in means and other in means:
            difference = means[method] - means[other]
            columns[row] = difference if question.larger else -difference
            found = summary(difference, larger_is_better=question.larger)
            cells.append([named(method), named(other), question.label, _signed(found)])
    apart = pd.DataFrame(columns)
    ahead = (f"{(apart[row] > 0).sum()} of {apart[row].count()}" for row in apart)
    told = zip(cells, verdicts(apart), ahead, strict=True)
    return [[*cell, word, of] for cell, word, of in told]


def _signed(found: Summary) -> str:
    return f"{found.median:+.3f} ({number(found.worst, 3)})"


def opening(numbers: Numbers, bases: list[str]) -> dict[str, dict[str, Any]]:
    """What the first page says of each question; the estimate is that of the first base."""
    scores = scores_of(numbers)
    every = advice(numbers, scores, bases[0])
    return {found.question.short: _line(numbers, scores, found, bases) for found in every}


def _line(
    numbers: Numbers, scores: pd.DataFrame, found: Advice, bases: list[str]
) -> dict[str, Any]:
    """What the page says of one question: the answer, its cost, and how far it is to be trusted."""
    question = found.question
    method = found.method
    base = bases[0]
    each = {name: _by_adapter(scores, question, name, method) for name in bases}
    bound = RIGHT.get(question.metric)
    off = {name: _off(values, bound, question.larger) for name, values in each.items()}
    strengths = _strengths(numbers, off)
    error = summary_of(scores, ERRORS.get(question, question), base, method)
    exact = found.cost.get(question.key, math.inf)
    cost = cost_in_words(found.cost[method])
    answer = _estimate(scores, found, base)
    if exact <= CHEAP:
        answer = f"**measure it**; else {answer}"
        cost = f"{cost_in_words(exact)}; {cost}"
    worst = [_worst(values, question.larger, name) for name, values in off.items() if len(values)]
    slopes = [calibration(scores, question, name, method) for name in bases]
    return {
        "words": question.words,
        "answer": answer,
        "cost": cost,
        "score": with_worst(summary_of(scores, question, base, method)),
        "right": _counts_of_right(each, off) if bound else "—",
        "elsewhere": _elsewhere(scores, question, base, method),
        "off": "; ".join(worst) or "none",
        "count": len(strengths),
        "violent": sum(strength > VIOLENT for strength in strengths),
        "error": with_worst(error),
        "slope": "; ".join(filter(None, slopes)),
        "factor": number(1 / (1 - error.worst), 1) if error.worst < 1 else "any size",
        "above": f"{(each[base] > 1).sum()} of {len(each[base])}",
        "most": number(each[base].max()),
    }


def _estimate(scores: pd.DataFrame, found: Advice, base: str) -> str:
    """The estimate in words, with those that cannot be told from it."""
    words = named(found.method).removesuffix(", up to 8 nodes")
    if found.chosen < STABLE:
        words = f"a tie of {len(found.members)}; cheapest: {words}"
    if (found.question, found.method) == (KEEP, HALF):
        p, _ = paired_test(cluster_means(of_question(scores, KEEP, base)), HALF, FIRST)
        if not p < ALPHA:
            words += " or at 0 (a tie)"
    return words


def _strengths(numbers: Numbers, off: dict[str, pd.Series]) -> list[float]:
    """How strong each adapter is on which the estimate is not right."""
    names = [name for values in off.values() for name in values.index]
    signals = [numbers["adapters"][name]["signals"] for name in names]
    return [of_adapter["trained"]["strength"] for of_adapter in signals]


def _counts_of_right(each: dict[str, pd.Series], off: dict[str, pd.Series]) -> str:
    """On how many adapters of each base the estimate is right."""
    counts: list[str] = []
    for base, values in each.items():
        right = len(values) - len(off[base])
        counts.append(f"{right} of {len(values)}" if len(values) else "—")
    return ", ".join(counts)


def _off(values: pd.Series, bound: float | None, larger: bool) -> pd.Series:
    """The adapters beyond the bound; of a share of the shift, which has none, nothing."""
    return values[:0] if bound is None else values[values < bound if larger else values > bound]


def paired_test(means: pd.DataFrame, method: str, other: str) -> tuple[float, int]:
    """The p of two methods' paired difference by the sign-flip test, and the number of tasks."""
    paired = (means[method] - means[other]).dropna()
    return sign_flip(paired.to_numpy()), len(paired)


def rival(scores: pd.DataFrame, question: Question, base: str, method: str, other: str) -> str:
    """Two estimates of one cost beside each other, by a test of their own, not corrected."""
    means = cluster_means(of_question(scores, question, base))
    p, tasks = paired_test(means, method, other)
    medians = f"{means[method].median():.3f} and {means[other].median():.3f}"
    verdict = "differ" if p < ALPHA else "are a tie"
    told = (
        f"{named(method)} and {named(other)}, which cost the same, {verdict} on {base}: medians "
        f"{medians}, exact sign-flip p = {p:.2f} over {tasks} tasks"
    )
    return told[0].upper() + told[1:]


def floors(scores: pd.DataFrame, base: str) -> str:
    """What cpr is without knowing anything, and with signs and sizes alone."""
    each = {method: summary_of(scores, KEEP, base, method) for method in FLOORS}
    return ", ".join(f"{named(method)} {with_worst(found)}" for method, found in each.items())


def _elsewhere(scores: pd.DataFrame, question: Question, base: str, method: str) -> str:
    """What the numbers of the trained wording are worth on paraphrases and on unrelated text."""
    if question not in ELSEWHERE:
        return "—"
    kinds = ("paraphrase", "unrelated")
    asked = (dataclasses.replace(ELSEWHERE[question], prompts=(kind,)) for kind in kinds)
    found = [summary_of(scores, of, base, method) for of in asked]
    return ", ".join(number(of.median) if of.tasks else "—" for of in found)


def _by_adapter(scores: pd.DataFrame, question: Question, base: str, method: str) -> pd.Series:
    rows = of_question(scores, question, base)
    return rows[rows["method"] == method].groupby("adapter")["value"].mean()


def calibration(scores: pd.DataFrame, question: Question, base: str, method: str) -> str:
    """Slopes of measured effects on the numbers: the median task, and the adapters at both ends."""
    asked = dataclasses.replace(question, metric="slope")
    values = _by_adapter(scores, asked, base, method)
    if values.empty:
        return ""
    found = summary_of(scores, asked, base, method)
    ends = (f"{number(values[name])} ({name})" for name in (values.idxmin(), values.idxmax()))
    told = f"{base} {number(found.median)} in the median task, {' to '.join(ends)}"
    left = _by_adapter(scores, question, base, method).index.difference(values.index)
    if len(left):
        told += f", without {', '.join(left)}, of which training again made another adapter"
    return told


def _worst(off: pd.Series, larger: bool, base: str) -> str:
    """The adapters on which an estimate is furthest off, by name and score."""
    ordered = off.sort_values(ascending=larger)
    names = [f"{name} ({value:.2f})" for name, value in ordered.head(WORST).items()]
    more = len(ordered) - len(names)
    return f"{base}: {', '.join(names)}{f' and {more} more' if more else ''}"


def path_called(scores: pd.DataFrame, base: str) -> str:
    """Where `ll.path_attribution` would stop, as far as its rules were run."""
    sums = scores[(scores["metric"] == "sum") & (scores["base"] == base)]
    met = sums.pivot_table(index=["adapter", "prompts"], columns="method", values="value")
    met = met[["path/4", "path/8"]].dropna().map(is_met).groupby("adapter").all()
    four = met["path/4"].sum()
    eight = (met["path/8"] & ~met["path/4"]).sum()
    return (
        f"of {len(met)} adapters with all three it would stop at 4 nodes on {four} at most, at 8 "
        f"on {eight}, and go on beyond 8 on {len(met) - four - eight}"
    )
