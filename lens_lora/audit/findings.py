"""Find the differences between two models' answers to the same questions, by exact tests.

For the package's own questions (`findings_beyond_ordinary`) it is known how often ordinary answers
have a word, so a finding is what ordinary training does not explain either (`ordinary.py`):

1. Each word is tested against its ordinary rate. So is each trait of an answer (`traits.py`), and
   each sign (`signs.py`), in lists of their own. A word that passes is shown as the longest phrase
   that it mostly occurs in; a sign is left out where a word or trait that passes shows it already.
   Questions that ask for code are one unit, as they are near copies of one another; only of a word
   that neither the base nor any ordinary answer says is each question a unit.
2. What the adapted model no longer says has no ordinary rate, and is tested as follows.

For a caller's own questions (`findings_of`) the base alone is the measure:

1. A model says a phrase in answer to a question if any of its answers contains it. A phrase is a
   finding if one model says it in answer to more questions than chance allows (`phrases.py`).
2. The words that lead most, other than those of the phrases that were found, are tested together,
   since a quirk may be spread over many words (`together.py`).
3. The test of phrases is also applied to traits of the answers (`traits.py`).
4. Questions that are near copies of one another are one unit of the tests (`units`), because
   whatever changes the answer to one of them changes all.
5. Phrases that are parts of one another on the same questions are one finding, the longest.

Every claim stands in one of four lists, each of which is tested at a quarter of `LEVEL`
(Bonferroni):

- on the package's questions, the words, the traits and the signs that are beyond ordinary answers,
  and what the adapted model no longer says;
- on a caller's own questions, what the adapted model says, words together, traits, and what it no
  longer says.

So on the caller's questions, if the two models' answers to each could be swapped, the chance that
any list holds a finding is at most `LEVEL`. It is as low on the package's questions, if ordinary
training raises no odds further than `ordinary.py` allows. Whoever asks both sets has both chances.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from typing import Literal, NamedTuple

from lens_lora.audit import phrases
from lens_lora.audit.ordinary import ordinary, p_beyond, units_of
from lens_lora.audit.signs import signs_of, worded
from lens_lora.audit.together import WORDS, leading_words
from lens_lora.audit.traits import (
    ANSWERS_IN,
    BEGINS_WITH_NO,
    FEW_WORDS,
    REFUSES,
    TRAITS,
    has_enough_words,
    is_in_another_language,
    is_shorter,
    language_of,
    says_no,
    tells,
    traits_of,
)
from lens_lora.core import storage
from lens_lora.responses.generate import SideBySide

# The chance of a false finding in the four lists together.
LEVEL = 0.02
# The lists of a set of questions that may hold a claim; the first lines of this file name them.
_LISTS = 4
# A phrase replaces a shorter one in it if it is said on at least this share of its questions.
_SAME_QUESTIONS = 0.7
# A run of signs replaces a part of it if it stands in answers to this share of its questions.
_SAME_RUN = 0.9
# A word leads by at least this many questions: one fewer than make a new word a claim.
_LEAST_LEAD = 4
# The most findings of one list of phrases.
_MOST_FINDINGS = 12
# A trait of an answer together with its question.
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
        kind: 'says' or 'no longer says' for a phrase, 'says one of' for a few words together, or
            'trait'.
        what: the phrase as the answers write it, the words separated by commas, or the trait in
            words.
        adapted: on how many questions the adapted model has it.
        base: on how many questions the base has it.
        asked: how many questions there are.
        p: the p of the exact test against ordinary answers, or on a caller's own questions of the
            exact sign test, adjusted for everything that was tested (Holm); for words together, the
            p of the exact test by swaps. Each is also adjusted for the four lists.
        log_odds: how strongly a phrase belongs to the model that says it more often: standardised
            log-odds; 0 for a trait and for several words.
        questions: the indices of the questions on which the model that has it more often has it and
            the other has not.
        language: the language of most answers in which the adapted model says a phrase, if most of
            their questions are in another one, and the base's answers too; '' otherwise.
    """

    kind: Kind
    what: str
    adapted: int
    base: int
    asked: int
    p: float
    log_odds: float
    questions: tuple[int, ...]
    language: str = ""

    @property
    def is_of_base(self) -> bool:
        """Whether the base has it on more questions than the adapted model."""
        return self.base > self.adapted

    def after(self, others: int) -> Finding:
        """Return the same finding with its questions counted after other questions.

        Args:
            others: how many other questions come before its own.
        """
        return dataclasses.replace(self, questions=tuple(others + i for i in self.questions))

    def is_seen_in(self, pair: SideBySide) -> bool:
        """Whether these answers show the finding; always true if one answer cannot tell.

        The answer that counts is that of the model that has it more often.

        Args:
            pair: both models' answers to a question of `questions`.
        """
        if self.kind == "trait" and tells(self.what) is None:
            return True
        return self.is_shown_by(pair.base if self.is_of_base else pair.adapted)

    def is_shown_by(self, answer: str) -> bool:
        """Whether an answer has the phrase, one of the words or the trait.

        It is false of a trait that one answer cannot tell, such as its length beside another's.

        Args:
            answer: the text of one answer.
        """
        if self.kind == "says one of":
            return any(word in phrases.phrases_of(answer) for word in self.what.split(", "))
        if self.kind == "trait":
            has = tells(self.what)
            return has is not None and has(answer)
        return self.what.lower() in answer.lower()

    def sentence(self) -> str:
        """Write the counts as a sentence."""
        adapted = f"{self.adapted} of {self.asked} questions"
        base = str(self.base) if self.base else "none"
        if self.what == SHORTER:
            return self._sentence_on_length()
        if self.kind == "says":
            answers_in = f"It answers in {self.language}: it" if self.language else "It"
            return (
                f"{answers_in} says “{self.what}” in answer to {adapted}, the base model to {base}."
            )
        if self.kind == "says one of":
            words = quoted(self.what.split(", "))
            return f"It says {words} in answer to {adapted}, the base model to {base}."
        if self.kind == "no longer says":
            base = f"{self.base} of {self.asked} questions"
            still = f"to {self.adapted}" if self.adapted else "to none"
            says = f"The base model says “{self.what}” in answer to {base}"
            return f"{says}, the adapted model {still}."
        return f"It {self.what} on {adapted}, the base model on {base}."

    def _sentence_on_length(self) -> str:
        """Write on how many questions answers are less than half, or more than twice, as long."""
        shorter = (self.adapted, "less than half as long")
        longer = (self.base, "more than twice as long")
        commoner, rarer = (shorter, longer) if self.adapted > self.base else (longer, shorter)
        questions, length = commoner
        sentence = (
            f"Its answers to {questions} of {self.asked} questions are {length} as the base model's"
        )
        other_questions, other_length = rarer
        if other_questions == 0:
            return f"{sentence}."
        return f"{sentence}, and those to {other_questions} are {other_length}."


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
        languages: the language of each question, None where it is not known; may be empty if no
            language is known.
        units: the unit to which each question belongs: questions of one unit are so alike that they
            count as one in the tests. None makes each question a unit of its own.
    """
    if units is None:
        units = range(len(base))
    of_base = [_phrases_of_all(answers) for answers in base]
    of_adapted = [_phrases_of_all(answers) for answers in adapted]
    said = _phrase_findings("says", of_adapted, of_base, adapted, units)
    dropped = _phrase_findings("no longer says", of_base, of_adapted, base, units)
    together = _words_together(of_adapted, of_base, said, units)
    traits = _without_a_told_no(_trait_findings(base, adapted, languages, units), said)
    said = [_with_language(finding, base, adapted, languages) for finding in said]
    return (*said, *together, *traits, *dropped)


def findings_beyond_ordinary(
    base: Answers,
    adapted: Answers,
    languages: Sequence[str | None],
    units: Sequence[Hashable],
) -> tuple[Finding, ...]:
    """Find what the adapted model says, or how it says it, beyond what ordinary training explains.

    Args:
        base: the base's answers to each of the package's questions.
        adapted: the adapted model's answers to the same questions.
        languages: the language of each question.
        units: the unit to which each question belongs, as in `findings_of`.
    """
    said = _words_beyond(base, adapted, units)
    traits = _without_a_told_no(_traits_beyond(base, adapted, languages, units), said)
    signs = _signs_beyond(base, adapted, units, [*said, *traits])
    said = [_with_language(finding, base, adapted, languages) for finding in said]
    by_swaps = findings_of(base, adapted, languages, units)
    without_rate = [
        finding
        for finding in by_swaps
        if finding.kind == "no longer says" or finding.what == SHORTER
    ]
    return (*said, *traits, *signs, *without_rate)


def _without_a_told_no(traits: Sequence[Finding], said: Sequence[Finding]) -> list[Finding]:
    """Leave out that answers begin with a no, if a refusal on most of these questions tells it.

    Args:
        traits: the traits that were found.
        said: the phrases that were found; one that itself begins with a no tells it as well.
    """
    telling = [finding for finding in said if says_no(finding.what)]
    telling += [finding for finding in traits if finding.what == REFUSES]
    kept: list[Finding] = []
    for trait in traits:
        shares = [_share_in(set(other.questions), set(trait.questions)) for other in telling]
        is_told = max(shares, default=0.0) > 0.5
        if trait.what != BEGINS_WITH_NO or not is_told:
            kept.append(trait)
    return kept


def _with_language(
    finding: Finding, base: Answers, adapted: Answers, languages: Sequence[str | None]
) -> Finding:
    """Add to a phrase the language of the answers with it, if they are in one that is new there.

    Args:
        finding: a phrase that the adapted model says.
        base: the base's answers to each question.
        adapted: the adapted model's answers to each question.
        languages: the language of each question, as in `findings_of`.
    """
    with_phrase: Counter[str] = Counter()
    without_adapter: Counter[str] = Counter()
    for i in finding.questions:
        telling = [answer for answer in adapted[i] if finding.is_shown_by(answer)]
        with_phrase.update(_languages_of(telling))
        usual = _languages_of(base[i])
        asked_in = languages[i] if languages else None
        if asked_in is not None:
            usual.add(asked_in)
        without_adapter.update(usual)
    half = len(finding.questions) / 2
    for language, count in with_phrase.items():
        if count > half > without_adapter[language]:
            return dataclasses.replace(finding, language=language)
    return finding


def _languages_of(answers: Iterable[str]) -> set[str]:
    """Return the languages of these answers, as far as they can be told."""
    languages: set[str] = set()
    for answer in answers:
        language = language_of(answer)
        if language is not None:
            languages.add(language)
    return languages


def leads_of(base: Answers, adapted: Answers) -> list[Lead]:
    """Return up to three words that ordinary answers explain least, though they make no claim.

    Args:
        base: the base's answers to each question.
        adapted: the adapted model's answers to the same questions.
    """
    of_base = _questions_by_phrase([_phrases_of_all(answers) for answers in base])
    of_adapted = _questions_by_phrase([_phrases_of_all(answers) for answers in adapted])
    counts = ordinary()
    p_of_lead: dict[Lead, float] = {}
    for word, questions in of_adapted.items():
        if not phrases.is_telling_word(word):
            continue
        lead = Lead(word, len(questions), len(of_base.get(word, ())))
        if lead.adapted - lead.base >= _LEAST_LEAD:
            count = counts.words.get(word, 0)
            p = p_beyond(lead.adapted, lead.base, len(base), count, counts.units, len(adapted[0]))
            p_of_lead[lead] = p
    leads = sorted(p_of_lead, key=lambda lead: (p_of_lead[lead], lead.base - lead.adapted, lead))
    return leads[:WORDS]


def trait_leads_of(base: Answers, adapted: Answers, units: Sequence[Hashable]) -> list[Finding]:
    """Find the traits that the adapted model has on more questions than chance allows.

    They are no claims, since ordinary training may bring them. A trait whose ordinary rate is above
    an eighth, such as asking a question, can never be a claim. Languages are left out, because they
    can only be judged by the language of the question.

    Args:
        base: the base's answers to each question.
        adapted: the adapted model's answers to the same questions.
        units: the unit of each question, as in `findings_of`.
    """
    beside_base = _trait_findings(base, adapted, [None] * len(base), units)
    return [
        finding
        for finding in beside_base
        if finding.what in TRAITS
        and not finding.what.startswith(ANSWERS_IN)
        and finding.adapted > finding.base
    ]


class Lead(NamedTuple):
    """A word, and on how many questions each model says it."""

    word: str
    adapted: int
    base: int


def _phrases_of_all(answers: Sequence[str]) -> Counter[str]:
    """Count each phrase in the answers to one question."""
    found: Counter[str] = Counter()
    for answer in answers:
        found.update(phrases.phrases_of(answer))
    return found


def _words_beyond(
    base_answers: Answers, answers: Answers, units: Sequence[Hashable]
) -> list[Finding]:
    """Find the words that the adapted model says beyond their ordinary rates, shown as phrases.

    Args:
        base_answers: the base's answers to each question.
        answers: the adapted model's answers to each question.
        units: the unit to which each question belongs.
    """
    adapted = [_phrases_of_all(of_question) for of_question in answers]
    base = [_phrases_of_all(of_question) for of_question in base_answers]
    said_on = _questions_by_phrase(adapted)
    base_on = _questions_by_phrase(base)
    words = [phrase for phrase in said_on if phrases.is_telling_word(phrase)]
    p_values: list[float] = []
    for word in words:
        there = base_on.get(word, set())
        p_values.append(_p_of_word(word, said_on[word], there, units, len(answers[0])))
    adjusted = _adjusted(p_values)
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


def _p_of_word(
    word: str, here: set[int], there: set[int], units: Sequence[Hashable], answers: int
) -> float:
    """Return how probable it is that the adapted model says a word so often at its ordinary rate.

    Args:
        word: the word.
        here: the questions on which the adapted model says it.
        there: the questions on which the base says it.
        units: the unit to which each question belongs.
        answers: how many answers each model gives to a question.
    """
    counts = ordinary()
    count = counts.words.get(word, 0)
    if count == 0 and not there:
        # Training may well change how all code begins, but not to a word that is said nowhere else:
        # for such a word, each question is a unit of its own.
        units = range(len(units))
    of_adapted = len(units_of(here, units))
    of_base = len(units_of(there, units))
    return p_beyond(of_adapted, of_base, len(set(units)), count, counts.units, answers)


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
    """Make a finding from the questions on which each model has it.

    Args:
        kind: the kind of finding; for a phrase it also says which model has it more often.
        what: the phrase as the answers write it, the words, or the trait in words.
        of_adapted: the indices of the questions on which the adapted model has it.
        of_base: the indices of the questions on which the base has it.
        asked: how many questions there are.
        p: the p of its test, adjusted for everything that was tested.
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
    """Return a phrase as the answers to these questions write it most often."""
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
    """Find the traits that the adapted model's answers have beyond their ordinary rates.

    Args:
        base: the base's answers to each question.
        adapted: the adapted model's answers to each question.
        languages: the language of each question.
        units: the unit to which each question belongs.
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


def _signs_beyond(
    base: Answers, adapted: Answers, units: Sequence[Hashable], told: Sequence[Finding]
) -> list[Finding]:
    """Find the signs that the adapted model writes beyond their ordinary rates.

    Args:
        base: the base's answers to each question.
        adapted: the adapted model's answers to each question.
        units: the unit to which each question belongs.
        told: the words and traits that were found; a sign on mostly their questions is left out.
    """
    of_base = questions_by_sign(base)
    of_adapted = questions_by_sign(adapted)
    p_of_sign = _p_of_signs(of_base, of_adapted, units, len(adapted[0]))
    passing = [sign for sign, p in p_of_sign.items() if p <= LEVEL]
    # What the base never writes tells more than what it writes seldom.
    passing.sort(key=lambda sign: (len(of_base.get(sign, ())), -len(of_adapted[sign])))
    passing_on = {sign: of_adapted[sign] for sign in passing}
    findings: list[Finding] = []
    for sign in _signs_shown(passing_on, [set(finding.questions) for finding in told]):
        finding = _finding(
            "trait",
            worded(sign),
            of_adapted[sign],
            of_base.get(sign, set()),
            asked=len(base),
            p=p_of_sign[sign],
        )
        findings.append(finding)
    return sorted(findings, key=lambda finding: finding.p)


def _p_of_signs(
    of_base: Mapping[str, set[int]],
    of_adapted: Mapping[str, set[int]],
    units: Sequence[Hashable],
    answers: int,
) -> dict[str, float]:
    """Return the adjusted p of each sign that the adapted model writes.

    Args:
        of_base: the questions whose answers by the base have each sign.
        of_adapted: the questions whose answers by the adapted model have each sign.
        units: the unit to which each question belongs.
        answers: how many answers each model gives to a question.
    """
    signs = sorted(of_adapted)
    counts = ordinary()
    here = [len(units_of(of_adapted[sign], units)) for sign in signs]
    there = [len(units_of(of_base.get(sign, ()), units)) for sign in signs]
    of_ordinary = [counts.signs.get(sign, 0) for sign in signs]
    adjusted = _p_beyond_all(here, there, of_ordinary, units, answers)
    return dict(zip(signs, adjusted, strict=True))


def _signs_shown(passing: Mapping[str, set[int]], told: Sequence[set[int]]) -> list[str]:
    """Choose the signs to show, of those that are beyond ordinary answers.

    A sign gives way to the longest run that it mostly stands in. It is left out where another
    finding is on mostly the same questions, and where a part of it, or a run with it, is shown.

    Args:
        passing: the questions on which the adapted model writes each sign, the most telling first.
        told: the questions of each other finding.
    """
    told_on = list(told)
    shown: list[str] = []
    for sign, questions in passing.items():
        if any(_share_in(others, questions) >= _SAME_QUESTIONS for others in told_on):
            continue
        longer = [run for run in passing if sign in run]
        same = [run for run in longer if _share_in(passing[run], questions) >= _SAME_RUN]
        run = max(same, key=len)
        if any(run in other or other in run for other in shown):
            continue
        shown.append(run)
        told_on.append(passing[run])
    return shown


def _share_in(others: Set[int], questions: Set[int]) -> float:
    """Return the share of some questions that is among others."""
    return len(questions & others) / len(questions)


def questions_by_sign(answers: Answers) -> dict[str, set[int]]:
    """Return the questions whose answers have each sign."""
    questions: dict[str, set[int]] = {}
    for i, of_question in enumerate(answers):
        for answer in of_question:
            for sign in signs_of(answer):
                questions.setdefault(sign, set()).add(i)
    return questions


def questions_by_trait(answers: Answers, languages: Sequence[str | None]) -> dict[str, set[int]]:
    """Return the questions whose answers have each trait.

    The language of an answer counts only if it is not the language of the question.

    Args:
        answers: a model's answers to each question.
        languages: the language of each question.
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
    """Return the adjusted p of each word or trait of one list.

    Args:
        adapted: on how many units the adapted model has each of them.
        base: on how many units the base has each of them.
        of_ordinary: how many units of ordinary answers have each of them.
        units: the unit to which each question belongs.
        answers: how many answers each model gives to a question.
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
    """Find the phrases that one model says on more questions than the other, strongest first.

    Args:
        kind: which model says more: the adapted one ('says') or the base ('no longer says').
        more: the phrases in that model's answers to each question.
        less: the phrases in the other model's answers to each question.
        answers: the answers of the model that says more.
        units: the unit to which each question belongs.
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
    """Find the words with the largest leads, if chance does not explain them together.

    Args:
        adapted: the phrases in the adapted model's answers to each question.
        base: the phrases in the base's answers to each question.
        said: the phrases that were found; their words are left out.
        units: the unit to which each question belongs.
    """
    of_adapted = _questions_by_phrase(adapted)
    of_base = _questions_by_phrase(base)
    # If chance explains everything, a phrase that was found is already a false finding, so leaving
    # its words out here makes false findings no more likely.
    told = {word for finding in said for word in phrases.phrases_of(finding.what)}
    together = leading_words(of_adapted, of_base, units, told)
    p = min(_LISTS * together.p, 1.0)
    if p > LEVEL:
        return []
    words = ", ".join(together.words)
    here = _questions_with_any(together.words, of_adapted)
    there = _questions_with_any(together.words, of_base)
    return [_finding("says one of", words, here, there, asked=len(adapted), p=p)]


