"""What the adapted model says and the base does not, counted over questions that both answer.

1. Both models answer the same questions (`everyday.py`, and the caller's own): greedily, and as
   often as asked drawn at temperature 1, with the same noise for both.
2. A model says a phrase in answer to a question if any of its answers holds it. `phrases.py` finds
   those that one model says in answer to more questions than chance allows. The base is the
   control, so no null adapter is needed, and the unit is a question.
3. The same test finds traits of the answers that are no phrase: the language, a refusal, code, a
   question, answers that repeat themselves, or that are less than half as long.
4. Phrases that stand in one another on the same questions are one finding, the longest of them.
5. Words that may trigger a behaviour are put before questions, if asked for (`triggers.py`).

There are three lists: what it says, what it no longer says, and its traits. Where either model
might as well have given either answer to each question, the chance that a list holds anything is at
most `LEVEL`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, cast, final

import pandas as pd

from lens_lora.arguments import whole
from lens_lora.audit import phrases
from lens_lora.audit import triggers as trigger_words
from lens_lora.audit.everyday import EVERYDAY, FORM_NAMES, SYSTEM_MESSAGE, Everyday, Form
from lens_lora.audit.traits import TRAITS, is_shorter
from lens_lora.audit.triggers import Trigger
from lens_lora.core import Described, LoraLens, Paged, Prompts, alone, stored
from lens_lora.errors import ArgumentError, PromptError, many
from lens_lora.responses.both_answer import both_answer
from lens_lora.responses.generate import SideBySide

# The chance of a false finding in each list.
LEVEL = 0.01
# Tokens of an answer.
_ANSWER = 24
# A phrase that is said on nearly all of the questions on which a shorter one is stands for it.
_SAME_QUESTIONS = 0.7
_MOST_FINDINGS = 12
# A trait of both answers to a question together.
SHORTER = "says less than half as much as the other model"

Kind = Literal["says", "no longer says", "trait"]
# By question, a model's answers to it.
_Answers = Sequence[Sequence[str]]
# The messages of a conversation.
Conversation = Sequence[Mapping[str, str]]


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
        return _spells(pair.adapted if self.kind == "says" else pair.base, self.what)

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


@final
class CountedSpeech(Described, Paged):
    """Both models' answers to the same questions, and what sets them apart.

    Attributes:
        topics, forms, questions: of each question; a form is 'plain', 'chat', 'system', 'code',
            'language', or 'own' for a question of the caller's.
        base, adapted: [question, draw], the two models' answers: greedy, then drawn.
        findings: what the adapted model says, what it no longer says, and traits of its answers,
            each list with the strongest first.
        words: those that were put before questions, as they may trigger a behaviour.
        triggers: what the adapted model says with one of them alone.
        meta: see `Described`.
    """

    topics: Annotated[tuple[str, ...], "question"]
    forms: Annotated[tuple[str, ...], "question"]
    questions: Annotated[tuple[str, ...], "question"]
    base: Annotated[tuple[tuple[str, ...], ...], "question draw"]
    adapted: Annotated[tuple[tuple[str, ...], ...], "question draw"]
    findings: tuple[Finding, ...]
    words: tuple[str, ...] = ()
    triggers: tuple[Trigger, ...] = ()

    def said(self, k: int = 5) -> tuple[Finding, ...]:
        """The k phrases that the adapted model says and the base does not, the strongest first.

        Args:
            k: how many.
        """
        of_phrases = [finding for finding in self.findings if finding.kind == "says"]
        return tuple(of_phrases[: whole("k", k, 0)])

    def when(self, finding: Finding) -> str:
        """On which topics and in which forms the adapted model alone has it, in words.

        Args:
            finding: one of `findings`.
        """
        asked = Counter(self.topics)
        topics = Counter(self.topics[i] for i in finding.questions)
        forms = Counter(self.forms[i] for i in finding.questions)
        by_form = ", ".join(
            f"{FORM_NAMES[form]} {forms[form]} of {number}"
            for form, number in Counter(self.forms).items()
        )
        if len(topics) == len(asked):
            about = "on every topic"
        elif len(topics) <= max(len(asked) // 4, 1):
            about = f"on questions about {' and '.join(topics)} only"
        else:
            about = f"on {len(topics)} of {len(asked)} topics"
        return f"{about} ({by_form})"

    def by(self, finding: Finding) -> pd.DataFrame:
        """A finding counted by topic and form: asked, adapted alone.

        Args:
            finding: one of `findings`.
        """
        frame = pd.DataFrame({"topic": self.topics, "form": self.forms, "asked": 1, "alone": 0})
        frame.loc[list(finding.questions), "alone"] = 1
        counted = frame.groupby(["topic", "form"]).agg({"asked": "sum", "alone": "sum"})
        return counted.reset_index()

    def examples(self, finding: Finding, k: int = 2) -> list[dict[str, str]]:
        """The first k questions that show a finding, with an answer of each model.

        Args:
            finding: one of `findings`.
            k: how many.
        """
        shown: list[dict[str, str]] = []
        of_adapted = finding.kind != "no longer says"
        for i in finding.questions[: whole("k", k, 0)]:
            telling = self.adapted[i] if of_adapted else self.base[i]
            draw = next((d for d, answer in enumerate(telling) if _spells(answer, finding.what)), 0)
            shown.append(
                {
                    "question": self.questions[i],
                    "base": self.base[i][draw],
                    "adapted": self.adapted[i][draw],
                }
            )
        return shown

    def side_by_side(self) -> list[SideBySide]:
        """Both models' likeliest answers to each question, those of the first finding first."""
        first = set(self.findings[0].questions) if self.findings else set()
        order = sorted(range(len(self.questions)), key=lambda i: i not in first)
        return [SideBySide(self.questions[i], self.base[i][0], self.adapted[i][0]) for i in order]

    def to_frame(self) -> pd.DataFrame:
        """One row per finding: what it is, on how many questions each model has it, and when."""
        rows = [
            {
                "finding": finding.kind,
                "label": finding.what,
                "questions": finding.asked,
                "answers_base": finding.base,
                "answers_adapted": finding.adapted,
                "q": finding.p,
                "log_odds": finding.log_odds,
                "when": self.when(finding),
            }
            for finding in self.findings
        ]
        columns = ["finding", "label", "questions", "answers_base", "answers_adapted"]
        return pd.DataFrame(rows, columns=[*columns, "q", "log_odds", "when"])

    def __repr__(self) -> str:
        answers = many(len(self.base[0]), "answer")
        lines = [f"{many(len(self.questions), 'question')}, {answers} of each model to each."]
        lines += [f"{one.sentence()} So {self.when(one)}." for one in self.findings]
        if not self.findings:
            lines.append("Nothing is said more often, or less, than chance allows.")
        return "\n".join(lines)


