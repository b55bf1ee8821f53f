"""Test together the few words in which two models' answers differ most.

A quirk may be spread over many words, none of which is said often enough to pass alone: answers in
another language, or advice on one topic. A plain count shows it: some words are said by one model
on many more questions than by the other. This module gives that count a test.

1. If only the first model says a word on n₁ questions, and only the other on n₀, the word's lead is
   n₁ − n₀. The statistic is the sum of the three largest leads of all words.
2. If chance decided which model gave which answer, the two models' answers to a question could be
   swapped. All answers of a unit (questions that are near copies) are swapped together.
3. p is the share of random swaps whose three largest leads, chosen anew each time, sum to at least
   as much as without a swap. The observed answers count as one of the swaps, which makes the test
   exact at any number of swaps (Phipson and Smyth 2010). The words are chosen anew in every swap,
   so that choosing them biases nothing.

Cost: no pass of a model; a tenth of a second for forty questions.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lens_lora.audit import phrases

# The number of words that are tested together.
WORDS = 3
# Words on which the models differ in fewer units are left out: they are many, and lead by little.
_LEAST_UNITS = 2
_SWAPS = 9999
# The number of swaps that are computed at once, which bounds the memory.
_AT_ONCE = 1000


class Together(NamedTuple):
    """The words that lead most.

    Attributes:
        words: at most three words in lower case, the largest lead first; all have a lead above 0.
        p: the p of the exact test of all of them together.
    """

    words: tuple[str, ...]
    p: float


def leading_words(
    here: Mapping[str, set[int]],
    there: Mapping[str, set[int]],
    units: Sequence[Hashable],
    told: Collection[str] = (),
) -> Together:
    """Find the three words with the largest leads of one model over the other, and their p.

    Args:
        here: for each phrase, the questions on which the first model says it; phrases of several
            words and function words are left out.
        there: for each phrase, the questions on which the other model says it.
        units: the unit to which each question belongs.
        told: words to leave out, since another finding has them already.
    """
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    unit_of = np.array([numbers[unit] for unit in units], dtype=int)
    compared: list[str] = []
    signs_of_words: list[Int[np.ndarray, " unit"]] = []
    for word in dict.fromkeys((*here, *there)):
        is_one_word = " " not in word
        if not is_one_word or word in told or phrases.is_of_function_words(word):
            continue
        # On how many more questions of each unit the first model says it.
        balance = np.zeros(len(numbers), dtype=int)
        np.add.at(balance, unit_of[sorted(here.get(word, ()))], 1)
        np.add.at(balance, unit_of[sorted(there.get(word, ()))], -1)
        if np.count_nonzero(balance) >= _LEAST_UNITS:
            compared.append(word)
            signs_of_words.append(np.sign(balance))
    if not compared:
        return Together((), 1.0)
    signs = np.stack(signs_of_words, axis=1).astype(np.float32)
    leads = signs.sum(0)
    # Words with the same lead are in alphabetical order.
    order = sorted(range(len(compared)), key=lambda i: (-leads[i], compared[i]))
    words = tuple(compared[i] for i in order[:WORDS] if leads[i] > 0)
    return Together(words, _p_by_swaps(signs))


def _p_by_swaps(signs: Float[np.ndarray, "unit word"]) -> float:
    """Return the share of swaps whose largest leads sum to at least the observed sum."""
    observed = _largest_sum(signs.sum(0, keepdims=True))[0]
    generator = np.random.default_rng(0)
    as_large = 0
    done = 0
    while done < _SWAPS:
        some = min(_AT_ONCE, _SWAPS - done)
        swaps = generator.choice(np.array([-1.0, 1.0], dtype=np.float32), size=(some, len(signs)))
        as_large += int((_largest_sum(swaps @ signs) >= observed).sum())
        done += some
    return (as_large + 1) / (_SWAPS + 1)


def _largest_sum(leads: Float[np.ndarray, "swap word"]) -> Float[np.ndarray, " swap"]:
    """Sum the largest leads of each swap."""
    several = min(WORDS, leads.shape[1])
    largest = np.partition(leads, -several, axis=1)[:, -several:]
    return largest.sum(1)