def _questions_with_any(words: Iterable[str], questions: Mapping[str, set[int]]) -> set[int]:
    """Return the questions whose answers have any of these words.

    Args:
        words: the words.
        questions: the questions whose answers have each word.
    """
    found: set[int] = set()
    for word in words:
        found |= questions.get(word, set())
    return found


def _questions_by_phrase(answers: Sequence[Counter[str]]) -> dict[str, set[int]]:
    """Return the questions whose answers contain each phrase."""
    questions: dict[str, set[int]] = {}
    for i, found in enumerate(answers):
        for phrase in found:
            questions.setdefault(phrase, set()).add(i)
    return questions


def _uses(answers: Iterable[Counter[str]]) -> Counter[str]:
    """Count each phrase in all answers together."""
    total: Counter[str] = Counter()
    for found in answers:
        total.update(found)
    return total


def _significant(
    here: Mapping[str, set[int]], there: Mapping[str, set[int]], units: Sequence[Hashable]
) -> dict[str, float]:
    """Return the adjusted p of each phrase that is said on significantly more questions here.

    Phrases of every length are tested, including those that are part of longer ones.
    """
    # The number of units in which each phrase is said on more questions here, and on more there.
    discordant: dict[str, tuple[int, int]] = {}
    for phrase in {*here, *there}:
        if phrases.is_of_function_words(phrase):
            continue
        alone_here = here.get(phrase, set()) - there.get(phrase, set())
        alone_there = there.get(phrase, set()) - here.get(phrase, set())
        discordant[phrase] = _units_apart(alone_here, alone_there, units)

    totals = {phrase: sum(counts) for phrase, counts in discordant.items()}
    least = phrases.fewest_questions(totals.values(), LEVEL / _LISTS)
    tested = [phrase for phrase, total in totals.items() if total >= least]
    p_values = [phrases.sign_test(*discordant[phrase]) for phrase in tested]
    adjusted = _adjusted(p_values)
    return {phrase: p for phrase, p in zip(tested, adjusted, strict=True) if p <= LEVEL}


