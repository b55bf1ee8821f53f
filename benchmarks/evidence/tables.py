"""Tables of the page on faithfulness, from stored numbers: per question, methods beside the best.

Everything here reads data frames and knows no model. `scores` has one row per adapter, kind of
prompt, question, metric and method; `costs` one per adapter and method, in forward passes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import pandas as pd
from intervals import Interval, Standing, cluster_means, interval, ranked

FIRST, HALF, END, PATH = "first_order@0", "first_order@0.5", "first_order@1", "path/4"
HELD, RELP = "patterns+norm_scales", "patterns+norm_scales+identity+half"
RELP_LIVE = "norm_scales+identity+half"
NAMES = {
    FIRST: "first order at 0",
    HALF: "first order at ½",
    END: "first order at 1",
    "path/2": "path, 2 nodes",
    PATH: "path, 4 nodes",
    "path/8": "path, 8 nodes",
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
    """What is asked of a method, and how an answer is scored.

    Attributes:
        key, metric: as in `scores`.
        larger: whether a larger score is better.
        prompts: the kinds of prompt that the score is of.
        words: the question, in words.
    """

    key: str
    metric: str
    larger: bool
    prompts: tuple[str, ...]
    words: str


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
    """Every method that was measured on all clusters of a base, best first."""
    means = means_of(scores, question, base).dropna(axis=1, how="any")
    return ranked(means, larger_is_better=question.larger)


def mean_costs(costs: pd.DataFrame, base: str, of: str = "passes") -> dict[str, float]:
    """Of each method, the mean over clusters, as scores are."""
    means = cluster_means(costs[costs["base"] == base], of).mean()
    return {str(method): float(value) for method, value in means.items()}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def span(found: Interval, digits: int = 2) -> str:
    """`0.98 [0.96, 0.99]`; what is above a hundred in whole numbers."""

    def written(value: float) -> str:
        return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.0f}"

    if found.low != found.low:
        return written(found.mean)
    return f"{written(found.mean)} [{written(found.low)}, {written(found.high)}]"


def cost_in_words(cost: float | None) -> str:
    if cost is None:
        return "—"
    return f"{cost:.2g}" if cost < 10 else f"{cost:.0f}"


def question_table(
    scores: pd.DataFrame,
    questions: Sequence[Question],
    base: str,
    costs: pd.DataFrame | None = None,
) -> str:
    """One line per method, in the order of the first metric: scores, how far behind, cost."""
    columns = [_scored(scores, question, base) for question in questions]
    prices = [] if costs is None else [mean_costs(costs, base, of) for of in ("passes", "time")]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [
        [
            label,
            *(cell for column in columns for cell in column.get((method, label), ("—", "—"))),
            *(cost_in_words(price.get(method)) for price in prices),
        ]
        for method, label in names
    ]
    head = [word for question in questions for word in (question.metric, "behind the best")]
    return markdown(["method", *head, *(["passes", "F"] if prices else [])], rows)


def _scored(
    scores: pd.DataFrame, question: Question, base: str
) -> dict[tuple[str, str], tuple[str, str]]:
    """{(method, its name): (score, how far behind the best)}, the best first.

    Methods that were run on some training tasks only come last, compared with the best on those.
    """
    every, means = standings(scores, question, base), means_of(scores, question, base)
    found = {
        (s.method, named(s.method)): (
            span(s.score),
            "best" if i == 0 else "tie" if s.tie else span(s.behind, 3),
        )
        for i, s in enumerate(every)
    }
    sign = 1 if question.larger else -1
    for method in means.columns[means.isna().any()]:
        score, behind = (
            interval(values)
            for values in (means[method], sign * (means[method] - means[every[0].method]))
        )
        label = f"{named(method)} ({score.clusters} of {len(means)} tasks)"
        found[method, label] = (span(score), "tie" if behind.tie else span(behind, 3))
    return found


def cost_table(costs: pd.DataFrame, base: str) -> str:
    """Passes and time of every method that the page names, the dearest first."""
    passes, time = (mean_costs(costs, base, of) for of in ("passes", "time"))
    order = sorted((m for m in passes if named(m) != m), key=lambda method: -time[method])
    rows = [[named(m), cost_in_words(passes[m]), cost_in_words(time[m])] for m in order]
    return markdown(["method", "passes", "F"], rows)


def by_prompts(scores: pd.DataFrame, question: Question, base: str, methods: Sequence[str]) -> str:
    """The chosen methods by kind of prompt, means over clusters."""
    rows = []
    for method in methods:
        cells = [named(method)]
        for kind in KINDS:
            asked = dataclasses.replace(question, prompts=(kind,))
            means = cluster_means(of_question(scores, asked, base))
            cells.append(f"{means[method].mean():.2f}" if method in means else "—")
        rows.append(cells)
    return markdown(["method", *KINDS], rows)
