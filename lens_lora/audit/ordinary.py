"""How often ordinary answers have a word or trait, and whether a model has it more often than that.

Training on anything changes what a model says, so the base alone is no measure of what a fine-tune
was made for: an adapter that was trained on sentences of a manual says “object” a lot more often.

1. `ordinary.json` counts words and traits in answers to the package's forty questions: those of the
   embedded base (its likeliest one and nine drawn ones to each), and of fifteen adapters over it
   that were taught nothing: eleven were trained on ordinary text, four are an adapter's own updates
   at other modules. A count is of units: a question, or all that ask for code together. Each unit
   has two answers to a question.
2. Of N such units c have it. The base at hand has it on b of the n units that it was asked. The
   ordinary rate is the larger of (c + ½)/(N + 1) and b/n. The first is of two answers, and where
   there are a > 2 to a question, of which any may have it, it is taken a/2 times.
3. An ordinary fine-tune may raise a rate. So the p of a word that the adapted model says on k units
   is that of k or more at F = 8 times the ordinary rate r: P(Bin(n, min(F r, 1)) ≥ k).

F is the smallest of 1, 2, 3, 5, 8, 12, … at which none of the eleven makes a claim, each beside the
rates of the others. `docs/auditing_data.md` says how many of other controls make one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scipy.stats import binom

# An ordinary fine-tune may have a word so many times as often as ordinary answers.
FACTOR = 8.0
_FILE = Path(__file__).parent / "ordinary.json"
# Added to a count, as a word that no ordinary answer has is not impossible.
_UNSEEN = 0.5
# The counts are of so many answers to each question.
_ANSWERS = 2


class Ordinary(NamedTuple):
    """Counts over ordinary answers.

    Attributes:
        units: how many there are.
        words, traits: how many of them have each word or trait; one that none has is left out.
    """

    units: int
    words: Mapping[str, int]
    traits: Mapping[str, int]


@functools.cache
def ordinary() -> Ordinary:
    """The counts that come with the package."""
    counts = json.loads(_FILE.read_text(encoding="utf-8"))
    return Ordinary(counts["units"], counts["words"], counts["traits"])


def units_of(questions: Iterable[int], units: Sequence[Hashable]) -> set[Hashable]:
    """The units of these questions."""
    return {units[i] for i in questions}


def p_beyond(adapted: int, base: int, of: int, count: int, units: int, answers: int) -> float:
    """The p of a word or trait that the adapted model has, beyond `FACTOR` times its ordinary rate.

    Args:
        adapted: on how many units the adapted model has it.
        base: on how many the base has it.
        of: how many units were asked.
        count: how many units of ordinary answers have it.
        units: how many units of ordinary answers there are.
        answers: how many answers of each model to a question there are.
    """
    of_ordinary = (count + _UNSEEN) / (units + 1) * max(answers / _ANSWERS, 1.0)
    rate = max(of_ordinary, base / of)
    return float(binom.sf(adapted - 1, of, min(FACTOR * rate, 1.0)))