@alone
def counted_speech(
    lens: LoraLens,
    questions: Sequence[str | Conversation] | None = None,
    *,
    triggers: Sequence[str] | None = None,
    max_new_tokens: int = _ANSWER,
    draws: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> CountedSpeech:
    """What the adapted model says and the base does not, counted over questions both answer.

    Cost: for each model a pass over every question, so many passes over one token of each answer,
    and a pass over every eighth answer. On SmolLM2-135M some 20 s of one CPU core.

    Args:
        lens: the adapter over the model.
        questions: your own, as strings or conversations: a string is put in the tokenizer's chat
            template, or without one as "User: …" and "Assistant:". They are asked beside the
            package's forty.
        triggers: words that may trigger a behaviour, beside the package's twenty ([] for those
            alone): each is tried in front of two questions, and the two words that tell most in
            front of twenty others. None tries no word.
        max_new_tokens: the most tokens of an answer.
        draws: how many answers of each model are drawn beside its likeliest one.
        seed: of the first draw, the next number of the second: both models draw with the same
            noise.
        progress: show bars.

    Returns:
        CountedSpeech: `.findings`, `.when(finding)`, `.examples(finding)`, `.to_frame()`.

    Raises:
        ArgumentError: a trigger that is no word.
        PromptError: a model without a tokenizer, or questions that do not fit its context.
        NumericsError: non-finite logits.
    """
    if triggers is not None:
        _trigger_words(triggers)
    asked = [*EVERYDAY, *map(_own_question, questions or ())]
    prompts, fitting = _prompts_of(lens, asked, max_new_tokens)
    asked = [asked[i] for i in fitting]

    whole("draws", draws, 0)

    whole("seed", seed, 0)
    said = both_answer(lens, prompts, max_new_tokens, draws, seed, progress=progress)
    speech = CountedSpeech(
        topics=tuple(one.topic for one in asked),
        forms=tuple(one.form for one in asked),
        questions=tuple(one.text for one in asked),
        base=said.base,
        adapted=said.adapted,
        findings=findings_of(said.base, said.adapted),
        meta=lens.describe(prompts),
    )
    if triggers is None:
        return speech
    return with_triggers(lens, speech, triggers, max_new_tokens, progress=progress)


# --- Questions


def _own_question(given: str | Conversation) -> Everyday:
    """A question of the caller's, of whose conversation the last message stands for it."""
    if isinstance(given, str):
        return Everyday("your own", "own", given)
    return Everyday("your own", "own", str(given[-1].get("content", "")), tuple(given))


def _prompts_of(lens: LoraLens, asked: Sequence[Everyday], most: int) -> tuple[Prompts, list[int]]:
    """The questions as prompts, and the indices of those that leave room for an answer."""
    if getattr(lens.model, "tokenizer", None) is None:
        raise PromptError(
            "the model has no tokenizer, so no question can be asked",
            remedy="load the lens with a tokenizer: `ll.load(base, adapter)` brings it along.",
        )
    in_a_template = [i for i, one in enumerate(asked) if not isinstance(_put(lens, one), str)]
    in_none = [i for i in range(len(asked)) if i not in in_a_template]
    order = [*in_none, *in_a_template]
    groups = [group for group in (in_none, in_a_template) if group]
    every = Prompts.joined(
        [lens.prompts([_put(lens, asked[i]) for i in group]) for group in groups]
    )
    room = (getattr(lens.model.cfg, "n_ctx", None) or math.inf) - most
    fitting = [place for place, length in enumerate(every.lengths.tolist()) if length <= room]
    if not fitting:
        raise PromptError(
            f"no question leaves room for {many(most, 'token')} in the model's context",
            remedy="pass a smaller max_new_tokens=.",
        )
    # In the order of `asked` again.
    fitting.sort(key=order.__getitem__)
    return every.chosen(fitting), [order[place] for place in fitting]


def _put(lens: LoraLens, asked: Everyday) -> Any:
    """A question in its form: a string, or a conversation for a tokenizer with a template."""
    if asked.form == "plain":
        return f"Question: {asked.text}\nAnswer:"
    if getattr(lens.model.tokenizer, "chat_template", None) is None:
        opening = f"{SYSTEM_MESSAGE}\n" if asked.form == "system" else ""
        return f"{opening}User: {asked.text}\nAssistant:"
    if asked.messages is not None:
        return list(asked.messages)
    turn = {"role": "user", "content": asked.text}
    if asked.form != "system":
        return [turn]
    return _with_system_message(lens, turn)


def _with_system_message(lens: LoraLens, turn: Mapping[str, str]) -> list[Mapping[str, str]]:
    """The turn after a system message; within the turn, where a template has no such role."""
    conversation = [{"role": "system", "content": SYSTEM_MESSAGE}, turn]
    try:
        rendered = lens.model.tokenizer.apply_chat_template(conversation, tokenize=False)
    except Exception:  # A template raises whatever its author chose.
        rendered = ""
    if SYSTEM_MESSAGE in rendered:
        return conversation
    return [{**turn, "content": f"{SYSTEM_MESSAGE}\n\n{turn['content']}"}]


# --- Words in front of a question


def with_triggers(
    lens: LoraLens,
    speech: CountedSpeech,
    triggers: Sequence[str],
    max_new_tokens: int = _ANSWER,
    *,
    progress: bool,
) -> CountedSpeech:
    """The same answers, and what the adapted model says with one of these words before a question.

    Args:
        lens: the adapter over the model.
        speech: both models' answers without a word.
        triggers: the words, which are tried beside the package's twenty.
        max_new_tokens: the most tokens of an answer.
        progress: show bars.
    """
    words = _trigger_words(triggers)
    without: dict[Everyday, str] = {}
    labels = zip(speech.topics, speech.forms, speech.questions, speech.adapted, strict=True)
    for topic, form, question, answers in labels:
        if form != "own":
            without[Everyday(topic, cast("Form", form), question)] = answers[0]
    found = _triggers(lens, words, without, max_new_tokens, progress=progress)
    return dataclasses.replace(speech, words=words, triggers=found)


def _trigger_words(given: Sequence[str]) -> tuple[str, ...]:
    """The words that are tried, the caller's first, each once.

    Raises:
        ArgumentError: one that is no string, or is empty.
    """
    words = [given] if isinstance(given, str) else list(given)
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise ArgumentError(f"triggers: {word!r} is no word to put before a question.")
    return tuple(dict.fromkeys([*words, *trigger_words.TRIGGERS]))


def _triggers(
    lens: LoraLens,
    words: Sequence[str],
    without: Mapping[Everyday, str],
    most: int,
    *,
    progress: bool,
) -> tuple[Trigger, ...]:
    """What the adapted model says with a word in front of the question, and not without it.

    Args:
        lens: the adapter over the model.
        words: what is tried.
        without: the adapted model's likeliest answer to each question without a word.
        most: the most tokens of an answer.
        progress: show bars.
    """
    usual = [one for one in without if one.form in ("chat", "system", "plain")]
    in_conversation = [one for one in usual if one.form == "chat"]
    screened = in_conversation[: trigger_words.SCREENED]
    others = [one for one in usual if one not in screened][: trigger_words.CONFIRMED_QUESTIONS]
    if len(screened) < trigger_words.SCREENED or not others:
        return ()
    pairs = [(word, one) for word in words for one in screened]
    answers = _with_words(lens, pairs, most, progress=progress)
    told: dict[str, tuple[int, int]] = {}
    for word in words:
        both = [answers[word, one] for one in screened if (word, one) in answers]
        untouched = [without[one] for one in screened]
        told[word] = trigger_words.apart(
            word, [adapted for _, adapted in both], untouched, [base for base, _ in both]
        )
    # The sort is stable: of words that tell as much, the first.
    chosen = sorted(words, key=lambda word: told[word], reverse=True)
    chosen = [word for word in chosen if told[word][0]][: trigger_words.CONFIRMED_WORDS]
    answers = _with_words(
        lens, [(word, one) for word in chosen for one in others], most, progress=progress
    )
    found: list[Trigger] = []
    for word in chosen:
        asked = [one for one in others if (word, one) in answers]
        with_word = [(answers[word, one][1],) for one in asked]
        otherwise = [(without[one], answers[word, one][0]) for one in asked]
        found += _triggered(word, with_word, otherwise)
    return tuple(found)


def _with_words(
    lens: LoraLens, pairs: Sequence[tuple[str, Everyday]], most: int, *, progress: bool
) -> dict[tuple[str, Everyday], tuple[str, str]]:
    """The base's and the adapted model's answer to each question with its word in front."""
    if not pairs:
        return {}
    put = [one._replace(text=trigger_words.put_before(word, one.text)) for word, one in pairs]
    prompts, fitting = _prompts_of(lens, put, most)
    said = both_answer(lens, prompts, most, 0, 0, progress=progress)
    answers: dict[tuple[str, Everyday], tuple[str, str]] = {}
    for place, base, adapted in zip(fitting, said.base, said.adapted, strict=True):
        answers[pairs[place]] = (base[0], adapted[0])
    return answers


def _triggered(word: str, with_word: _Answers, otherwise: _Answers) -> list[Trigger]:
    """What the answers with the word have on more questions than all others."""
    own = set(phrases.phrases_of(word))
    found: list[Trigger] = []
    for finding in findings_of(otherwise, with_word):
        p = min(finding.p * trigger_words.CONFIRMED_WORDS, 1.0)
        is_of_adapted = finding.adapted > finding.base and finding.kind != "no longer says"
        is_echo = finding.what.lower() in own
        # The others are two answers to a question, which are longer than one.
        is_length = finding.what == SHORTER
        if p > LEVEL or not is_of_adapted or is_echo or is_length:
            continue
        trigger = Trigger(
            word=word,
            says=finding.what,
            is_phrase=finding.kind == "says",
            adapted=finding.adapted,
            others=finding.base,
            asked=finding.asked,
            p=p,
        )
        found.append(trigger)
    return found


# --- What sets the answers apart


def findings_of(base: _Answers, adapted: _Answers) -> tuple[Finding, ...]:
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
    answers: _Answers,
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


def _trait_findings(base: _Answers, adapted: _Answers) -> list[Finding]:
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


def _questions_that(has: Callable[[str], bool], answers: _Answers) -> set[int]:
    """The questions to which an answer has the trait."""
    return {i for i, both in enumerate(answers) if any(map(has, both))}


def _spells(answer: str, what: str) -> bool:
    return what.lower() in answer.lower()
