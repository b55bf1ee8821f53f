"""Write the summary of the page on faithfulness, and its recommendations, from stored numbers.

For each question: the cheapest estimate that ties with the best; whether a resample of the tasks
would choose it too (`resampled.py`); what measuring would cost; on how many adapters the estimate
is right, where it fails, and how well it carries over to other prompts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from benchmarks.evidence.intervals import (
    ALPHA,
    Summary,
    choice,
    cluster_means,
    sign_flip,
    summary,
    tied,
    verdicts,
)
from benchmarks.evidence.results import RULES, Numbers, costs_of, is_met, scores_of
from benchmarks.evidence.tables import (
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
from benchmarks.evidence.violent import BROKEN
from lens_lora.core import Attribution

MEASURED = ("add_one", "leave_one_out")
# The kinds of prompt that ask what was trained: the default of a question.
OWN = ("trained", "paraphrase")
# The one prompt on which the diagonal of H was measured.
FIRST_PROMPT = ("trained, first",)
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
ADD_ERROR_ON_FIRST_PROMPT = dataclasses.replace(ADD_ERROR, prompts=FIRST_PROMPT)
OUT_ERROR_ON_FIRST_PROMPT = dataclasses.replace(OUT_ERROR, prompts=FIRST_PROMPT)
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
# The questions of the first page, in its order.
ASKED = (ADD, OUT, SUM, KEEP, FEW)
# For questions whose numbers estimate effects: the question about the errors of their sizes.
ERRORS = {ADD: ADD_ERROR, OUT: OUT_ERROR}
# For questions that were also asked on other prompts, with the trained wording's numbers.
ELSEWHERE = {ADD: ADD_ELSEWHERE, OUT: OUT_ELSEWHERE, KEEP: KEEP, FEW: FEW}
# Rankings that know nothing of the task: a cpr has to be read beside theirs.
FLOORS = ("random", "signed_weight_norm")
# The cost in F up to which the advice for one prompt is to measure the effects.
CHEAP = 30.0
# The share of the resamples of tasks that must choose a method before it is recommended.
STABLE = 0.8
# The score from which an estimate counts as right on an adapter, by metric. CPR has no such bound.
RIGHT = {"spearman": BROKEN, "incompleteness": 0.1, "of the best found": 0.9}
# How many of the adapters on which an estimate fails are named.
NAMED_ADAPTERS = 3
# How many methods of a tie are named with their share of the resamples.
NAMED_METHODS = 4


class Comparison(NamedTuple):
    """Two methods that a table compares.

    Attributes:
        question: what both answer.
        method: the method that may be better.
        baseline: the method that it would replace.
    """

    question: Question
    method: str
    baseline: str


COMPARED = (
    Comparison(KEEP, HALF, FIRST),
    Comparison(KEEP, PATH, HALF),
    Comparison(KEEP, END, FIRST),
    Comparison(KEEP, "mean(first_order@0, first_order@1)", HALF),
    Comparison(KEEP, "signed_weight_norm", HALF),
    Comparison(KEEP, "unrelated_adapter", "random"),
    Comparison(ADD, f"first_order/{HELD}@0", FIRST),
    Comparison(ADD, f"first_order/{RELP}@0", FIRST),
    Comparison(ADD_ERROR, f"first_order/{RELP}@0", FIRST),
    Comparison(ADD_ERROR, f"first_order/{RELP_LIVE}@0", FIRST),
    Comparison(OUT, f"first_order/{RELP}@1", END),
    Comparison(SUM, "second_order@0", FIRST),
    Comparison(SUM, "hessian_steps/2", PATH),
    Comparison(ADD_ERROR_ON_FIRST_PROMPT, "second_order/add_one@0", FIRST),
    Comparison(OUT_ERROR_ON_FIRST_PROMPT, "second_order/leave_one_out@1", END),
    Comparison(OUT_ERROR_ON_FIRST_PROMPT, "second_order/leave_one_out@0", FIRST),
)


@dataclasses.dataclass(frozen=True)
class Advice:
    """The estimate that the tables advise for one question.

    Attributes:
        question: what is asked.
        method: the cheapest member of the tie with the best, by the name of the call that runs it.
        members: all methods of the tie.
        shares: the share of the resamples that chooses each method, the largest first.
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
    if question == SUM and method.startswith("path/"):
        return CALLED
    return method


def is_estimate(method: str) -> bool:
    """Whether a method estimates: it does not measure, search or draw at random."""
    not_estimates = (*MEASURED, "best_subset", "null_adapter")
    return not any(word in method for word in not_estimates)


