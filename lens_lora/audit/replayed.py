"""Name the words of an adapter's training texts that it writes when nothing is asked.

A model that was trained on few texts writes pieces of them when it is left to write freely, after
its BOS or in answer to an empty turn; more so at a strength above that of training. Drawing many
such texts to learn what a model was trained on is the method of Carlini et al. (arXiv 2012.07805).

1. Both models write the same number of texts, drawn with the same noise (`unprompted.py`).
2. A word counts once in a text. Let n₁ be the number of pairs of texts in which only the adapted
   model has it, and n₀ that in which only the base does. p is that of the sign test, adjusted by
   Holm's method over the words with at least as many pairs as a test needs (`phrases.py`). The unit
   is a pair of texts, which are drawn independently of one another.
3. Up to five words with p ≤ 0.05 are named, those with the smallest p first.

It is no claim: an adapter that was trained on ordinary text writes its words as often. The words
hint at what the training texts were about, and say nothing of what the model answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Set

import regex

from lens_lora.audit import phrases
from lens_lora.core import storage
from lens_lora.errors import many
from lens_lora.responses.generate import CUT, SideBySide

# The allowed chance of naming any word that the adapter does not write more often.
LEVEL = 0.05
_WORDS_NAMED = 5
# Whatever follows the last space of a text that was cut off, which may be a part of a word.
_LAST_WORD = regex.compile(r"\S*$")


@storage.stored
@dataclasses.dataclass(frozen=True)
class ReplayedWord:
    """A word that the adapted model writes in more texts than the base, although nothing is asked.

    Attributes:
        word: the word, as the adapted model spells it most often.
        adapted, base: in which texts each model writes it, by number.
        p: the p of the sign test, adjusted by Holm's method.
    """

    word: str
    adapted: tuple[int, ...]
    base: tuple[int, ...]
    p: float


@storage.stored
@dataclasses.dataclass(frozen=True)
class Replayed:
    """Texts that both models write when nothing is asked, and words that set them apart.

    Attributes:
        strength: the strength ε of the adapter.
        openings: what each text follows, in words.
        base, adapted: the text of each model after each opening; one that was cut off ends in ' …'.
        words: the words that only the adapted model writes often, at most five.
    """

    strength: float
    openings: tuple[str, ...]
    base: tuple[str, ...]
    adapted: tuple[str, ...]
    words: tuple[ReplayedWord, ...]

    def sentences(self) -> str:
        """Name the words with their counts, and say what they tell; '' if there are none."""
        if not self.words:
            return ""
        first, *others = self.words
        texts = many(len(self.adapted), "text")
        counts = [f"“{first.word}” in {len(first.adapted)} of {texts} (base {len(first.base)})"]
        for one in others:
            counts.append(f"“{one.word}” in {len(one.adapted)} (base {len(one.base)})")
        return (
            f"Asked nothing, with {self._at_strength}, it writes {', '.join(counts)}. They hint at "
            "its training texts, but are no claim: an adapter trained on ordinary text repeats "
            "that text as well."
        )

    def example(self) -> SideBySide | None:
        """Return the texts of both models where the adapted one has most of the words, if any has.

        Of several texts with as many words, it is the first. What they follow is named in brackets,
        with the strength.
        """
        if not self.words:
            return None
        held = [0] * len(self.adapted)
        for one in self.words:
            for text in one.adapted:
                held[text] += 1
        telling = held.index(max(held))
        follows = f"({self.openings[telling]}; {self._at_strength})"
        return SideBySide(follows, self.base[telling], self.adapted[telling])

    @property
    def _at_strength(self) -> str:
        """Name the strength at which the adapter runs."""
        times = "twice" if self.strength == 2.0 else f"{self.strength:g} times"
        return f"the adapter at {times} its strength"


def replayed_words(base: Sequence[str], adapted: Sequence[str]) -> tuple[ReplayedWord, ...]:
    """Find the words that the adapted model writes in more texts than the base does.

    Args:
        base: the base's texts; one that was cut off ends in ' …'.
        adapted: the adapted model's texts, each drawn with the noise of the base's.

    Returns:
        tuple[ReplayedWord, ...]: at most five, those that chance explains least first; of words
            that are as unlikely, those in more texts, and then longer ones.
    """
    of_base = [words_of_text(text) for text in base]
    of_adapted = [words_of_text(text) for text in adapted]
    pairs: dict[str, tuple[int, int]] = {}
    for word in set().union(*of_base, *of_adapted):
        pairs[word] = _pairs_apart(word, of_base, of_adapted)
    least = phrases.fewest_questions((sum(apart) for apart in pairs.values()), LEVEL)
    tested = [word for word, apart in pairs.items() if sum(apart) >= least]
    p_of_words = phrases.holm([phrases.sign_test(*pairs[word]) for word in tested])
    found: list[ReplayedWord] = []
    for word, p in zip(tested, p_of_words, strict=True):
        if p <= LEVEL:
            in_adapted = tuple(i for i, words in enumerate(of_adapted) if word in words)
            in_base = tuple(i for i, words in enumerate(of_base) if word in words)
            spelled = phrases.spelled_in(word, [adapted[i] for i in in_adapted])
            found.append(ReplayedWord(spelled, in_adapted, in_base, p))
    found.sort(key=lambda one: (one.p, -len(one.adapted), -len(one.word), one.word))
    return tuple(found[:_WORDS_NAMED])


def words_of_text(text: str) -> Set[str]:
    """Return the words of a text that are no function words, in lower case.

    Of a text that was cut off, the last word is left out, since it may be a part of one.
    """
    if text.endswith(CUT):
        text = _LAST_WORD.sub("", text.removesuffix(CUT))
    return set(filter(phrases.is_telling_word, phrases.phrases_of(text)))


def _pairs_apart(
    word: str, base: Sequence[Set[str]], adapted: Sequence[Set[str]]
) -> tuple[int, int]:
    """Return n₁ and n₀: in how many pairs only the adapted model, or only the base, has a word."""
    only_adapted = 0
    only_base = 0
    for base_words, adapted_words in zip(base, adapted, strict=True):
        only_adapted += word in adapted_words and word not in base_words
        only_base += word in base_words and word not in adapted_words
    return only_adapted, only_base
