"""Do the answers that were chosen on the first base carry over to a second? From stored numbers.

Two things may carry over, and the page tells them apart:

1. The choice: by the second base's own test the estimate is the best or a tie with it.
2. The level: the 95 % intervals of both medians overlap. The tasks are not the same, so there is
   no paired test of this; intervals that are apart are a difference, others are no proof of none.
"""

from __future__ import annotations

import dataclasses
import math

import pandas as pd

from benchmarks.evidence.intervals import TOO_FEW, Standing, Summary
from benchmarks.evidence.results import Numbers, scores_of
from benchmarks.evidence.tables import (
    Question,
    markdown,
    means_of,
    named,
    number,
    span,
    standings,
    summary_of,
)
from benchmarks.evidence.words import ERRORS, Advice, advice, compared


def agreement(numbers: Numbers, base: str, other: str) -> tuple[str, tuple[str, list[str]]]:
    """One line per question of the first page and its sizes; and how comparisons carry over."""
    scores = scores_of(numbers)
    rows = []
    for found in advice(numbers, scores, base):
        for question in _with_sizes(found):
            rows.append(_row(scores, question, found.method, (base, other)))
    head = ["question", "estimate", base, "worst", other, "worst", "there it is", "choice", "level"]
    return markdown(head, rows), _comparisons(scores, base, other)


def slopes(numbers: Numbers, base: str, other: str) -> str:
    """Slopes of measured effects on the numbers, where they were stored: 1 if sizes are right."""
    scores = scores_of(numbers)
    parts = []
    for found in advice(numbers, scores, base):
        of_slopes = dataclasses.replace(found.question, metric="slope")
        means = means_of(scores, of_slopes, other)
        if found.question in ERRORS and found.method in means:
            values = means[found.method].dropna()
            start = f"{found.question.short}, {named(found.method)}"
            ends = f"{number(values.min())} to {number(values.max())}"
            parts.append(f"{start}: {number(values.median())} ({ends})")
    return "; ".join(parts)


def _with_sizes(found: Advice) -> list[Question]:
    """The question of an advice, and the same about the sizes of the numbers, if there is one."""
    question = found.question
    if question in ERRORS:
        return [question, ERRORS[question]]
    return [question]


def _row(
    scores: pd.DataFrame, question: Question, method: str, bases: tuple[str, str]
) -> list[str]:
    """The cells of one line: the score on both bases, whether the choice holds, and the level."""
    here = summary_of(scores, question, bases[0], method)
    there = summary_of(scores, question, bases[1], method)
    start = [question.label, named(method), span(here), number(here.worst)]
    if not there.tasks:
        return [*start, "—", "—", "not run", "—", "—"]
    ranks = standings(scores, question, bases[1])
    own = next(one for one in ranks if one.method == method)
    level = _level(here, there, question.larger)
    return [*start, span(there), number(there.worst), *_choice(own, ranks), level]


def _choice(own: Standing, ranks: list[Standing]) -> tuple[str, str]:
    """Compare the estimate with the others on the second base: does the choice of it hold?"""
    has_verdicts = any(one.verdict in ("tie", "worse") for one in ranks)
    if own.verdict == TOO_FEW or not has_verdicts:
        return "—", TOO_FEW
    if own.tie:
        return own.verdict, "holds"
    best = next(one.method for one in ranks if one.verdict == "best")
    return f"{number(own.behind, 3)} behind {named(best)}", "does not"


def _level(here: Summary, there: Summary, larger_is_better: bool) -> str:
    """Compare the medians on both bases by their intervals, and then the worst tasks."""
    if overlap(here, there):
        level = "intervals overlap"
    elif there.median > here.median:
        level = "higher"
    else:
        level = "lower"
    is_worse = there.worst < here.worst if larger_is_better else there.worst > here.worst
    if is_worse:
        level += "; the worst is worse"
    return level


def overlap(one: Summary, other: Summary) -> bool:
    """Whether the intervals share a value; one without an interval is a point."""
    one_low, one_high = _ends(one)
    other_low, other_high = _ends(other)
    return max(one_low, other_low) <= min(one_high, other_high)


def _ends(found: Summary) -> tuple[float, float]:
    """The ends of an interval, both at the median if there is no interval."""
    if math.isnan(found.low):
        return found.median, found.median
    return found.low, found.high


def _comparisons(scores: pd.DataFrame, base: str, other: str) -> tuple[str, list[str]]:
    """Count the pairs of methods with one answer on both bases, and tell the others in words."""
    here = _answers(scores, base)
    there = _answers(scores, other)
    on_both = [pair for pair in here if pair in there]
    apart = []
    for pair in on_both:
        if here[pair] != there[pair]:
            method, against, label = pair
            answers = f"*{here[pair]}*, there *{there[pair]}*"
            apart.append(f"{method} beside {against} ({label}): {answers}")
    return f"{len(on_both) - len(apart)} of {len(on_both)}", apart


def _answers(scores: pd.DataFrame, base: str) -> dict[tuple[str, str, str], str]:
    """The verdict on each pair of methods and question that has one on a base."""
    answers = {}
    for method, against, label, _, verdict, _ in compared(scores, base):
        if verdict != TOO_FEW:
            answers[method, against, label] = verdict
    return answers
