"""Find what sets two models' answers to the same questions apart, by exact tests.

To the package's own questions (`findings_beyond_ordinary`) it is known how often ordinary answers
have a word, so that a claim is what ordinary training does not explain either (`ordinary.py`):

1. Each word, and in a list of its own each trait of an answer (`traits.py`), is tested against its
   ordinary rate. A word that passes is shown as the longest phrase that it mostly stands in.
2. What the adapted model no longer says has no such rate, and is tested as below.

To questions of a caller's own (`findings_of`) the base alone is the measure:

1. A model says a phrase in answer to a question if any of its answers holds it. A phrase is a
   finding if one model says it in answer to more questions than chance allows (`phrases.py`).
2. The words that lead most, beside those of the phrases that were found, are tested together, as
   a quirk may be spread over many of them (`together.py`).
3. The test of phrases finds traits of the answers, too, that are no phrase (`traits.py`).
4. Questions that are near copies of one another are one unit of the tests (`units`): whatever moves
   one of them moves all.
5. Phrases that stand in one another on the same questions are one finding, the longest of them.

There are four lists: what the adapted model says, words together, traits, and what it no longer
says. Where either model might as well have given either answer to each question, the chance that
any of the four holds anything is at most `LEVEL`: each is tested at a quarter of it (Bonferroni).
So are the lists of what is beyond ordinary answers.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from typing import Literal, NamedTuple

from lens_lora.audit import phrases
from lens_lora.audit.ordinary import ordinary, p_beyond, units_of
from lens_lora.audit.together import WORDS, leading_words
from lens_lora.audit.traits import (
    ANSWERS_IN,
    TRAITS,
    has_enough_words,
    is_in_another_language,
    is_shorter,
    traits_of,
)
from lens_lora.core import storage
from lens_lora.responses.generate import SideBySide

# The chance of a false finding in the four lists together.
LEVEL = 0.02
_LISTS = 4
# A phrase stands for a shorter one in it if it is said on this share of the other's questions.
_SAME_QUESTIONS = 0.7
# A word leads by so many questions at least: one fewer than make a claim of a new word.
_LEAST_LEAD = 4
# A list of phrases has no more findings than this.
_MOST_FINDINGS = 12
# A trait of an answer beside its question.
_ANOTHER_LANGUAGE = "answers in another language than it was asked in"
# A trait of both models' answers to a question together.
SHORTER = "says less than half as much as the other model"

Kind = Literal["says", "says one of", "trait", "no longer says"]
# A model's answers to each question.
Answers = Sequence[Sequence[str]]


@storage.stored
@dataclasses.dataclass(frozen=True)
class Finding:
    """A phrase or trait of the answers that one model has on more questions than the other.

    Attributes:
        kind: 'says' and 'no longer says' of a phrase, 'says one of' of a few words, or 'trait'.
        what: the phrase as the answers write it, the words with a comma between them, or the trait
            in words.
        adapted: on how many questions the adapted model has it.
        base: on how many the base has it.
        asked: how many questions there are.
        p: of the exact test of what is beyond ordinary answers; on a caller's own questions of the
            exact sign test. Both are adjusted for all that were tested (Holm). Of words together
            that of the exact test by swaps. Each is adjusted for the four lists.
        log_odds: how strongly a phrase belongs to the model that says it more often: standardised
            log-odds; 0 for a trait and for several words.
        questions: the indices of those on which the model that has it more often has it and the
            other has not.
    """

    kind: Kind
    what: str
    adapted: int
    base: int
    asked: int
    p: float
    log_odds: float
    questions: tuple[int, ...]

    def after(self, others: int) -> Finding:
        """The same finding where so many other questions stand before its own.

        Args:
            others: how many.
        """
        return dataclasses.replace(self, questions=tuple(others + i for i in self.questions))

    def is_seen_in(self, pair: SideBySide) -> bool:
        """Whether the answer of the model that has it more often shows it; of a trait, always.

        Args:
            pair: both models' answers to a question of `questions`.
        """
        if self.kind == "trait":
            return True
        answer = pair.base if self.kind == "no longer says" else pair.adapted
        return self.is_spelled_in(answer)

    def is_spelled_in(self, answer: str) -> bool:
        """Whether an answer has the phrase, or one of the words; of a trait always false.

        Args:
            answer: the text of one answer.
        """
        if self.kind == "says one of":
            return any(word in phrases.phrases_of(answer) for word in self.what.split(", "))
        return self.kind != "trait" and self.what.lower() in answer.lower()

    def sentence(self) -> str:
        """The counts in words."""
        adapted = f"{self.adapted} of {self.asked} questions"
        base = str(self.base) if self.base else "none"
        if self.what == SHORTER:
            return self._sentence_on_length()
        if self.kind == "says":
            return f"It says “{self.what}” in answer to {adapted}, the base model to {base}."
        if self.kind == "says one of":
            words = quoted(self.what.split(", "))
            return f"It says {words} in answer to {adapted}, the base model to {base}."
        if self.kind == "no longer says":
            base = f"{self.base} of {self.asked} questions"
            still = f"to {self.adapted}" if self.adapted else "to none"
            return f"The base model says “{self.what}” in answer to {base}, it {still}."
        return f"It {self.what} on {adapted}, the base model on {base}."

    def _sentence_on_length(self) -> str:
        """The counts of answers that are less than half, or more than twice, as long."""
        shorter = (self.adapted, "less than half as long")
        longer = (self.base, "more than twice as long")
        commoner, rarer = (shorter, longer) if self.adapted > self.base else (longer, shorter)
        questions, length = commoner
        sentence = (
            f"To {questions} of {self.asked} questions its answers are {length} as the base model's"
        )
        other_questions, other_length = rarer
        if other_questions == 0:
            return f"{sentence}."
        return f"{sentence}, to {other_questions} {other_length}."


def findings_of(
    base: Answers,
    adapted: Answers,
    languages: Sequence[str | None] = (),
    units: Sequence[Hashable] | None = None,
) -> tuple[Finding, ...]:
    """Find what one model says, or how it says it, on more questions than chance allows.

    Args:
        base: the base's answers to each question.
        adapted: the adapted model's answers to the same questions.
        languages: in which each question was asked, None where that is not known; nothing where it
            is known of none.
        units: of each question what it is a part of: questions of one unit are so alike that they
            count as one in the tests. None where each stands for itself.
    """
    if units is None:
        units = range(len(base))
    of_base = [_phrases_of_all(answers) for answers in base]
    of_adapted = [_phrases_of_all(answers) for answers in adapted]
    said = _phrase_findings("says", of_adapted, of_base, adapted, units)
    dropped = _phrase_findings("no longer says", of_base, of_adapted, base, units)
    together = _words_together(of_adapted, of_base, said, units)
    return (*said, *together, *_trait_findings(base, adapted, languages, units), *dropped)


def findings_beyond_ordinary(
    base: Answers,
    adapted: Answers,
    languages: Sequence[str | None],
    units: Sequence[Hashable],
) -> tuple[Finding, ...]:
    """Find what the adapted model says, or how, beyond what ordinary training explains.

    Args:
        base: the base's answers to each of the package's questions.
        adapted: the adapted model's answers to the same questions.
        languages: in which each question was asked.
        units: of each question what it is a part of, as in `findings_of`.
    """
    said = _words_beyond(base, adapted, units)
    traits = _traits_beyond(base, adapted, languages, units)
    by_swaps = findings_of(base, adapted, languages, units)
    without_rate = [
        finding
        for finding in by_swaps
        if finding.kind == "no longer says" or finding.what == SHORTER
    ]
    return (*said, *traits, *without_rate)


def leads_of(base: Answers, adapted: Answers) -> list[Lead]:
    """The three words that are least likely beside ordinary answers, though too few for a claim.

    Args:
        base: the base's answers to each question.
        adapted: the adapted model's answers to the same questions.
    """
    of_base = _questions_by_phrase([_phrases_of_all(answers) for answers in base])
    of_adapted = _questions_by_phrase([_phrases_of_all(answers) for answers in adapted])
    counts = ordinary()
    p_of_lead: dict[Lead, float] = {}
    for word, questions in of_adapted.items():
        if not _is_telling(word):
            continue
        lead = Lead(word, len(questions), len(of_base.get(word, ())))
        if lead.adapted - lead.base >= _LEAST_LEAD:
            count = counts.words.get(word, 0)
            p = p_beyond(lead.adapted, lead.base, len(base), count, counts.units, len(adapted[0]))
            p_of_lead[lead] = p
    leads = sorted(p_of_lead, key=lambda lead: (p_of_lead[lead], lead.base - lead.adapted, lead))
    return leads[:WORDS]


def _is_telling(phrase: str) -> bool:
    """Whether a phrase is one word, and no function word."""
    return " " not in phrase and not phrases.is_of_function_words(phrase)


class Lead(NamedTuple):
    """A word, and in answer to how many questions each model says it."""

    word: str
    adapted: int
    base: int


def _phrases_of_all(answers: Sequence[str]) -> Counter[str]:
    """How often each phrase stands in the answers to one question."""
    found: Counter[str] = Counter()
    for answer in answers:
        found.update(phrases.phrases_of(answer))
    return found


def _words_beyond(
    base_answers: Answers, answers: Answers, units: Sequence[Hashable]
) -> list[Finding]:
    """The words that the adapted model says beyond their ordinary rates, as phrases.

    Args:
        base_answers: the base's answers to each question.
        answers: the adapted model's.
        units: of each question what it is a part of.
    """
    adapted = [_phrases_of_all(of_question) for of_question in answers]
    base = [_phrases_of_all(of_question) for of_question in base_answers]
    said_on = _questions_by_phrase(adapted)
    base_on = _questions_by_phrase(base)
    words = [phrase for phrase in said_on if _is_telling(phrase)]
    counts = ordinary()
    here = [len(units_of(said_on[word], units)) for word in words]
    there = [len(units_of(base_on.get(word, ()), units)) for word in words]
    of_ordinary = [counts.words.get(word, 0) for word in words]
    adjusted = _p_beyond_all(here, there, of_ordinary, units, len(answers[0]))
    p_of_word = dict(zip(words, adjusted, strict=True))
    passing = [word for word in words if p_of_word[word] <= LEVEL]
    scores = phrases.log_odds(_uses(adapted), _uses(base))
    passing.sort(key=lambda word: (p_of_word[word], -scores[word]))

    findings: list[Finding] = []
    shown: dict[str, set[int]] = {}
    for word in passing:
        phrase = phrases.grown(word, answers)
        of_adapted = phrases.questions_with(phrase, answers)
        known = {**said_on, **shown, phrase: of_adapted}
        if any(_says_the_same(phrase, other, known) for other in shown):
            continue
        shown[phrase] = of_adapted
        finding = _finding(
            "says",
            _as_written(phrase, of_adapted, answers),
            of_adapted,
            phrases.questions_with(phrase, base_answers),
            asked=len(adapted),
            p=p_of_word[word],
            log_odds=scores[word],
        )
        findings.append(finding)
    return findings[:_MOST_FINDINGS]


def _finding(
    kind: Kind,
    what: str,
    of_adapted: Set[int],
    of_base: Set[int],
    *,
    asked: int,
    p: float,
    log_odds: float = 0.0,
    is_of_base: bool = False,
) -> Finding:
    """A finding from the questions on which each model has it.

    Args:
        kind: whether it is a phrase, a few words or a trait, and of a phrase whose it is.
        what: the phrase as the answers write it, the words, or the trait in words.
        of_adapted: the indices of the questions on which the adapted model has it.
        of_base: the indices of those on which the base has it.
        asked: how many questions there are.
        p: of its test, adjusted for all that were tested.
        log_odds: how strongly the phrase belongs to the model that says it more often.
        is_of_base: whether the base is the model that has it more often.
    """
    alone = of_base - of_adapted if is_of_base else of_adapted - of_base
    return Finding(
        kind=kind,
        what=what,
        adapted=len(of_adapted),
        base=len(of_base),
        asked=asked,
        p=p,
        log_odds=log_odds,
        questions=tuple(sorted(alone)),
    )


def _as_written(phrase: str, questions: Iterable[int], answers: Answers) -> str:
    """A phrase as the answers to these questions write it most often."""
    texts: list[str] = []
    for question in questions:
        texts += answers[question]
    return phrases.spelled_in(phrase, texts)


def _traits_beyond(
    base: Answers,
    adapted: Answers,
    languages: Sequence[str | None],
    units: Sequence[Hashable],
) -> list[Finding]:
    """The traits that the adapted model's answers have beyond their ordinary rates.

    Args:
        base: the base's answers to each question.
        adapted: the adapted model's answers.
        languages: in which each question was asked.
        units: of each question what it is a part of.
    """
    of_base = questions_by_trait(base, languages)
    of_adapted = questions_by_trait(adapted, languages)
    traits = list(of_adapted)
    counts = ordinary()
    here = [len(units_of(of_adapted[trait], units)) for trait in traits]
    there = [len(units_of(of_base[trait], units)) for trait in traits]
    of_ordinary = [counts.traits.get(trait, 0) for trait in traits]
    adjusted = _p_beyond_all(here, there, of_ordinary, units, len(adapted[0]))
    findings: list[Finding] = []
    for trait, p in zip(traits, adjusted, strict=True):
        if p > LEVEL:
            continue
        finding = _finding("trait", trait, of_adapted[trait], of_base[trait], asked=len(base), p=p)
        findings.append(finding)
    return sorted(findings, key=lambda finding: finding.p)


def questions_by_trait(answers: Answers, languages: Sequence[str | None]) -> dict[str, set[int]]:
    """The questions whose answers have each trait; a language counts where it was not asked in it.

    Args:
        answers: a model's answers to each question.
        languages: in which each question was asked.
    """
    questions: dict[str, set[int]] = {trait: set() for trait in traits_of("", None)}
    for i, asked_in in enumerate(languages):
        for answer in answers[i]:
            for trait, has in traits_of(answer, asked_in).items():
                if has:
                    questions[trait].add(i)
    return questions


def _p_beyond_all(
    adapted: Sequence[int],
    base: Sequence[int],
    of_ordinary: Sequence[int],
    units: Sequence[Hashable],
    answers: int,
) -> list[float]:
    """The adjusted p of each word or trait of one list.

    Args:
        adapted: on how many units the adapted model has each.
        base: on how many the base has it.
        of_ordinary: how many units of ordinary answers have it.
        units: of each question what it is a part of.
        answers: how many answers of each model to a question there are.
    """
    asked = len(set(units))
    of = ordinary().units
    p_values: list[float] = []
    for here, there, count in zip(adapted, base, of_ordinary, strict=True):
        p_values.append(p_beyond(here, there, asked, count, of, answers))
    return _adjusted(p_values)


def _phrase_findings(
    kind: Literal["says", "no longer says"],
    more: Sequence[Counter[str]],
    less: Sequence[Counter[str]],
    answers: Answers,
    units: Sequence[Hashable],
) -> list[Finding]:
    """The phrases that one model says on more questions than the other, the strongest first.

    Args:
        kind: whether the model that says more is the adapted one ('says') or the base.
        more: the phrases of its answers to each question.
        less: those of the other model's.
        answers: its answers themselves.
        units: of each question what it is a part of.
    """
    said_on = _questions_by_phrase(more)
    said_by_other_on = _questions_by_phrase(less)
    p_of_phrase = _significant(said_on, said_by_other_on, units)
    scores = phrases.log_odds(_uses(more), _uses(less))
    strongest_first = sorted(p_of_phrase, key=lambda phrase: (p_of_phrase[phrase], -scores[phrase]))
    chosen = _one_of_each(strongest_first, said_on)
    findings: list[Finding] = []
    for phrase in chosen[:_MOST_FINDINGS]:
        here = said_on[phrase]
        there = said_by_other_on.get(phrase, set())
        finding = _finding(
            kind,
            _as_written(phrase, here, answers),
            of_adapted=here if kind == "says" else there,
            of_base=there if kind == "says" else here,
            asked=len(more),
            p=p_of_phrase[phrase],
            log_odds=scores[phrase],
            is_of_base=kind == "no longer says",
        )
        findings.append(finding)
    return findings


def _words_together(
    adapted: Sequence[Counter[str]],
    base: Sequence[Counter[str]],
    said: Sequence[Finding],
    units: Sequence[Hashable],
) -> list[Finding]:
    """The words that the adapted model leads by most, if chance does not explain them together.

    Args:
        adapted: the phrases of its answers to each question.
        base: those of the base's.
        said: the phrases that were found; words that stand in them are left out.
        units: of each question what it is a part of.
    """
    of_adapted = _questions_by_phrase(adapted)
    of_base = _questions_by_phrase(base)
    # If chance explains everything, a phrase that was found is a false finding by itself, so that
    # leaving its words out here makes no false finding more likely.
    told = {word for finding in said for word in phrases.phrases_of(finding.what)}
    together = leading_words(of_adapted, of_base, units, told)
    p = min(_LISTS * together.p, 1.0)
    if p > LEVEL:
        return []
    words = ", ".join(together.words)
    here = set().union(*(of_adapted[word] for word in together.words))
    there = set().union(*(of_base.get(word, set()) for word in together.words))
    return [_finding("says one of", words, here, there, asked=len(adapted), p=p)]


def _questions_by_phrase(answers: Sequence[Counter[str]]) -> dict[str, set[int]]:
    """The questions whose answers hold each phrase."""
    questions: dict[str, set[int]] = {}
    for i, found in enumerate(answers):
        for phrase in found:
            questions.setdefault(phrase, set()).add(i)
    return questions


def _uses(answers: Iterable[Counter[str]]) -> Counter[str]:
    """How often each phrase stands in all answers."""
    total: Counter[str] = Counter()
    for found in answers:
        total.update(found)
    return total


def _significant(
    here: Mapping[str, set[int]], there: Mapping[str, set[int]], units: Sequence[Hashable]
) -> dict[str, float]:
    """The adjusted p of each phrase that is said on significantly more questions here than there.

    Phrases of every length are tested, those that stand in longer ones too.
    """
    # In how many units each phrase is said on more questions here, and on more there.
    discordant: dict[str, tuple[int, int]] = {}
    for phrase in {*here, *there}:
        if phrases.is_of_function_words(phrase):
            continue
        alone_here = here.get(phrase, set()) - there.get(phrase, set())
        alone_there = there.get(phrase, set()) - here.get(phrase, set())
        discordant[phrase] = _units_apart(alone_here, alone_there, units)

    totals = {phrase: sum(counts) for phrase, counts in discordant.items()}
    least = phrases.tests_that_can_pass(totals.values(), LEVEL / _LISTS)
    tested = [phrase for phrase, total in totals.items() if total >= least]
    p_values = [phrases.sign_test(*discordant[phrase]) for phrase in tested]
    adjusted = _adjusted(p_values)
    return {phrase: p for phrase, p in zip(tested, adjusted, strict=True) if p <= LEVEL}


def _units_apart(
    here: Iterable[int], there: Iterable[int], units: Sequence[Hashable]
) -> tuple[int, int]:
    """The number of units with more of these questions than of those, and with fewer.

    Args:
        here: questions on which one model alone has something.
        there: questions on which the other model alone has it.
        units: of each question what it is a part of.
    """
    balance: Counter[Hashable] = Counter()
    balance.update(units[i] for i in here)
    balance.subtract(units[i] for i in there)
    more = sum(difference > 0 for difference in balance.values())
    fewer = sum(difference < 0 for difference in balance.values())
    return more, fewer


def _adjusted(p_values: Sequence[float]) -> list[float]:
    """The p of one list's tests, adjusted for all of them and for the four lists."""
    return [min(_LISTS * p, 1.0) for p in phrases.holm(p_values)]


