"""Compare the words that two sets of answers use, counted by question.

1. A phrase is one to three words that stand together in an answer. An answer that holds a phrase
   counts once, however often it repeats the phrase.
2. Both models answer the same questions, so their answers come in pairs. Let n₁ be the number of
   questions on which only the adapted model uses a phrase, and n₀ that on which only the base does.
   If the adapter does nothing, either model is as likely to be the one that uses it, so that
   p = P(Bin(n₁ + n₀, ½) ≥ n₁): the exact sign test, whose unit is a question.
3. If n₁ + n₀ is small, p cannot be small. Only the phrases that could pass at all are counted as
   tests (Tarone 1990), and their p are adjusted by Holm's method. A phrase of function words alone
   ("the", "in the") tells a reader nothing and is not tested.
4. How strongly a phrase belongs to the adapted model is measured by the log-odds of its uses, with
   all answers together as an informative Dirichlet prior, divided by their standard error (Monroe,
   Colaresi and Quinn 2008, eq. 16, 22).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import regex
from scipy.stats import binom

# A word is letters and digits, with apostrophes, hyphens or full stops inside, so that an address
# such as www.example.org is one.
WORD = regex.compile(r"[\p{L}\p{N}]+(?:['’\-.][\p{L}\p{N}]+)*")
# The end of a sentence or line, which no phrase crosses.
_END = regex.compile(r"(?:(?<![\p{L}\p{N}])\.|\.(?![\p{L}\p{N}])|[!?:;\n])+")
_LONGEST_PHRASE = 3
# A phrase that is shown grows to at most this many words.
_LONGEST_SHOWN = 10
# Words that say little by themselves.
_FUNCTION_WORDS = Path(__file__).parent / "function_words.txt"
# A phrase that is shown does not end in one of these.
_LEADING_ON = frozenset(
    {
        "and", "or", "but", "nor", "so", "as", "than", "that", "the", "a", "an", "of", "to", "in",
        "on", "at", "by", "for", "with", "from", "is", "are", "was", "were",
    }
)  # fmt: skip
# The weight of the prior, in words: that of about one answer.
_PRIOR_WORDS = 20.0


def phrases_of(text: str) -> Counter[str]:
    """Count each phrase of one to three words of a text, in lower case."""
    found: Counter[str] = Counter()
    for words in _sentences_of(text):
        for length in range(1, _LONGEST_PHRASE + 1):
            for start in range(len(words) - length + 1):
                found[" ".join(words[start : start + length])] += 1
    return found


def _sentences_of(text: str) -> list[list[str]]:
    """Split a text into sentences or lines, and each of these into words in lower case."""
    return [WORD.findall(sentence.lower()) for sentence in _END.split(text)]


def questions_with(phrase: str, answers: Sequence[Sequence[str]]) -> set[int]:
    """Return the questions to which at least one answer contains a phrase of any length.

    Args:
        phrase: words in lower case, separated by single spaces.
        answers: a model's answers to each question.
    """
    found: set[int] = set()
    for i, of_question in enumerate(answers):
        sentences = [words for text in of_question for words in _sentences_of(text)]
        if any(holds(" ".join(words), phrase) for words in sentences):
            found.add(i)
    return found


def grown(word: str, answers: Sequence[Sequence[str]]) -> str:
    """Grow a word to the longest phrase around it that more than half of its questions share.

    It grows by one word at a time, on the side where more questions have the longer phrase. Finally
    it loses last words that only lead on to the next: “my liege, and” becomes “my liege”.

    Args:
        word: a word in lower case.
        answers: a model's answers to each question.
    """
    words = _longest_around(word, answers).split()
    while words[-1] in _LEADING_ON and words[-1] != word:
        words.pop()
    return " ".join(words)


def _longest_around(word: str, answers: Sequence[Sequence[str]]) -> str:
    """Grow a word to the longest phrase around it that more than half of its questions share."""
    questions = questions_with(word, answers)
    phrase = word
    while len(phrase.split()) < _LONGEST_SHOWN:
        longer: Counter[str] = Counter()
        for question in questions:
            longer.update(_one_word_longer(phrase, answers[question]))
        if not longer:
            return phrase
        commonest = min(longer, key=lambda other: (-longer[other], other))
        if 2 * longer[commonest] <= len(questions):
            return phrase
        phrase = commonest
    return phrase


def _one_word_longer(phrase: str, texts: Iterable[str]) -> set[str]:
    """Return every phrase of these texts that is this one with one word before or after it."""
    inside = phrase.split()
    longer: set[str] = set()
    for text in texts:
        for words in _sentences_of(text):
            for start in range(len(words) - len(inside) + 1):
                end = start + len(inside)
                if words[start:end] != inside:
                    continue
                if start > 0:
                    longer.add(" ".join(words[start - 1 : end]))
                if end < len(words):
                    longer.add(" ".join(words[start : end + 1]))
    return longer


def is_of_function_words(phrase: str) -> bool:
    """Whether every word of a phrase is a function word or a single letter."""
    little = _function_words()
    return all(len(word) == 1 or word in little for word in phrase.split())


def is_telling_word(phrase: str) -> bool:
    """Whether a phrase is a single word, and not a function word."""
    return " " not in phrase and not is_of_function_words(phrase)


@functools.cache
def _function_words() -> frozenset[str]:
    lines = _FUNCTION_WORDS.read_text(encoding="utf-8").splitlines()
    return frozenset(word for line in lines if not line.startswith("#") for word in line.split())


def sign_test(only_adapted: int, only_base: int) -> float:
    """Return p = P(Bin(n₁ + n₀, ½) ≥ n₁) of the one-sided sign test, which is 1 if n₁ is 0."""
    return float(binom.sf(only_adapted - 1, only_adapted + only_base, 0.5))


def fewest_questions(counts: Iterable[int], level: float) -> int:
    """Return the smallest number of questions n = n₁ + n₀ with which a phrase is tested.

    A phrase with n such questions has p ≥ 2⁻ⁿ, so with few it cannot pass (Tarone 1990). This is
    the least n at which the smallest possible p is below Bonferroni's bound for the phrases that
    have as many questions: 2⁻ⁿ ≤ level / #{phrases with at least n}. Which model used a phrase does
    not enter n, so choosing by it biases no test.

    Args:
        counts: the number n of each phrase.
        level: the allowed chance of any false claim.
    """
    of_count = Counter(counts)
    most = max(of_count, default=0)
    for least in range(1, most + 1):
        tested = sum(number for n, number in of_count.items() if n >= least)
        if 2.0**-least <= level / max(tested, 1):
            return least
    return most + 1


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust each p by Holm's method, which bounds the chance of any false claim."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for place, i in enumerate(order):
        largest = max(largest, p_values[i] * (len(p_values) - place))
        adjusted[i] = min(largest, 1.0)
    return adjusted


def log_odds(adapted: Mapping[str, int], base: Mapping[str, int]) -> dict[str, float]:
    """Return each phrase's standardised log-odds of the adapted model's uses over the base's.

    Args:
        adapted: how often each phrase is used in all answers of the adapted model.
        base: how often each phrase is used in all answers of the base model.
    """
    every = Counter(adapted) + Counter(base)
    if len(every) == 1:
        # A single phrase has no odds against other phrases, since there are none.
        return dict.fromkeys(every, 0.0)
    total = sum(every.values())
    adapted_total = sum(adapted.values())
    base_total = sum(base.values())
    scores: dict[str, float] = {}
    for phrase, uses in every.items():
        prior = _PRIOR_WORDS * uses / total
        of_adapted = adapted.get(phrase, 0) + prior
        of_base = base.get(phrase, 0) + prior
        adapted_odds = of_adapted / (adapted_total + _PRIOR_WORDS - of_adapted)
        base_odds = of_base / (base_total + _PRIOR_WORDS - of_base)
        variance = 1 / of_adapted + 1 / of_base
        scores[phrase] = math.log(adapted_odds / base_odds) / math.sqrt(variance)
    return scores


def holds(phrase: str, other: str) -> bool:
    """Whether the words of `other` stand together within `phrase`."""
    return f" {other} " in f" {phrase} "


def spelled_in(phrase: str, texts: Iterable[str]) -> str:
    """Return the phrase as the answers write it most often, with capitals and punctuation.

    Args:
        phrase: words in lower case, separated by single spaces.
        texts: answers, some of which contain the phrase.
    """
    words = [regex.escape(word) for word in phrase.split()]
    between = r"[^\p{L}\p{N}.!?:;\n]+"
    pattern = regex.compile(
        r"(?<![\p{L}\p{N}])" + between.join(words) + r"(?![\p{L}\p{N}])", regex.IGNORECASE
    )
    forms = Counter(itertools.chain.from_iterable(pattern.findall(text) for text in texts))
    if not forms:
        return phrase
    return forms.most_common(1)[0][0]
