"""Tables of the page on faithfulness, from stored numbers: per question, methods beside the best.

Everything here reads data frames and knows no model. `scores` has one row per adapter, kind of
prompt, question, metric and method; `costs` one per adapter and method, in forward passes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import pandas as pd

from benchmarks.evidence.intervals import TOO_FEW, Standing, Summary, cluster_means, ranked, summary

FIRST = "first_order@0"
HALF = "first_order@0.5"
END = "first_order@1"
PATH = "path/4"
CALLED = "path_attribution"
HELD = "patterns+norm_scales"
RELP = "patterns+norm_scales+identity+half"
RELP_LIVE = "norm_scales+identity+half"
NAMES = {
    FIRST: "first order at 0",
    HALF: "first order at ½",
    END: "first order at 1",
    "path/2": "path, 2 nodes",
    PATH: "path, 4 nodes",
    "path/8": "path, 8 nodes",
    CALLED: "`ll.path_attribution`, up to 8 nodes",
    f"first_order/{HELD}@0": "first order at 0, patterns and norms held",
    f"first_order/{RELP}@0": "RelP's rules at 0",
    f"first_order/{RELP}@1": "RelP's rules at 1",
    f"first_order/{RELP_LIVE}@0": "RelP's rules at 0, attention live",
    "second_order@0": "a + ½H1 at 0",
    "hessian_steps/2": "Hessian products, 2 steps",
    "hessian_steps/4": "Hessian products, 4 steps",
    "second_order/add_one@0": "a + ½H_ll, at 0",
    "second_order/leave_one_out@0": "a + (H1)_l − ½H_ll, at 0",
    "second_order/leave_one_out@1": "a − ½H_ll, at 1",
    "weight_norm": "‖ΔW‖",
    "update_norm": "‖δz‖",
    "norm_product": "‖δz‖ · ‖Jᵀu‖",
    "signed_weight_norm": "sign(a) · ‖ΔW‖",
    "signed_random": "sign(a) · random",
    "random": "random",
    "mean(add_one, leave_one_out)": "mean of both measured effects",
    "add_one": "add one, measured",
    "leave_one_out": "leave one out, measured",
    "null_adapter": "first order of random directions",
    "unrelated_adapter": "first order of an unrelated adapter",
    "best_subset": "best set found on the trained wording",
}
# Sets that were found on the prompts that they are judged on.
CEILING = "best_subset/"
MAIN = (FIRST, HALF, END, PATH)
KINDS = ("trained", "paraphrase", "neighbour", "unrelated")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question that methods answer, and the score that an answer gets.

    Attributes:
        key, metric: the question and the metric, as they are called in `scores`.
        larger: whether a larger score is better.
        prompts: the kinds of prompt over which the score is averaged.
        words: the question, in words.
        short: the same in a table.
    """

    key: str
    metric: str
    larger: bool
    prompts: tuple[str, ...]
    words: str
    short: str

    @property
    def label(self) -> str:
        """The question and its metric, as the head of a table's line."""
        return f"{self.short}: {self.metric}"


def named(method: str) -> str:
    """A method in words; a mean that has no name of its own is named by its two members."""
    if method in NAMES:
        return NAMES[method]
    pair = re.fullmatch(r"mean\((.+), (.+)\)", method)
    if pair is None:
        return method
    first, second = pair.groups()
    return f"mean of {named(first)} and {named(second)}"


def of_question(scores: pd.DataFrame, question: Question, base: str) -> pd.DataFrame:
    """The rows of `scores` that answer a question on a base."""
    is_of_question = (scores["question"] == question.key) & (scores["metric"] == question.metric)
    is_of_prompts = scores["prompts"].isin(question.prompts)
    is_of_base = scores["base"] == base
    return scores[is_of_question & is_of_prompts & is_of_base]


def means_of(scores: pd.DataFrame, question: Question, base: str) -> pd.DataFrame:
    """[cluster, method], without sets that were found on the prompts that they are judged on."""
    rows = of_question(scores, question, base)
    is_ceiling = rows["method"].str.startswith(CEILING)
    return cluster_means(rows[~is_ceiling])


def standings(scores: pd.DataFrame, question: Question, base: str) -> list[Standing]:
    """Every method; those that were measured on only some clusters of the base come last."""
    return ranked(means_of(scores, question, base), larger_is_better=question.larger)


def summary_of(scores: pd.DataFrame, question: Question, base: str, method: str) -> Summary:
    """One method over the tasks of a base."""
    means = means_of(scores, question, base)
    values = means[method] if method in means else pd.Series(dtype=float)
    return summary(values, larger_is_better=question.larger)