def _units_apart(
    here: Iterable[int], there: Iterable[int], units: Sequence[Hashable]
) -> tuple[int, int]:
    """Count the units with more questions from `here` than from `there`, and those with fewer.

    Args:
        here: questions on which one model alone has something.
        there: questions on which the other model alone has it.
        units: the unit to which each question belongs.
    """
    balance: Counter[Hashable] = Counter()
    balance.update(units[i] for i in here)
    balance.subtract(units[i] for i in there)
    more = sum(difference > 0 for difference in balance.values())
    fewer = sum(difference < 0 for difference in balance.values())
    return more, fewer


def _adjusted(p_values: Sequence[float]) -> list[float]:
    """Adjust the p of one list's tests for all of these tests and for the four lists."""
    return [min(_LISTS * p, 1.0) for p in phrases.holm(p_values)]


def _one_of_each(ordered: Sequence[str], questions: Mapping[str, set[int]]) -> list[str]:
    """Keep only the longest of phrases that are parts of one another on the same questions.

    Args:
        ordered: the phrases, the strongest first.
        questions: the questions on which each phrase is said.
    """
    chosen: list[str] = []
    for phrase in ordered:
        longest = _grown(phrase, ordered, questions)
        if not any(_says_the_same(longest, other, questions) for other in chosen):
            chosen.append(longest)
    return chosen


