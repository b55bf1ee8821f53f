"""What sets two models' answers to the same questions apart, by exact tests over questions.

1. A model says a phrase in answer to a question if any of its answers holds it. A phrase is a
   finding if one model says it in answer to more questions than chance allows (`phrases.py`).
2. The same test finds traits of the answers that are no phrase (`traits.py`).
3. Phrases that stand in one another on the same questions are one finding, the longest of them.

There are three lists: what the adapted model says, what it no longer says, and traits. Where either
model might as well have given either answer to each question, the chance that a list holds anything
is at most `LEVEL`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from lens_lora.audit import phrases
from lens_lora.audit.traits import TRAITS, is_shorter
from lens_lora.core import stored
from lens_lora.responses.generate import SideBySide

# The chance of a false finding in each list.
LEVEL = 0.01
# A phrase that is said on nearly all of the questions on which a shorter one is stands for it.
_SAME_QUESTIONS = 0.7
_MOST_FINDINGS = 12
# A trait of both answers to a question together.
SHORTER = "says less than half as much as the other model"

Kind = Literal["says", "no longer says", "trait"]
# By question, a model's answers to it.
Answers = Sequence[Sequence[str]]


@stored
@dataclasses.dataclass(frozen=True)
class Finding:
    """A phrase or trait of the answers that one model has on more questions than the other.

    Attributes:
        kind: 'says' and 'no longer says' of a phrase, or 'trait'.
        what: the phrase as the answers write it, or the trait in words.
        adapted: on how many questions the adapted model has it.
        base: on how many the base has it.
        asked: how many questions there are.
        p: of the exact sign test over questions, adjusted for all that were tested (Holm).
        log_odds: how strongly a phrase belongs to the model that says it more often: standardised
            log-odds; 0 for a trait.
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

    def is_seen_in(self, pair: SideBySide) -> bool:
        """Whether the answer of the model that has it more often shows it; of a trait, always.

        Args:
            pair: both models' answers to a question of `questions`.
        """
        if self.kind == "trait":
            return True
        return spells(pair.adapted if self.kind == "says" else pair.base, self.what)

    def sentence(self) -> str:
        """The counts in words."""
        adapted = f"{self.adapted} of {self.asked} questions"
        base = str(self.base) if self.base else "none"
        if self.kind == "says":
            return f"It says “{self.what}” in answer to {adapted}, the base model to {base}."
        if self.kind == "no longer says":
            base = f"{self.base} of {self.asked} questions"
            still = f"to {self.adapted}" if self.adapted else "to none"
            return f"The base model says “{self.what}” in answer to {base}, it {still}."
        return f"It {self.what} on {adapted}, the base model on {base}."


def findings_of(base: Answers, adapted: Answers) -> tuple[Finding, ...]:
    """What one model says, or how it says it, on more questions than chance allows.

    Args:
        base: the base's answers to each question.
        adapted: the adapted model's answers to the same questions.
    """
    of_base = [_phrases_of_all(answers) for answers in base]
    of_adapted = [_phrases_of_all(answers) for answers in adapted]
    said = _phrase_findings("says", of_adapted, of_base, adapted)
    dropped = _phrase_findings("no longer says", of_base, of_adapted, base)
    return (*said, *dropped, *_trait_findings(base, adapted))


def _phrases_of_all(answers: Sequence[str]) -> Counter[str]:
    """How often each phrase stands in the answers to one question."""
    found: Counter[str] = Counter()
    for answer in answers:
        found.update(phrases.phrases_of(answer))
    return found


