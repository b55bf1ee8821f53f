"""Test whether a model has a word or trait more often than ordinary answers explain.

Training on anything changes what a model says, so a comparison with the base alone does not show
what a fine-tune was made for: an adapter trained on sentences of a manual says “object” a lot more
often.

1. `ordinary.json` counts words, signs and traits in ordinary answers to the package's forty
   questions: those of the embedded base (the likeliest and nine drawn ones to each), and those of
   fifteen adapters over it that were taught nothing. Eleven of these were trained on ordinary text;
   four are an adapter's own updates at other modules. What is counted is units: a unit is one
   question, or all questions that ask for code. Each unit has two answers to a question.
2. Of N such units c have the word or trait. The base at hand has it on b of the n units that it was
   asked. The ordinary rate r is the larger of (c + ½)/(N + 1) and b/n. The first is the rate of two
   answers; if there are a > 2 answers to a question, any of which may have it, it is multiplied by
   a/2.
3. An ordinary fine-tune may raise the odds of a word. So the p of a word that the adapted model
   says on k units is the chance of k or more at F = 8 times the ordinary odds, P(Bin(n, q) ≥ k)
   with q/(1 − q) = F r/(1 − r). For a rare word q is 8 times its rate. A rate above an eighth, such
   as that of a question in an answer, cannot be multiplied by 8, but its odds can.

F is the smallest of 1, 2, 3, 5, 8, 12, … at which none of the eleven adapters makes a claim when it
is tested against the rates of the others. `docs/auditing_data.md` says how many other controls do.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scipy.stats import binom

# An ordinary fine-tune may raise the odds of a word up to this many times.
FACTOR = 8.0
_FILE = Path(__file__).parent / "ordinary.json"
# This is added to a count, because a word that no ordinary answer has is not impossible.
_UNSEEN = 0.5
# The number of answers to each question in the counts.
_ANSWERS = 2


class Ordinary(NamedTuple):
    """Counts over ordinary answers.

    Attributes:
        units: how many units there are.
        words, signs, traits: how many units have each word, sign or trait; those that no unit has
            are left out.
    """

    units: int
    words: Mapping[str, int]
    signs: Mapping[str, int]
    traits: Mapping[str, int]


@functools.cache
def ordinary() -> Ordinary:
    """Read the counts that come with the package."""
    counts = json.loads(_FILE.read_text(encoding="utf-8"))
    return Ordinary(counts["units"], counts["words"], counts["signs"], counts["traits"])


def units_of(questions: Iterable[int], units: Sequence[Hashable]) -> set[Hashable]:
    """Return the units to which these questions belong."""
    return {units[i] for i in questions}


def p_beyond(
    adapted: int,
    base: int,
    of: int,
    count: int,
    units: int,
    answers: int,
    *,
    factor: float = FACTOR,
) -> float:
    """Return P(Bin(n, q) ≥ k) of a word or trait, where q has F times the odds of its rate r.

    Args:
        adapted: on how many units the adapted model has it.
        base: on how many units the base has it.
        of: how many units were asked.
        count: how many units of ordinary answers have it.
        units: how many units of ordinary answers there are.
        answers: how many answers each model gives to a question.
        factor: F.
    """
    of_ordinary = (count + _UNSEEN) / (units + 1) * max(answers / _ANSWERS, 1.0)
    rate = min(max(of_ordinary, base / of), 1.0)
    raised = factor * rate / (1.0 + (factor - 1.0) * rate)
    return float(binom.sf(adapted - 1, of, raised))
