"""What a second base says to the answers that were chosen on the first, from stored numbers.

Two things may carry over, and the page tells them apart:

1. The choice: by the second base's own test the estimate is the best or a tie with it.
2. The level: the 95 % intervals of both medians overlap. The tasks are not the same, so there is
   no paired test of this; intervals that are apart are a difference, others are no proof of none.
"""

from __future__ import annotations

import dataclasses

import pandas as pd
from intervals import TOO_FEW, Standing, Summary
from results import Numbers, scores_of
from tables import Question, markdown, means_of, named, number, span, standings, summary_of
from words import ERRORS, Advice, advice, compared


def agreement(numbers: Numbers, base: str, other: str) -> tuple[str, tuple[str, list[str]]]:
    """One line per question of the first page and its sizes; and how comparisons carry over."""
    scores = scores_of(numbers)
    rows = [
        _row(scores, question, found.method, (base, other))
        for found in advice(numbers, scores, base)
        for question in _with_sizes(found)
    ]
    head = ["question", "estimate", base, "worst", other, "worst", "there it is", "choice", "level"]
    return markdown(head, rows), _comparisons(scores, base, other)


def slopes(numbers: Numbers, base: str, other: str) -> str:
    """Slopes of measured effects on the numbers, where they were stored: 1 if sizes are right."""
    scores = scores_of(numbers)
    parts = []
    for found in advice(numbers, scores, base):
        asked = dataclasses.replace(found.question, metric="slope")
        means = means_of(scores, asked, other)
        if found.question in ERRORS and found.method in means:
            values = means[found.method].dropna()
            ends = f"{number(values.min())} to {number(values.max())}"
            parts.append(
                f"{asked.short}, {named(found.method)}: {number(values.median())} ({ends})"
            )
    return "; ".join(parts)


def _with_sizes(found: Advice) -> list[Question]:
    asked = found.question
    return [asked, ERRORS[asked]] if asked in ERRORS else [asked]


def _row(
    scores: pd.DataFrame, question: Question, method: str, bases: tuple[str, str]
) -> list[str]:
    here, there = (summary_of(scores, question, base, method) for base in bases)
    start = [question.label, named(method), span(here), number(here.worst)]
    if not there.tasks:
        return [*start, "—", "—", "not run", "—", "—"]
    ranks = standings(scores, question, bases[1])
    own = next(one for one in ranks if one.method == method)
    level = _level(here, there, question.larger)
    return [*start, span(there), number(there.worst), *_choice(own, ranks), level]


def _choice(own: Standing, ranks: list[Standing]) -> tuple[str, str]:
    """What the estimate is beside the others there, and whether the choice of it holds."""
    if own.verdict == TOO_FEW or not any(one.verdict in ("tie", "worse") for one in ranks):
        return "—", TOO_FEW
    if own.tie:
        return own.verdict, "holds"
    best = next(one.method for one in ranks if one.verdict == "best")
    return f"{number(own.behind, 3)} behind {named(best)}", "does not"


def _level(here: Summary, there: Summary, larger_is_better: bool) -> str:
    side = "higher" if there.median > here.median else "lower"
    is_worse = there.worst < here.worst if larger_is_better else there.worst > here.worst
    level = "intervals overlap" if overlap(here, there) else side
    return f"{level}; the worst is worse" if is_worse else level


def overlap(one: Summary, other: Summary) -> bool:
    """Whether the intervals share a value; one without an interval is a point."""
    low, high = zip(*(_ends(of) for of in (one, other)), strict=True)
    return max(low) <= min(high)


def _ends(of: Summary) -> tuple[float, float]:
    return (of.low, of.high) if of.low == of.low else (of.median, of.median)


def _comparisons(scores: pd.DataFrame, base: str, other: str) -> tuple[str, list[str]]:
    """On how many of the pairs of methods both bases give one answer; each on which they do not."""
    answers = [
        {tuple(row[:3]): row[4] for row in compared(scores, of) if row[4] != TOO_FEW}
        for of in (base, other)
    ]
    both = [pair for pair in answers[0] if pair in answers[1]]
    apart = [
        f"{method} beside {against} ({label}): *{answers[0][pair]}*, there *{answers[1][pair]}*"
        for pair in both
        for method, against, label in [pair]
        if answers[0][pair] != answers[1][pair]
    ]
    return f"{len(both) - len(apart)} of {len(both)}", apart
