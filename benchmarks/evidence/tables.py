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
from intervals import TOO_FEW, Standing, Summary, cluster_means, ranked, summary

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
CEILING = "best_subset/"  # found on the prompts that it is judged on
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
    """A method in words; the mean of two is named by them."""
    pair = re.fullmatch(r"mean\((.+), (.+)\)", method)
    if pair and method not in NAMES:
        return f"mean of {named(pair[1])} and {named(pair[2])}"
    return NAMES.get(method, method)


def of_question(scores: pd.DataFrame, question: Question, base: str) -> pd.DataFrame:
    """The rows of `scores` that answer a question on a base."""
    chosen = (scores["question"] == question.key) & (scores["metric"] == question.metric)
    return scores[chosen & scores["prompts"].isin(question.prompts) & (scores["base"] == base)]


def means_of(scores: pd.DataFrame, question: Question, base: str) -> pd.DataFrame:
    """[cluster, method], without sets that were found on the prompts that they are judged on."""
    rows = of_question(scores, question, base)
    return cluster_means(rows[~rows["method"].str.startswith(CEILING)])


def standings(scores: pd.DataFrame, question: Question, base: str) -> list[Standing]:
    """Every method, those that were measured on some clusters of a base only last."""
    return ranked(means_of(scores, question, base), larger_is_better=question.larger)


def summary_of(scores: pd.DataFrame, question: Question, base: str, method: str) -> Summary:
    """One method over the tasks of a base."""
    means = means_of(scores, question, base)
    values = means[method] if method in means else pd.Series(dtype=float)
    return summary(values, larger_is_better=question.larger)


def median_costs(costs: pd.DataFrame, base: str, unit: str = "passes") -> dict[str, float]:
    """The median cost of each method over clusters, as for scores."""
    medians = cluster_means(costs[costs["base"] == base], unit).median()
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


def span(found: Summary) -> str:
    """`0.98 [0.96, 0.99]`, the median and its interval."""
    if not found.tasks:
        return "—"
    if math.isnan(found.low):
        return number(found.median)
    return f"{number(found.median)} [{number(found.low)}, {number(found.high)}]"


def with_worst(found: Summary) -> str:
    """`0.98 (0.75)`, the median and the worst task."""
    if not found.tasks:
        return "—"
    return f"{number(found.median)} ({number(found.worst)})"


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
    columns: list[dict[str, Standing]] = []
    for question in questions:
        columns.append({one.method: one for one in standings(scores, question, base)})
    width = 3 if any(map(_has_verdicts, columns)) else 2
    prices: list[dict[str, float]] = []
    if costs is not None:
        prices = [median_costs(costs, base, unit) for unit in ("passes", "time")]
    head = ["method", "tasks"]
    for question in questions:
        head += [question.metric, "worst", "behind the best"][:width]
    if prices:
        head += ["passes", "F"]
    methods: dict[str, None] = {}
    for column in columns:
        methods.update(dict.fromkeys(column))
    rows: list[list[str]] = []
    for method in methods:
        found = [column.get(method) for column in columns]
        tasks = next(one.score.tasks for one in found if one is not None)
        row = [named(method), str(tasks)]
        for standing in found:
            row += _cells(standing)[:width]
        row += [cost_in_words(price.get(method)) for price in prices]
        rows.append(row)
    return markdown(head, rows)


def _has_verdicts(column: dict[str, Standing]) -> bool:
    """Whether some method of a question is told from the best, or tied with it."""
    return any(one.verdict not in ("best", TOO_FEW) for one in column.values())


def _cells(standing: Standing | None) -> tuple[str, str, str]:
    """The score, the worst task, and how far behind the best in the median, unless it is a tie."""
    if standing is None:
        return "—", "—", "—"
    behind = standing.verdict
    if standing.verdict == "worse":
        behind = number(standing.behind, 3)
    return span(standing.score), number(standing.score.worst), behind


def cost_table(costs: pd.DataFrame, base: str) -> str:
    """Passes and time of every method that the page names, the dearest first."""
    passes = median_costs(costs, base, "passes")
    time = median_costs(costs, base, "time")
    shown = [method for method in passes if named(method) != method]
    rows = []
    for method in sorted(shown, key=lambda method: -time[method]):
        row = [named(method), cost_in_words(passes[method]), cost_in_words(time[method])]
        rows.append(row)
    return markdown(["method", "passes", "F"], rows)


def by_prompts(scores: pd.DataFrame, question: Question, base: str, methods: Sequence[str]) -> str:
    """The chosen methods by kind of prompt: the median over clusters, and the worst."""
    on_every_kind = dataclasses.replace(question, prompts=KINDS)
    measured = set(of_question(scores, on_every_kind, base)["prompts"])
    kinds = [kind for kind in KINDS if kind in measured]
    rows = []
    for method in methods:
        found = []
        for kind in kinds:
            on_kind = dataclasses.replace(question, prompts=(kind,))
            found.append(summary_of(scores, on_kind, base, method))
        tasks = max((one.tasks for one in found), default=0)
        rows.append([named(method), str(tasks), *map(with_worst, found)])
    return markdown(["method", "tasks", *kinds], rows)