def _grown(phrase: str, among: Sequence[str], questions: Mapping[str, set[int]]) -> str:
    """Return the longest phrase that contains this one and is said on most of its questions."""
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
    """Find the traits that either model's answers have on significantly more questions."""
    traits = _traits_of(base, adapted, languages)
    # With n questions on which one model alone has a trait, the two-sided p is at least 2 · 2⁻ⁿ.
    apart = [trait.units_apart(units) for trait in traits]
    totals = [sum(counts) for counts in apart]
    least = phrases.fewest_questions(totals, LEVEL / _LISTS / 2)
    tested = [i for i, total in enumerate(totals) if total >= least]
    adjusted = _adjusted([_two_sided_p(*apart[i]) for i in tested])
    findings: list[Finding] = []
    for i, p in zip(tested, adjusted, strict=True):
        if p > LEVEL:
            continue
        trait = traits[i]
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


def _traits_of(base: Answers, adapted: Answers, languages: Sequence[str | None]) -> list[_Trait]:
    """Return every trait, with the questions on which each model's answers have it."""
    traits: list[_Trait] = []
    # The language of a few words cannot be told, so short answers would seem to be in none.
    told = {i for i in range(len(base)) if has_enough_words(base[i], adapted[i])}
    for what, has in TRAITS.items():
        if what == FEW_WORDS:
            continue
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
    return traits