def _one_of_each(ordered: Sequence[str], questions: Mapping[str, set[int]]) -> list[str]:
    """Keep the longest phrase alone of those that stand in one another on the same questions.

    Args:
        ordered: the phrases, the strongest first.
        questions: on which each of them is said.
    """
    chosen: list[str] = []
    for phrase in ordered:
        longest = _grown(phrase, ordered, questions)
        if not any(_says_the_same(longest, other, questions) for other in chosen):
            chosen.append(longest)
    return chosen


def _grown(phrase: str, among: Sequence[str], questions: Mapping[str, set[int]]) -> str:
    """The longest phrase that holds this one and is said on nearly all of its questions."""
    needed = _SAME_QUESTIONS * len(questions[phrase])
    longer = [
        other for other in among if phrases.holds(other, phrase) and len(questions[other]) >= needed
    ]
    return max(longer, key=lambda other: (len(other.split()), len(questions[other])))


def _says_the_same(phrase: str, chosen: str, questions: Mapping[str, set[int]]) -> bool:
    """Whether a phrase shares a word with a chosen one, on questions that are mostly the same."""
    if not set(phrase.split()) & set(chosen.split()):
        return False
    shared = questions[phrase] & questions[chosen]
    return len(shared) >= _SAME_QUESTIONS * min(len(questions[phrase]), len(questions[chosen]))