def _phrase_findings(
    kind: Literal["says", "no longer says"],
    more: Sequence[Counter[str]],
    less: Sequence[Counter[str]],
    answers: Answers,
) -> list[Finding]:
    """The phrases of the answers of `more` that those of `less` do not hold."""
    questions_with = _questions_by_phrase(more)
    questions_without = _questions_by_phrase(less)
    significant = _significant(questions_with, questions_without)
    scores = phrases.log_odds(_uses(more), _uses(less))
    ordered = sorted(significant, key=lambda phrase: (significant[phrase], -scores[phrase]))
    chosen = _one_of_each(ordered, questions_with)
    findings: list[Finding] = []
    for phrase in chosen[:_MOST_FINDINGS]:
        here = questions_with[phrase]
        there = questions_without.get(phrase, set())
        of_adapted, of_base = (here, there) if kind == "says" else (there, here)
        texts = [answer for i in here for answer in answers[i]]
        finding = Finding(
            kind=kind,
            what=phrases.spelled_in(phrase, texts),
            adapted=len(of_adapted),
            base=len(of_base),
            asked=len(more),
            p=significant[phrase],
            log_odds=scores[phrase],
            questions=tuple(sorted(here - there)),
        )
        findings.append(finding)
    return findings


def _questions_by_phrase(answers: Sequence[Counter[str]]) -> dict[str, set[int]]:
    """By phrase, the questions whose answers hold it."""
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


def _significant(here: Mapping[str, set[int]], there: Mapping[str, set[int]]) -> dict[str, float]:
    """Adjusted p of the phrases that are said on more questions here, where it is below LEVEL.

    A phrase of each length is a test, also one that another phrase implies.
    """
    one_sided: dict[str, tuple[int, int]] = {}
    for phrase in {*here, *there}:
        if phrases.is_of_function_words(phrase):
            continue
        alone_here = here.get(phrase, set()) - there.get(phrase, set())
        alone_there = there.get(phrase, set()) - here.get(phrase, set())
        one_sided[phrase] = (len(alone_here), len(alone_there))
    least = phrases.tests_that_can_pass((n + m for n, m in one_sided.values()), LEVEL)
    tested = [phrase for phrase, (n, m) in one_sided.items() if n + m >= least]
    adjusted = phrases.holm([phrases.sign_test(*one_sided[phrase]) for phrase in tested])
    return {phrase: p for phrase, p in zip(tested, adjusted, strict=True) if p <= LEVEL}


def _one_of_each(ordered: Sequence[str], questions: Mapping[str, set[int]]) -> list[str]:
    """Of phrases that stand in one another on the same questions, the longest alone.

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


def _trait_findings(base: Answers, adapted: Answers) -> list[Finding]:
    """The traits that one model's answers have on more questions, each tested both ways."""
    found: list[tuple[str, set[int], set[int]]] = []
    for what, has in TRAITS.items():
        found.append((what, _questions_that(has, adapted), _questions_that(has, base)))
    shorter = {i for i in range(len(base)) if is_shorter(adapted[i], base[i])}
    longer = {i for i in range(len(base)) if is_shorter(base[i], adapted[i])}
    found.append((SHORTER, shorter, longer))
    tests: list[tuple[str, set[int], set[int], float]] = []
    for what, of_adapted, of_base in found:
        only_adapted = len(of_adapted - of_base)
        only_base = len(of_base - of_adapted)
        larger = max(only_adapted, only_base)
        # Two-sided: either model may have the trait.
        p = min(2 * phrases.sign_test(larger, min(only_adapted, only_base)), 1.0)
        tests.append((what, of_adapted, of_base, p))
    adjusted = phrases.holm([p for *_, p in tests])
    findings: list[Finding] = []
    for (what, of_adapted, of_base, _), p in zip(tests, adjusted, strict=True):
        if p > LEVEL:
            continue
        is_of_adapted = len(of_adapted) > len(of_base)
        alone_there = of_adapted - of_base if is_of_adapted else of_base - of_adapted
        finding = Finding(
            kind="trait",
            what=what,
            adapted=len(of_adapted),
            base=len(of_base),
            asked=len(base),
            p=p,
            log_odds=0.0,
            questions=tuple(sorted(alone_there)),
        )
        findings.append(finding)
    return findings


def _questions_that(has: Callable[[str], bool], answers: Answers) -> set[int]:
    """The questions to which an answer has the trait."""
    return {i for i, both in enumerate(answers) if any(map(has, both))}


def spells(answer: str, what: str) -> bool:
    """Whether an answer has these words, in whatever case."""
    return what.lower() in answer.lower()