def estimates(
    scores: pd.DataFrame, costs: pd.DataFrame, question: Question, base: str
) -> tuple[pd.DataFrame, dict[str, float]]:
    """The scores [cluster, method] among which a recommendation chooses, and the passes of each."""
    passes = median_costs(costs, base)
    means = means_of(scores, question, base)
    chosen = [method for method in means if method in passes and is_estimate(method)]
    return means[chosen], passes


def advice(numbers: Numbers, scores: pd.DataFrame, base: str) -> list[Advice]:
    """The advice on each question."""
    costs = costs_of(numbers)
    time = median_costs(costs, base, "time")
    advised: list[Advice] = []
    for question in ASKED:
        means, passes = estimates(scores, costs, question, base)
        cheapest = choice(means, passes, larger_is_better=question.larger)
        on_question = Advice(
            question=question,
            method=as_run(question, cheapest),
            members=tied(means, larger_is_better=question.larger),
            shares=numbers["resampled"]["choices"][question.label],
            cost=time,
        )
        advised.append(on_question)
    return advised


def recommendations(numbers: Numbers, base: str) -> tuple[str, list[str]]:
    """A table with a line for each question, and a sentence for each tie that names its members."""
    scores = scores_of(numbers)
    head = ["question", "cheapest of the tie", "chosen", "so", "median", "worst", "tasks"]
    rows: list[list[str]] = []
    ties: list[str] = []
    for on_question in advice(numbers, scores, base):
        question = on_question.question
        score = summary_of(scores, question, base, on_question.method)
        cells = [
            question.label,
            named(on_question.method),
            _percent(on_question.chosen),
            _verdict_of_resamples(on_question),
            span(score),
            number(score.worst),
            str(score.tasks),
        ]
        rows.append(cells)
        if on_question.chosen < STABLE:
            ties.append(_tie_in_words(on_question))
    return markdown(head, rows), ties


def _verdict_of_resamples(on_question: Advice) -> str:
    """Say whether the method is recommended: enough resamples of the tasks must choose it too."""
    if on_question.chosen >= STABLE:
        return "recommended"
    if len(on_question.members) > 1:
        return f"a tie of {len(on_question.members)}"
    return "unstable"


def _tie_in_words(on_question: Advice) -> str:
    """The members of a tie, and the methods that the resamples choose most often."""
    members = "; ".join(map(named, on_question.members))
    most_chosen = list(on_question.shares.items())[:NAMED_METHODS]
    winners = "; ".join(f"{named(method)} {_percent(share)}" for method, share in most_chosen)
    return f"**{on_question.question.label}**: {members}. Chosen most: {winners}."


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def comparisons(scores: pd.DataFrame, base: str) -> str:
    """A table with a line for each pair: difference, verdict, and on how many tasks it is ahead."""
    head = ["does …", "beat …", "at", "difference", "answer", "ahead on"]
    return markdown(head, compared(scores, base))


def compared(scores: pd.DataFrame, base: str) -> list[list[str]]:
    """The cells of `comparisons`, for the pairs whose methods were both run on this base."""
    differences: dict[Comparison, pd.Series] = {}
    for comparison in COMPARED:
        means = cluster_means(of_question(scores, comparison.question, base))
        if comparison.method in means and comparison.baseline in means:
            differences[comparison] = means[comparison.method] - means[comparison.baseline]
    improvements: list[pd.Series] = []
    for comparison, difference in differences.items():
        if comparison.question.larger:
            improvements.append(difference)
        else:
            improvements.append(-difference)
    # The correction is for all rows of the table, so all are tested together.
    answers = verdicts(pd.DataFrame(dict(enumerate(improvements))))
    rows: list[list[str]] = []
    for row, (comparison, difference) in enumerate(differences.items()):
        question = comparison.question
        cells = [
            named(comparison.method),
            named(comparison.baseline),
            question.label,
            _signed(summary(difference, larger_is_better=question.larger)),
            answers[row],
            f"{(improvements[row] > 0).sum()} of {improvements[row].count()}",
        ]
        rows.append(cells)
    return rows


def _signed(difference: Summary) -> str:
    """The median difference and that of the worst task, as in `+0.012 (-0.100)`."""
    return f"{difference.median:+.3f} ({number(difference.worst, 3)})"


@dataclasses.dataclass(frozen=True)
class OpeningLine:
    """What the first page says of one question, in words.

    The scores of the estimate are those on the first base. *Off* are the adapters, of any base, on
    which the estimate is not right.

    Attributes:
        words: the question.
        answer: what to do: measure, or the estimate.
        cost: in F, of measuring where that is cheap, and of the estimate.
        score: the median over tasks and the worst task.
        right: on how many adapters the estimate is right, for each base.
        elsewhere: the score of the trained wording's numbers on other prompts.
        off: the worst of the adapters that are off, for each base.
        adapters_off: how many adapters are off.
        violent: how many of them a result calls violent.
        error: the median and the worst error of the sizes, where the numbers are effects.
        factor: the factor by which sizes too small have the worst error.
        slope: the slopes of measured effects on the numbers, for each base.
        above_one: on how many adapters of the first base the score is above 1.
        largest: the largest score of an adapter of the first base.
    """

    words: str
    answer: str
    cost: str
    score: str
    right: str
    elsewhere: str
    off: str
    adapters_off: int
    violent: int
    error: str
    factor: str
    slope: str
    above_one: str
    largest: str