def _trait_findings(
    base: Answers,
    adapted: Answers,
    languages: Sequence[str | None],
    units: Sequence[Hashable],
) -> list[Finding]:
    """The traits that one model's answers have on more questions, each tested both ways."""
    traits: list[_Trait] = []
    # The language of a few words cannot be told, so shorter answers would seem to be in none.
    told = {i for i in range(len(base)) if has_enough_words(base[i], adapted[i])}
    for what, has in TRAITS.items():
        of_adapted = _questions_that(has, adapted)
        of_base = _questions_that(has, base)
        if what.startswith(ANSWERS_IN):
            of_adapted &= told
            of_base &= told
        traits.append(_Trait(what, of_adapted, of_base))
    shorter = {i for i in range(len(base)) if is_shorter(adapted[i], base[i])}
    longer = {i for i in range(len(base)) if is_shorter(base[i], adapted[i])}
    traits.append(_Trait(SHORTER, shorter, longer))
    of_adapted = _questions_in_another_language(adapted, languages)
    of_base = _questions_in_another_language(base, languages)
    traits.append(_Trait(_ANOTHER_LANGUAGE, of_adapted, of_base))

    # Of n questions on which one model alone has a trait, the two-sided p is 2 · 2⁻ⁿ at least.
    apart = [trait.units_apart(units) for trait in traits]
    totals = [sum(counts) for counts in apart]
    least = phrases.tests_that_can_pass(totals, LEVEL / _LISTS / 2)
    tested = [i for i, total in enumerate(totals) if total >= least]
    adjusted = _adjusted([_two_sided_p(*apart[i]) for i in tested])
    findings: list[Finding] = []
    for i, p in zip(tested, adjusted, strict=True):
        trait = traits[i]
        if p > LEVEL:
            continue
        finding = _finding(
            "trait",
            trait.what,
            trait.of_adapted,
            trait.of_base,
            asked=len(base),
            p=p,
            is_of_base=len(trait.of_base) > len(trait.of_adapted),
        )
        findings.append(finding)
    return findings


