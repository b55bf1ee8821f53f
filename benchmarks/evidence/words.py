"""The page in short, and its recommendations, written from the stored numbers.

Per question: the cheapest estimate that cannot be told from the best; whether other tasks would
have chosen it too (`resampled.py`), and what measuring costs instead; how often it is right, on
which adapters it is not, and what its numbers are worth on other prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pandas as pd
from intervals import Summary, choice, cluster_means, summary, tied, verdicts
from results import Numbers, costs_of, is_met, scores_of, sums_of_rules
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

from lens_lora.results.attribution import VIOLENT

MEASURED = ("add_one", "leave_one_out")
OWN = ("trained", "paraphrase")
ADD = Question(
    "add_one", "spearman", True, OWN, "What would adding this module to the base do?", "adding one"
)
ADD_ERROR = dataclasses.replace(ADD, metric="error", larger=False)
OUT = Question(
    "leave_one_out",
    "spearman",
    True,
    OWN,
    "What would removing it from the adapted model do?",
    "leaving one out",
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
    "How is the whole shift divided among the modules?",
    "dividing it",
)
ASKED = (ADD, OUT, SUM, KEEP, FEW)
ERRORS = {ADD: ADD_ERROR, OUT: OUT_ERROR}
ELSEWHERE = {ADD: ADD_ELSEWHERE, OUT: OUT_ELSEWHERE, KEEP: KEEP, FEW: FEW}
FLOORS = ("random", "signed_weight_norm")
CHEAP = 30.0  # F, up to which the advice for one prompt is to measure
STABLE = 0.8  # of the resamples of tasks that must choose a method before it is recommended
ONE = ("trained, first",)
# A metric's bound, and what is within it; a share of the shift has none.
RIGHT = {
    "spearman": (BROKEN, "the order of modules is right to Spearman ≥ 0.9"),
    "incompleteness": (0.1, "the sum is within 10 % of the shift"),
    "of the best found": (0.9, "the fifth keeps ≥ 90 % of what the best fifth keeps"),
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
    """What the tables say about one question.

    Attributes:
        method: the cheapest of the tie with the best.
        members: the whole tie.
        shares: of the resamples of tasks, by what they choose.
        cost: F of every method, by process time.
    """

    question: Question
    method: str
    members: list[str]
    shares: Mapping[str, float]
    cost: Mapping[str, float]

    @property
    def is_stable(self) -> bool:
        return self.shares.get(self.method, 0.0) >= STABLE

    @property
    def answer(self) -> str:
        """The method as a call runs it, and as it was measured: a rule of the path is one of it."""
        return CALLED if self.question == SUM and self.method.startswith("path/") else self.method


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
    """Of each question."""
    costs, found = costs_of(numbers), []
    for question in ASKED:
        means, passes = estimates(scores, costs, question, base)
        chosen = choice(means, passes, larger_is_better=question.larger)
        members = tied(means, larger_is_better=question.larger)
        shares = numbers["resampled"]["choices"][question.label]
        found.append(
            Advice(question, chosen, members, shares, median_costs(costs, base, "time"))
        )
    return found


def recommendations(numbers: Numbers, base: str) -> str:
    """One line per question, then each tie by name."""
    scores, rows, ties = scores_of(numbers), [], []
    for found in advice(numbers, scores, base):
        question, shares = found.question, found.shares
        score = summary_of(scores, question, base, found.answer)
        told = [number(score.worst), str(score.tasks), cost_in_words(found.cost[found.answer])]
        word = "recommended" if found.is_stable else f"a tie of {len(found.members)}"
        chosen = f"{100 * shares.get(found.method, 0.0):.0f} %"
        rows.append([question.label, named(found.answer), chosen, word, span(score), *told])
        if not found.is_stable:
            often = {named(m): f"{100 * share:.0f} %" for m, share in shares.items()}
            won = ", ".join(f"{name} {share}" for name, share in list(often.items())[:4])
            members = ", ".join(map(named, found.members))
            ties.append(f"- **{question.label}** Tied: {members}. Chosen most often: {won}.")
    head = ["question", "cheapest of the tie", "chosen", "so", "median", "worst", "tasks", "F"]
    return "\n\n".join([markdown(head, rows), "\n".join(ties)]).strip()


def comparisons(scores: pd.DataFrame, base: str) -> str:
    """One line per pair of methods: the paired difference, the verdict, and how often ahead."""
    columns, cells = {}, []
    for row, (question, method, other) in enumerate(COMPARED):
        means = cluster_means(of_question(scores, question, base))
        if method in means and other in means:
            difference = means[method] - means[other]
            columns[row] = difference if question.larger else -difference
            found = summary(difference, larger_is_better=question.larger)
            cells.append([named(method), named(other), question.label, _signed(found)])
    apart = pd.DataFrame(columns)
    words = verdicts(apart)
    ahead = (f"{(apart[row] > 0).sum()} of {apart[row].count()}" for row in apart)
    rows = [[*cell, word, of] for cell, word, of in zip(cells, words, ahead, strict=True)]
    head = ["does …", "beat …", "at", "difference", "answer", "ahead on"]
    return markdown(head, rows)


def _signed(found: Summary) -> str:
    return f"{found.median:+.3f} ({number(found.worst, 3)})"


def opening(numbers: Numbers, bases: list[str]) -> tuple[str, list[str]]:
    """The page in short: a line for each question, and when each is not right.

    The estimate is that of the first base, on all of them.
    """
    scores, rows, notes = scores_of(numbers), [], []
    for place, found in enumerate(advice(numbers, scores, bases[0]), start=1):
        question = found.question
        each = {base: _by_adapter(scores, question, base, found.answer) for base in bases}
        bound, meant = RIGHT.get(question.metric, (None, ""))
        off = {
            base: values[values < bound if question.larger else values > bound]
            for base, values in each.items()
            if bound is not None
        }
        right = ", ".join(f"{len(each[b]) - len(off[b])} of {len(each[b])}" for b in off) or "—"
        score = with_worst(summary_of(scores, question, bases[0], found.answer))
        answer, cost = _answer(found)
        worth = _worth(scores, question, bases[0], found.answer)
        rows.append([f"{place}. {question.words}", answer, score, right, worth, cost])
        parts = [f"Right means that {meant}."] if meant else []
        parts += [_not_right(numbers, question, off)] if off else []
        parts += _beside(scores, question, bases[0], found.answer)
        notes.append(f"{place}. **{question.short.capitalize()}.** {' '.join(parts)}")
    head = ["your question", "answer", "median (worst task)", "right on", "other wordings, unrelated"]
    return markdown([*head, "F"], rows), notes


def _answer(found: Advice) -> tuple[str, str]:
    """What to do, and what it costs."""
    measured = found.question.key
    name = named(found.answer).removesuffix(", up to 8 nodes")
    estimate, cost = name if found.is_stable else f"{name}, in a tie", found.cost[found.answer]
    if measured in found.cost and found.cost[measured] <= CHEAP:
        both = f"{cost_in_words(found.cost[measured])}; {cost_in_words(cost)}"
        return f"**measure it**; else {estimate}", both
    return estimate, cost_in_words(cost)


def _worth(scores: pd.DataFrame, question: Question, base: str, method: str) -> str:
    """What the numbers of the trained wording are worth on paraphrases and on unrelated text."""
    if question not in ELSEWHERE:
        return "own prompt only"
    kinds = ("paraphrase", "unrelated")
    asked = (dataclasses.replace(ELSEWHERE[question], prompts=(kind,)) for kind in kinds)
    found = [summary_of(scores, of, base, method) for of in asked]
    return ", ".join(number(of.median) if of.tasks else "—" for of in found)


def _not_right(numbers: Numbers, question: Question, off: Mapping[str, pd.Series]) -> str:
    names = [name for rest in off.values() for name in rest.index]
    if not names:
        return "It is right on all."
    strengths = [numbers["adapters"][n]["signals"]["trained"]["strength"] for n in names]
    violent = sum(strength > VIOLENT for strength in strengths)
    told = "; ".join(_worst(off[b], question.larger, b) for b in off if len(off[b]))
    noticed = NOTICED[question].format(violent=violent, off=len(names))
    return f"*Not right on* {told}. *You notice:* {noticed}."


def _beside(scores: pd.DataFrame, question: Question, base: str, method: str) -> list[str]:
    """Sizes beside ranks; a share of the shift beside its floors, and where it is above one."""
    if question in ERRORS:
        error = summary_of(scores, ERRORS[question], base, method)
        return [
            f"*Sizes* are worse than ranks: Σ|effect − number| / Σ|effect| is {with_worst(error)}, "
            f"and {number(error.worst)} is what numbers too small by a factor of "
            f"{1 / (1 - error.worst):.1f} would have."
        ]
    if question == KEEP:
        floors = (f"{named(m)} {with_worst(summary_of(scores, KEEP, base, m))}" for m in FLOORS)
        values = _by_adapter(scores, KEEP, base, method)
        return [
            f"cpr has no bound: *its floor* is {', '.join(floors)}. It overshoots, as some modules "
            f"work against the rest: {(values > 1).sum()} of {len(values)} adapters are above 1, "
            f"the range is {number(values.min())} to {number(values.max())}; "
            "cmd counts that as an error."
        ]
    return []


def _by_adapter(scores: pd.DataFrame, question: Question, base: str, method: str) -> pd.Series:
    rows = of_question(scores, question, base)
    return rows[rows["method"] == method].groupby("adapter")["value"].mean()


def _worst(off: pd.Series, larger: bool, base: str) -> str:
    """The adapters on which an estimate is furthest off, by name and score."""
    ordered = off.sort_values(ascending=larger)
    names = [f"{name} ({value:.2f})" for name, value in ordered.head(WORST).items()]
    more = len(ordered) - len(names)
    return f"{base}: {', '.join(names)}{f' and {more} more' if more else ''}"


def path_called(numbers: Numbers, base: str) -> str:
    """Where `ll.path_attribution` would stop, as far as its rules were run."""
    rules = sums_of_rules(scores_of(numbers)).xs(base, level="base")
    met = is_met(rules).groupby("adapter").all()
    four, eight = met["path/4"], ~met["path/4"] & met["path/8"]
    return (
        f"of {len(met)} adapters with all three rules it would stop at 4 nodes on {four.sum()}, at "
        f"8 on {eight.sum()}, and go on beyond 8 on {(~four & ~eight).sum()}"
    )