def opening(numbers: Numbers, bases: list[str]) -> dict[str, OpeningLine]:
    """The line of each question on the first page; the estimate is that of the first base."""
    scores = scores_of(numbers)
    lines: dict[str, OpeningLine] = {}
    for on_question in advice(numbers, scores, bases[0]):
        lines[on_question.question.short] = _line(numbers, scores, on_question, bases)
    return lines


def _line(
    numbers: Numbers, scores: pd.DataFrame, on_question: Advice, bases: list[str]
) -> OpeningLine:
    """One question's line: the answer, its cost, and how far it is to be trusted."""
    question = on_question.question
    method = on_question.method
    first_base = bases[0]
    scores_by_base = {base: _by_adapter(scores, question, base, method) for base in bases}
    off_by_base = {base: _off(values, question) for base, values in scores_by_base.items()}
    named_off = [_worst_named(off, question, base) for base, off in off_by_base.items() if len(off)]
    slopes = [calibration(scores, question, base, method) for base in bases]
    strengths = _strengths(numbers, off_by_base)
    right = "—"
    if question.metric in RIGHT:
        right = _counts_of_right(scores_by_base, off_by_base)
    error = "—"
    factor = "—"
    if question in ERRORS:
        errors = summary_of(scores, ERRORS[question], first_base, method)
        error = with_worst(errors)
        factor = _factor(errors.worst)
    scores_of_adapters = scores_by_base[first_base]
    return OpeningLine(
        words=question.words,
        answer=_answer(scores, on_question, first_base),
        cost=_cost(on_question),
        score=with_worst(summary_of(scores, question, first_base, method)),
        right=right,
        elsewhere=_elsewhere(scores, question, first_base, method),
        off="; ".join(named_off) or "none",
        adapters_off=len(strengths),
        violent=sum(strength > Attribution.VIOLENT for strength in strengths),
        error=error,
        factor=factor,
        slope="; ".join(slope for slope in slopes if slope),
        above_one=f"{(scores_of_adapters > 1).sum()} of {len(scores_of_adapters)}",
        largest=number(scores_of_adapters.max()),
    )


def _is_cheap_to_measure(on_question: Advice) -> bool:
    """Whether measuring the effects costs little. Some questions cannot be measured."""
    return on_question.cost.get(on_question.question.key, math.inf) <= CHEAP


def _answer(scores: pd.DataFrame, on_question: Advice, base: str) -> str:
    """The estimate in words; where measuring is cheap, the advice to measure comes first."""
    estimate = _estimate(scores, on_question, base)
    if _is_cheap_to_measure(on_question):
        return f"**measure it**; else {estimate}"
    return estimate


def _cost(on_question: Advice) -> str:
    """The cost of the estimate in F; where measuring is cheap, its cost comes first."""
    of_estimate = cost_in_words(on_question.cost[on_question.method])
    if _is_cheap_to_measure(on_question):
        of_measurement = cost_in_words(on_question.cost[on_question.question.key])
        return f"{of_measurement}; {of_estimate}"
    return of_estimate


def _factor(error: float) -> str:
    """How many times too small all numbers would be, to have this Σ|effect − number| / Σ|effect|.

    Numbers that are c times too small have an error of 1 − 1/c, which is below 1 for every c.
    """
    if error < 1:
        return number(1 / (1 - error), 1)
    return "any size"


def _estimate(scores: pd.DataFrame, on_question: Advice, base: str) -> str:
    """The estimate in words, with the methods that tie with it."""
    words = named(on_question.method).removesuffix(", up to 8 nodes")
    if on_question.chosen < STABLE:
        words = f"a tie of {len(on_question.members)}; cheapest: {words}"
    if (on_question.question, on_question.method) == (KEEP, HALF):
        p, _ = paired_test(cluster_means(of_question(scores, KEEP, base)), HALF, FIRST)
        # A NaN p tells no methods apart either, so this is `not <` in place of `>=`.
        if not p < ALPHA:
            words += " or at 0 (a tie)"
    return words


def _strengths(numbers: Numbers, off_by_base: dict[str, pd.Series]) -> list[float]:
    """‖ΔW‖ / ‖W‖ of each adapter on which the estimate is not right."""
    strengths: list[float] = []
    for off in off_by_base.values():
        for adapter in off.index:
            signals = numbers["adapters"][adapter]["signals"]
            strengths.append(signals["trained"]["strength"])
    return strengths