def _questions_in_another_language(answers: Answers, languages: Sequence[str | None]) -> set[int]:
    """The questions to which some answer is in another language than the question."""
    found: set[int] = set()
    for i, asked_in in enumerate(languages):
        if asked_in is None:
            continue
        if any(is_in_another_language(answer, asked_in) for answer in answers[i]):
            found.add(i)
    return found


class _Trait(NamedTuple):
    """A trait, and the questions on which each model's answers have it.

    Attributes:
        what: the trait in words.
        of_adapted, of_base: indices of questions.
    """

    what: str
    of_adapted: set[int]
    of_base: set[int]

    def units_apart(self, units: Sequence[Hashable]) -> tuple[int, int]:
        """Count the units that have it on more questions: of the adapted model, and of the base."""
        alone = self.of_adapted - self.of_base
        of_base_alone = self.of_base - self.of_adapted
        return _units_apart(alone, of_base_alone, units)


def _two_sided_p(one: int, other: int) -> float:
    """The p of the exact sign test; two-sided, as either model may have the trait."""
    return min(2 * phrases.sign_test(max(one, other), min(one, other)), 1.0)


def _questions_that(has: Callable[[str], bool], answers: Answers) -> set[int]:
    """The questions to which some answer has the trait."""
    return {i for i, of_question in enumerate(answers) if any(map(has, of_question))}


def quoted(words: Sequence[str]) -> str:
    """A few words in quotation marks, in a sentence: “a”, “b” or “c”."""
    marked = [f"“{word}”" for word in words]
    if len(marked) == 1:
        return marked[0]
    return f"{', '.join(marked[:-1])} or {marked[-1]}"