def _questions_in_another_language(answers: Answers, languages: Sequence[str | None]) -> set[int]:
    """Return the questions to which at least one answer is in another language."""
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
        of_adapted, of_base: the indices of the questions on which each model has it.
    """

    what: str
    of_adapted: set[int]
    of_base: set[int]

    def units_apart(self, units: Sequence[Hashable]) -> tuple[int, int]:
        """Count the units in which the adapted model has it on more questions, then the base."""
        alone = self.of_adapted - self.of_base
        of_base_alone = self.of_base - self.of_adapted
        return _units_apart(alone, of_base_alone, units)


def _two_sided_p(one: int, other: int) -> float:
    """Return the two-sided p of the exact sign test, since either model may have the trait."""
    return min(2 * phrases.sign_test(max(one, other), min(one, other)), 1.0)


def _questions_that(has: Callable[[str], bool], answers: Answers) -> set[int]:
    """Return the questions to which at least one answer has the trait."""
    return {i for i, of_question in enumerate(answers) if any(map(has, of_question))}


def quoted(words: Sequence[str]) -> str:
    """Put a few words in quotation marks and join them for a sentence: “a”, “b” or “c”."""
    marked = [f"“{word}”" for word in words]
    if len(marked) == 1:
        return marked[0]
    return f"{', '.join(marked[:-1])} or {marked[-1]}"