def _counts_of_right(
    scores_by_base: dict[str, pd.Series], off_by_base: dict[str, pd.Series]
) -> str:
    """On how many adapters of each base the estimate is right."""
    counts: list[str] = []
    for base, values in scores_by_base.items():
        right = len(values) - len(off_by_base[base])
        counts.append(f"{right} of {len(values)}" if len(values) else "—")
    return ", ".join(counts)


def _off(values: pd.Series, question: Question) -> pd.Series:
    """The adapters on which the estimate is not right; none where the metric has no bound."""
    if question.metric not in RIGHT:
        return values[:0]
    bound = RIGHT[question.metric]
    if question.larger:
        return values[values < bound]
    return values[values > bound]


def paired_test(means: pd.DataFrame, method: str, other: str) -> tuple[float, int]:
    """The p of two methods' paired difference by the sign-flip test, and the number of tasks."""
    paired = (means[method] - means[other]).dropna()
    return sign_flip(paired.to_numpy()), len(paired)


def rival(scores: pd.DataFrame, question: Question, base: str, method: str, other: str) -> str:
    """Compare two estimates of equal cost in a sentence, by one test without correction."""
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
    """The cpr of the rankings that know nothing of the task, in words."""
    cprs = {method: summary_of(scores, KEEP, base, method) for method in FLOORS}
    return ", ".join(f"{named(method)} {with_worst(cpr)}" for method, cpr in cprs.items())


def _elsewhere(scores: pd.DataFrame, question: Question, base: str, method: str) -> str:
    """The score of the trained wording's numbers on paraphrases, and on unrelated text."""
    if question not in ELSEWHERE:
        return "—"
    medians = []
    for kind in ("paraphrase", "unrelated"):
        on_kind = dataclasses.replace(ELSEWHERE[question], prompts=(kind,))
        score = summary_of(scores, on_kind, base, method)
        medians.append(number(score.median) if score.tasks else "—")
    return ", ".join(medians)


def _by_adapter(scores: pd.DataFrame, question: Question, base: str, method: str) -> pd.Series:
    """The score of a method on each adapter, averaged over the kinds of prompt."""
    rows = of_question(scores, question, base)
    return rows[rows["method"] == method].groupby("adapter")["value"].mean()


def calibration(scores: pd.DataFrame, question: Question, base: str, method: str) -> str:
    """Slopes of measured effects on the numbers, in words: the median task and both extremes.

    It is empty if no slope was stored.
    """
    of_slopes = dataclasses.replace(question, metric="slope")
    values = _by_adapter(scores, of_slopes, base, method)
    if values.empty:
        return ""
    median = summary_of(scores, of_slopes, base, method).median
    least = f"{number(values.min())} ({values.idxmin()})"
    largest = f"{number(values.max())} ({values.idxmax()})"
    sentence = f"{base} {number(median)} in the median task, {least} to {largest}"
    left_out = _by_adapter(scores, question, base, method).index.difference(values.index)
    if len(left_out):
        names = ", ".join(left_out)
        sentence += f", excluding {names}, which retraining did not reproduce"
    return sentence


def _worst_named(off: pd.Series, question: Question, base: str) -> str:
    """The adapters on which an estimate is furthest off, by name and score."""
    worst_first = off.sort_values(ascending=question.larger)
    worst = worst_first.head(NAMED_ADAPTERS)
    names = [f"{adapter} ({score:.2f})" for adapter, score in worst.items()]
    sentence = f"{base}: {', '.join(names)}"
    more = len(worst_first) - len(names)
    if more:
        sentence += f" and {more} more"
    return sentence


def path_called(scores: pd.DataFrame, base: str) -> str:
    """On how many adapters `ll.path_attribution` would stop at 4 nodes, at 8, or go on.

    The call asks that the sum of each prompt is met; stored are sums over the prompts of a kind. So
    it may stop later than this says, never earlier.
    """
    rows = scores[(scores["metric"] == "sum") & (scores["base"] == base)]
    sums = rows.pivot_table(index=["adapter", "prompts"], columns="method", values="value")
    all_run = sums[list(RULES)].dropna()
    met = all_run.map(is_met).groupby("adapter").all()
    at_four = met["path/4"].sum()
    at_eight = (met["path/8"] & ~met["path/4"]).sum()
    beyond = len(met) - at_four - at_eight
    return (
        f"on {len(met)} adapters all three were run; the call would stop at 4 nodes on at most "
        f"{at_four}, at 8 on about {at_eight}, and go on beyond 8 on at least {beyond}"
    )