def median_costs(costs: pd.DataFrame, base: str, unit: str = "passes") -> dict[str, float]:
    """The median cost of each method over clusters, as for scores."""
    of_base = costs[costs["base"] == base]
    medians = cluster_means(of_base, unit).median()
    return {str(method): float(value) for method, value in medians.items()}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown: its head, and a line for each row."""
    lines = [_table_line(head), "| --- " * len(head) + "|"]
    lines += [_table_line(row) for row in rows]
    return "\n".join(lines)


def _table_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def number(value: float, digits: int = 2) -> str:
    """Write a number: from a hundred on without decimals, next to zero with one digit."""
    is_next_to_zero = 0 < abs(value) < 0.5 * 10**-digits
    if is_next_to_zero:
        return f"{value:.1g}"
    if abs(value) < 100:
        return f"{value:.{digits}f}"
    return f"{value:.0f}"


def span(score: Summary) -> str:
    """`0.98 [0.96, 0.99]`, the median and its interval; few tasks have no interval."""
    if not score.tasks:
        return "—"
    if math.isnan(score.low):
        return number(score.median)
    return f"{number(score.median)} [{number(score.low)}, {number(score.high)}]"


def with_worst(score: Summary) -> str:
    """`0.98 (0.75)`, the median and the worst task."""
    if not score.tasks:
        return "—"
    return f"{number(score.median)} ({number(score.worst)})"


def cost_in_words(cost: float | None) -> str:
    """Write a cost: below ten with two digits, above without decimals; a dash if there is none."""
    if cost is None:
        return "—"
    if cost < 10:
        return f"{cost:.2g}"
    return f"{cost:.0f}"


def question_table(
    scores: pd.DataFrame,
    questions: Sequence[Question],
    base: str,
    costs: pd.DataFrame | None = None,
) -> str:
    """One line per method, in the order of the first metric: tasks, scores, verdicts, cost.

    How far a method is behind the best is left out where there are too few tasks to tell.
    """
    standings_of_metrics: list[dict[str, Standing]] = []
    for question in questions:
        ranks = standings(scores, question, base)
        standings_of_metrics.append({standing.method: standing for standing in ranks})
    has_verdicts = any(map(_has_verdicts, standings_of_metrics))
    head = ["method", "tasks"]
    for question in questions:
        head += [question.metric, "worst"]
        if has_verdicts:
            head.append("behind the best")
    prices: list[dict[str, float]] = []
    if costs is not None:
        prices = [median_costs(costs, base, unit) for unit in ("passes", "time")]
        head += ["passes", "F"]
    methods: dict[str, None] = {}  # in place of a set, to keep the order of the first metric
    for standing_of in standings_of_metrics:
        methods.update(dict.fromkeys(standing_of))
    rows: list[list[str]] = []
    for method in methods:
        of_metrics = [standing_of.get(method) for standing_of in standings_of_metrics]
        tasks = next(standing.score.tasks for standing in of_metrics if standing is not None)
        row = [named(method), str(tasks)]
        for standing in of_metrics:
            row += _score_cells(standing)
            if has_verdicts:
                row.append(_behind(standing))
        row += [cost_in_words(price.get(method)) for price in prices]
        rows.append(row)
    return markdown(head, rows)


def _has_verdicts(standing_of: dict[str, Standing]) -> bool:
    """Whether some method of a question is told from the best, or tied with it."""
    return any(standing.verdict not in ("best", TOO_FEW) for standing in standing_of.values())


def _score_cells(standing: Standing | None) -> tuple[str, str]:
    """The score and the worst task, of a method that may not have been measured."""
    if standing is None:
        return "—", "—"
    return span(standing.score), number(standing.score.worst)


def _behind(standing: Standing | None) -> str:
    """How far a method's median is behind the best; in words if it is not told from it."""
    if standing is None:
        return "—"
    if standing.verdict == "worse":
        return number(standing.behind, 3)
    return standing.verdict


def cost_table(costs: pd.DataFrame, base: str) -> str:
    """Passes and time of every method that the page names, the dearest first."""
    passes = median_costs(costs, base, "passes")
    time = median_costs(costs, base, "time")
    # What has no name in words is a part of a method, or was tried and is not on the page.
    shown = [method for method in passes if named(method) != method]
    rows: list[list[str]] = []
    for method in sorted(shown, key=lambda method: -time[method]):
        row = [named(method), cost_in_words(passes[method]), cost_in_words(time[method])]
        rows.append(row)
    return markdown(["method", "passes", "F"], rows)


def by_prompts(scores: pd.DataFrame, question: Question, base: str, methods: Sequence[str]) -> str:
    """The chosen methods by kind of prompt: the median over clusters, and the worst."""
    on_every_kind = dataclasses.replace(question, prompts=KINDS)
    measured = set(of_question(scores, on_every_kind, base)["prompts"])
    kinds = [kind for kind in KINDS if kind in measured]
    rows: list[list[str]] = []
    for method in methods:
        by_kind: list[Summary] = []
        for kind in kinds:
            on_kind = dataclasses.replace(question, prompts=(kind,))
            by_kind.append(summary_of(scores, on_kind, base, method))
        tasks = max((score.tasks for score in by_kind), default=0)
        rows.append([named(method), str(tasks), *map(with_worst, by_kind)])
    return markdown(["method", "tasks", *kinds], rows)
