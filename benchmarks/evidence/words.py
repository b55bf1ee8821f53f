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

from lens_lora.core import Attribution

MEASURED = ("add_one", "leave_one_out")
OWN = ("trained", "paraphrase")
ADD = Question(
    key="add_one",
    metric="spearman",
    larger=True,
    prompts=OWN,
    words="What would adding this module to the base do?",
    short="adding one",
)
OUT = dataclasses.replace(
    ADD,
    key="leave_one_out",
    words="What would removing it from the adapted model do?",
    short="leaving one out",
)
ADD_ERROR = dataclasses.replace(ADD, metric="error", larger=False)
OUT_ERROR = dataclasses.replace(OUT, metric="error", larger=False)
ADD_ELSEWHERE = dataclasses.replace(
    ADD,
    key=f"{ADD.key}/held_out",
    words=f"{ADD.words} With the numbers of the trained wording:",
)
OUT_ELSEWHERE = dataclasses.replace(
    OUT,
    key=f"{OUT.key}/held_out",
    words=f"{OUT.words} With the numbers of the trained wording:",
)
KEEP = Question(
    key="keep",
    metric="cpr",
    larger=True,
    prompts=("paraphrase",),
    words="Which modules carry the shift?",
    short="what carries it",
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
    key="sum",
    metric="incompleteness",
    larger=False,
    prompts=OWN,
    words="How is the shift divided among the modules?",
    short="dividing it",
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
SHOWN = 4  # methods of a tie that are named with their share of the resamples
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
    """The estimate that the tables advise for one question.

    Attributes:
        question: what is asked.
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
    """Name the call `ll.path_attribution` in place of a rule of the path that it runs."""
    is_rule = question == SUM and method.startswith("path/")
    return CALLED if is_rule else method


def is_estimate(method: str) -> bool:
    """Whether a method is neither a run of every site, nor a searched set, nor a null ranking."""
    others = (*MEASURED, "best_subset", "null_adapter")
    return not any(word in method for word in others)


def estimates(
    scores: pd.DataFrame, costs: pd.DataFrame, question: Question, base: str
) -> tuple[pd.DataFrame, dict[str, float]]:
    """[cluster, method] of all that a recommendation may choose among, and their passes."""
    passes = median_costs(costs, base)
    means = means_of(scores, question, base)
    chosen = [method for method in means if method in passes and is_estimate(method)]
    return means[chosen], passes


def advice(numbers: Numbers, scores: pd.DataFrame, base: str) -> list[Advice]:
    """The advice on each question."""
    costs = costs_of(numbers)
    time = median_costs(costs, base, "time")
    found = []
    for question in ASKED:
        means, passes = estimates(scores, costs, question, base)
        chosen = choice(means, passes, larger_is_better=question.larger)
        members = tied(means, larger_is_better=question.larger)
        shares = numbers["resampled"]["choices"][question.label]
        method = as_run(question, chosen)
        found.append(Advice(question, method, members, shares, time))
    return found


def recommendations(numbers: Numbers, base: str) -> tuple[str, list[str]]:
    """One line per question, and each tie by name."""
    scores = scores_of(numbers)
    rows = []
    ties = []
    for found in advice(numbers, scores, base):
        question = found.question
        score = summary_of(scores, question, base, found.method)
        cells = {
            "question": question.label,
            "cheapest of the tie": named(found.method),
            "chosen": _percent(found.chosen),
            "so": _verdict_of_resamples(found),
            "median": span(score),
            "worst": number(score.worst),
            "tasks": str(score.tasks),
        }
        rows.append(cells)
        if found.chosen < STABLE:
            ties.append(_tie_in_words(found))
    return markdown(list(rows[0]), [list(cells.values()) for cells in rows]), ties


def _verdict_of_resamples(found: Advice) -> str:
    """Whether the method is recommended, which other tasks must choose too."""
    if found.chosen >= STABLE:
        return "recommended"
    if len(found.members) > 1:
        return f"a tie of {len(found.members)}"
    return "unstable"


def _tie_in_words(found: Advice) -> str:
    """The members of a tie, and the four that the resamples choose most."""
    members = "; ".join(map(named, found.members))
    most_chosen = list(found.shares.items())[:SHOWN]
    won = "; ".join(f"{named(method)} {_percent(share)}" for method, share in most_chosen)
    return f"**{found.question.label}**: {members}. Chosen most: {won}."


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def comparisons(scores: pd.DataFrame, base: str) -> str:
    """One line per pair of methods: the paired difference, the verdict, and how often ahead."""
    head = ["does …", "beat …", "at", "difference", "answer", "ahead on"]
    return markdown(head, compared(scores, base))


def compared(scores: pd.DataFrame, base: str) -> list[list[str]]:
    """The cells of `comparisons`, of the pairs that a base has."""
    improvements = {}
    cells_of = {}
    for row, (question, method, other) in enumerate(COMPARED):
        means = cluster_means(of_question(scores, question, base))
        if method in means and other in means:
            difference = means[method] - means[other]
            improvements[row] = difference if question.larger else -difference
            found = summary(difference, larger_is_better=question.larger)
            cells_of[row] = [named(method), named(other), question.label, _signed(found)]
    answers = verdicts(pd.DataFrame(improvements))
    rows = []
    for row, cells in cells_of.items():
        improvement = improvements[row]
        ahead = f"{(improvement > 0).sum()} of {improvement.count()}"
        rows.append([*cells, answers[row], ahead])
    return rows


def _signed(found: Summary) -> str:
    """`+0.012 (-0.100)`, the median difference and that of the worst task."""
    return f"{found.median:+.3f} ({number(found.worst, 3)})"


def opening(numbers: Numbers, bases: list[str]) -> dict[str, dict[str, Any]]:
    """Each question's line on the first page; the estimate is that of the first base."""
    scores = scores_of(numbers)
    every = advice(numbers, scores, bases[0])
    return {found.question.short: _line(numbers, scores, found, bases) for found in every}


def _line(
    numbers: Numbers, scores: pd.DataFrame, found: Advice, bases: list[str]
) -> dict[str, Any]:
    """One question's line: the answer, its cost, and how far it is to be trusted."""
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
    factor = "any size"
    if error.worst < 1:
        factor = number(1 / (1 - error.worst), 1)
    return {
        "words": question.words,
        "answer": answer,
        "cost": cost,
        "score": with_worst(summary_of(scores, question, base, method)),
        "right": _counts_of_right(each, off) if bound else "—",
        "elsewhere": _elsewhere(scores, question, base, method),
        "off": "; ".join(worst) or "none",
        "count": len(strengths),
        "violent": sum(strength > Attribution.VIOLENT for strength in strengths),
        "error": with_worst(error),
        "slope": "; ".join(filter(None, slopes)),
        "factor": factor,
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
    strengths = []
    for values in off.values():
        for name in values.index:
            signals = numbers["adapters"][name]["signals"]
            strengths.append(signals["trained"]["strength"])
    return strengths


def _counts_of_right(each: dict[str, pd.Series], off: dict[str, pd.Series]) -> str:
    """On how many adapters of each base the estimate is right."""
    counts: list[str] = []
    for base, values in each.items():
        right = len(values) - len(off[base])
        counts.append(f"{right} of {len(values)}" if len(values) else "—")
    return ", ".join(counts)


def _off(values: pd.Series, bound: float | None, larger: bool) -> pd.Series:
    """The adapters beyond the bound; of a share of the shift, which has no bound, none."""
    if bound is None:
        return values[:0]
    is_off = values < bound if larger else values > bound
    return values[is_off]


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
    sentence = (
        f"{named(method)} and {named(other)}, which cost the same, {verdict} on {base}: medians "
        f"{medians}, exact sign-flip p = {p:.2f} over {tasks} tasks"
    )
    return sentence[0].upper() + sentence[1:]


def floors(scores: pd.DataFrame, base: str) -> str:
    """The cpr of random rankings, and of signs with ‖ΔW‖ as their size, in words."""
    each = {method: summary_of(scores, KEEP, base, method) for method in FLOORS}
    return ", ".join(f"{named(method)} {with_worst(found)}" for method, found in each.items())


def _elsewhere(scores: pd.DataFrame, question: Question, base: str, method: str) -> str:
    """The score of the trained wording's numbers on paraphrases, and on unrelated text."""
    if question not in ELSEWHERE:
        return "—"
    medians = []
    for kind in ("paraphrase", "unrelated"):
        on_kind = dataclasses.replace(ELSEWHERE[question], prompts=(kind,))
        found = summary_of(scores, on_kind, base, method)
        medians.append(number(found.median) if found.tasks else "—")
    return ", ".join(medians)


def _by_adapter(scores: pd.DataFrame, question: Question, base: str, method: str) -> pd.Series:
    """The score of a method on each adapter, in the mean over kinds of prompt."""
    rows = of_question(scores, question, base)
    return rows[rows["method"] == method].groupby("adapter")["value"].mean()


def calibration(scores: pd.DataFrame, question: Question, base: str, method: str) -> str:
    """Slopes of measured effects on the numbers: the median task, and the adapters at both ends."""
    of_slopes = dataclasses.replace(question, metric="slope")
    values = _by_adapter(scores, of_slopes, base, method)
    if values.empty:
        return ""
    found = summary_of(scores, of_slopes, base, method)
    least = f"{number(values.min())} ({values.idxmin()})"
    largest = f"{number(values.max())} ({values.idxmax()})"
    sentence = f"{base} {number(found.median)} in the median task, {least} to {largest}"
    left_out = _by_adapter(scores, question, base, method).index.difference(values.index)
    if len(left_out):
        names = ", ".join(left_out)
        sentence += f", excluding {names}, which retraining did not reproduce"
    return sentence


def _worst(off: pd.Series, larger: bool, base: str) -> str:
    """The adapters on which an estimate is furthest off, by name and score."""
    ordered = off.sort_values(ascending=larger)
    names = [f"{name} ({value:.2f})" for name, value in ordered.head(WORST).items()]
    sentence = f"{base}: {', '.join(names)}"
    more = len(ordered) - len(names)
    if more:
        sentence += f" and {more} more"
    return sentence


def path_called(scores: pd.DataFrame, base: str) -> str:
    """Where `ll.path_attribution` would stop, as far as its rules were run."""
    rows = scores[(scores["metric"] == "sum") & (scores["base"] == base)]
    sums = rows.pivot_table(index=["adapter", "prompts"], columns="method", values="value")
    both_run = sums[["path/4", "path/8"]].dropna()
    met = both_run.map(is_met).groupby("adapter").all()
    at_four = met["path/4"].sum()
    at_eight = (met["path/8"] & ~met["path/4"]).sum()
    beyond = len(met) - at_four - at_eight
    return (
        f"of {len(met)} adapters with all three it would stop at 4 nodes on {at_four} at most, at "
        f"8 on {at_eight}, and go on beyond 8 on {beyond}"
    )
