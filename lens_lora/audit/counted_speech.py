"""Count what the adapted model says and the base does not, over questions that both answer.

1. Both models answer the same questions (`everyday.py`, and the caller's own): once greedily, and
   `draws` times drawn at temperature 1, with the same noise for both. The base's answers to the
   package's questions are kept for the next adapter (`base_answers.py`).
2. Words and traits that the adapted model's answers have on more questions than ordinary training
   explains are findings (`findings.py`, `ordinary.py`). On the caller's own questions the answers
   are compared with the base's alone. The unit of the tests is a question.
3. Both models answer short turns on many subjects, if asked for (`asked_occasions.py`).
4. Both models write texts although nothing is asked, if asked for (`unprompted.py`).
5. Words that may trigger a behaviour are put before questions, if asked for (`triggers.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from lens_lora.arguments import whole
from lens_lora.audit import triggers as trigger_words
from lens_lora.audit.asked_occasions import with_occasions
from lens_lora.audit.everyday import EVERYDAY, Everyday, Form
from lens_lora.audit.findings import (
    LEVEL,
    SHORTER,
    Answers,
    Finding,
    findings_beyond_ordinary,
    findings_of,
    quoted,
)
from lens_lora.audit.put_questions import How, answered, ours_answered, prompts_of, put
from lens_lora.audit.speech_result import CountedSpeech
from lens_lora.audit.traits import language_of
from lens_lora.audit.triggers import Trigger
from lens_lora.audit.unprompted import with_replayed
from lens_lora.core import LoraLens, alone
from lens_lora.errors import ArgumentError, PromptError, many

# The most tokens of an answer.
_ANSWER = 24

# The messages of a conversation.
Conversation = Sequence[Mapping[str, str]]


@alone
def counted_speech(
    lens: LoraLens,
    questions: Sequence[str | Conversation] | None = None,
    *,
    occasions: bool = False,
    unprompted: bool = False,
    triggers: Sequence[str] | None = None,
    max_new_tokens: int = _ANSWER,
    draws: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> CountedSpeech:
    """Count what the adapted model says and the base does not, over questions that both answer.

    Cost: for each model, one pass over every question (where questions begin alike, that part runs
    once), up to `max_new_tokens` passes over one token of each answer, and a pass over every
    sixteenth answer; half of that if the base's answers were kept earlier. On SmolLM2-135M it takes
    15 to 20 s of one CPU core, since the embedded base's answers come with the package. The short
    turns of `occasions` cost the same way, with 16 passes over one token of each answer, and the
    128 texts of `unprompted` with 32 passes and nothing kept: about 40 s of one core. Other
    bases' answers to the package's questions are written to $LENS_LORA_CACHE (by default
    ~/.cache/lens_lora); answers to your own questions never are.

    Args:
        lens: the adapter over the model.
        questions: your own questions, asked in addition to the package's forty, as strings or
            conversations. A string is put in the tokenizer's chat template, or without one as
            "User: …" and "Assistant:"; a conversation needs a template. A repeated question is
            asked once, because the tests count questions as independent.
        occasions: whether both models also answer 288 short turns of a user on 24 subjects, for
            what shows on an occasion alone: a view on one matter, a habit with complaints. This
            costs three to four times as much as the forty questions. Where the context has no room
            for a turn, none is asked, and `.occasions` is None.
        unprompted: whether both models also write 128 texts although nothing is asked, half of them
            from the beginning of a document and half after an empty turn, with the adapter at twice
            its strength. The words that only the adapted model writes often hint at its training
            texts. Where they cannot write, `.replayed` is None.
        triggers: words that may trigger a behaviour, tried in addition to the package's twenty; []
            tries those alone, None tries none. Each word is put before two questions, and the two
            words that change the answers most are put before up to twenty others.
        max_new_tokens: the most tokens of an answer.
        draws: how many answers each model draws besides its likeliest one.
        seed: the seed of the first draw; each further draw takes the next number. Both models draw
            with the same noise.
        progress: whether to show bars.

    Returns:
        CountedSpeech: `.findings`, `.when(finding)`, `.examples(finding)`, `.occasions`,
            `.replayed`, `.to_frame()`.

    Raises:
        ArgumentError: a trigger is not a word, or a question is neither a string nor a
            conversation.
        PromptError: the model has no tokenizer; its template does not take a conversation; or one
            of your questions, or every question of the package, leaves no room for an answer in the
            context.
        NumericsError: logits are not finite.
    """
    if triggers is not None:
        _trigger_words(triggers)
    own = [] if questions is None else _own_questions(questions)
    asked = _each_once(lens, [*EVERYDAY, *own])
    prompts, fitting = prompts_of(lens, asked, max_new_tokens)
    _require_own(asked, fitting, max_new_tokens)
    asked = [asked[i] for i in fitting]
    how = How(max_new_tokens, whole("draws", draws, 0), whole("seed", seed, 0))
    # The package's own questions come first.
    ours = sum(one.form != "own" for one in asked)
    base: tuple[tuple[str, ...], ...] = ()
    adapted: tuple[tuple[str, ...], ...] = ()
    if ours:
        said = ours_answered(lens, prompts.chosen(range(ours)), how, progress=progress)
        base = said.base
        adapted = said.adapted
    if ours < len(asked):
        own_prompts = prompts.chosen(range(ours, len(asked)))
        said = answered(lens, own_prompts, how, progress=progress)
        base += said.base
        adapted += said.adapted
    speech = CountedSpeech(
        topics=tuple(one.topic for one in asked),
        forms=tuple(one.form for one in asked),
        questions=tuple(one.text for one in asked),
        base=base,
        adapted=adapted,
        findings=findings_in(asked, base, adapted),
        meta=lens.describe(prompts),
    )
    if occasions:
        speech = with_occasions(lens, speech, progress=progress)
    if unprompted:
        speech = with_replayed(lens, speech, how.seed, progress=progress)
    if triggers is None:
        return speech
    return with_triggers(lens, speech, triggers, max_new_tokens, progress=progress)


def findings_in(asked: Sequence[Everyday], base: Answers, adapted: Answers) -> tuple[Finding, ...]:
    """Find the differences between both models' answers.

    Findings on the package's questions come first, then those on the caller's own.

    Args:
        asked: the questions, the package's first.
        base: the base's answers to each question.
        adapted: the adapted model's answers to each question.
    """
    ours = sum(one.form != "own" for one in asked)
    languages = [one.language for one in asked]
    units = _units_of(asked)
    found: list[Finding] = []
    if ours:
        found += findings_beyond_ordinary(
            base[:ours], adapted[:ours], languages[:ours], units[:ours]
        )
    if ours < len(asked):
        of_own = findings_of(base[ours:], adapted[ours:], languages[ours:], units[ours:])
        found += [finding.after(ours) for finding in of_own]
    return tuple(found)


# --- Questions


def _own_questions(given: Sequence[str | Conversation]) -> list[Everyday]:
    """Read the caller's questions; a single string is one question.

    Raises:
        ArgumentError: a question is neither a string nor a conversation.
    """
    # A single message is a mapping, which would be read as a list of its keys. It is refused.
    if isinstance(given, str | Mapping):
        return [_own_question(given)]
    return [_own_question(question) for question in given]


def _own_question(given: object) -> Everyday:
    """Read one of the caller's questions; a conversation is shown by its last message."""
    if isinstance(given, str) and given.strip():
        return Everyday("your own", "own", given, language=language_of(given))
    messages: list[Mapping[str, str]] = []
    if isinstance(given, list | tuple):
        messages = [message for message in given if isinstance(message, Mapping)]
    if not messages or len(messages) < len(cast("Conversation", given)):
        raise ArgumentError(
            f"questions: {given!r} is neither a question nor a list of messages; pass a list of "
            "strings, or of conversations."
        )
    last_message = str(messages[-1].get("content", ""))
    language = language_of(last_message)
    return Everyday("your own", "own", last_message, tuple(messages), language)


def _each_once(lens: LoraLens, asked: Sequence[Everyday]) -> list[Everyday]:
    """Leave out questions that would be put to the model in the same words as an earlier one."""
    by_words: dict[str, Everyday] = {}
    for one in asked:
        by_words.setdefault(repr(put(lens, one)), one)
    return list(by_words.values())


def _units_of(asked: Sequence[Everyday]) -> list[str]:
    """Return each question's unit in the tests: all questions that ask for code share one unit.

    They all begin with the same words, so a change in how answers with code begin affects them all.
    """
    units: list[str] = []
    for index, question in enumerate(asked):
        units.append("code" if question.form == "code" else f"question {index}")
    return units


def _require_own(asked: Sequence[Everyday], fitting: Sequence[int], most: int) -> None:
    """Refuse one of the caller's questions if it leaves no room for an answer.

    Args:
        asked: all questions.
        fitting: the indices of the questions that leave room.
        most: the most tokens of an answer.
    """
    for i in sorted({*range(len(asked))} - {*fitting}):
        if asked[i].form == "own":
            raise PromptError(
                f"the question {asked[i].text[:60]!r} leaves no room for {many(most, 'token')} in "
                "the model's context",
                remedy="shorten it, or pass a smaller max_new_tokens=.",
                in_shell="shorten it.",
            )


# --- Words in front of a question


def with_triggers(
    lens: LoraLens,
    speech: CountedSpeech,
    triggers: Sequence[str],
    max_new_tokens: int = _ANSWER,
    *,
    progress: bool,
) -> CountedSpeech:
    """Add what the adapted model says with one of these words before a question.

    Args:
        lens: the adapter over the model.
        speech: both models' answers without a word.
        triggers: the words, which are tried in addition to the package's twenty.
        max_new_tokens: the most tokens of an answer.
        progress: whether to show bars.
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
    """Return the words to try, the caller's first, each once.

    Raises:
        ArgumentError: a word is not a string, or is empty.
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
    """Find what the adapted model says with a word before the question, and not without it.

    Args:
        lens: the adapter over the model.
        words: the words to try.
        without: the adapted model's likeliest answer to each question without a word.
        most: the most tokens of an answer.
        progress: whether to show bars.
    """
    usual = [one for one in without if one.form in ("chat", "system", "plain")]
    in_conversation = [one for one in usual if one.form == "chat"]
    screened = in_conversation[: trigger_words.SCREENED]
    others = [one for one in usual if one not in screened][: trigger_words.CONFIRMED_QUESTIONS]
    if len(screened) < trigger_words.SCREENED or not others:
        return ()
    answers = _answers_with_words(lens, words, screened, most, progress=progress)
    chosen = _most_telling(words, screened, answers, without)
    answers = _answers_with_words(lens, chosen, others, most, progress=progress)
    found: list[Trigger] = []
    for word in chosen:
        asked = [one for one in others if (word, one) in answers]
        with_word = [(answers[word, one].adapted,) for one in asked]
        otherwise = [(without[one], answers[word, one].base) for one in asked]
        found += _triggered(word, with_word, otherwise)
    return tuple(found)


class _Both(NamedTuple):
    """The likeliest answers of both models to one question."""

    base: str
    adapted: str


# The answers to each question with a word before it. Questions that leave no room are not in it.
_AnswersWithWords = Mapping[tuple[str, Everyday], _Both]


def _answers_with_words(
    lens: LoraLens,
    words: Sequence[str],
    questions: Sequence[Everyday],
    most: int,
    *,
    progress: bool,
) -> _AnswersWithWords:
    """Let both models answer every question with every word before it."""
    pairs = list(itertools.product(words, questions))
    if not pairs:
        return {}
    asked: list[Everyday] = []
    for word, question in pairs:
        text = trigger_words.put_before(word, question.text)
        asked.append(question._replace(text=text))
    prompts, fitting = prompts_of(lens, asked, most)
    likeliest = How(most, draws=0, seed=0)
    said = answered(lens, prompts, likeliest, progress=progress)
    answers: dict[tuple[str, Everyday], _Both] = {}
    for place, base, adapted in zip(fitting, said.base, said.adapted, strict=True):
        answers[pairs[place]] = _Both(base[0], adapted[0])
    return answers


def _most_telling(
    words: Sequence[str],
    questions: Sequence[Everyday],
    answers: _AnswersWithWords,
    without: Mapping[Everyday, str],
) -> list[str]:
    """Choose the few words that change the adapted model's answers most, if any word does.

    Args:
        words: the words that were put before the questions.
        questions: the questions on which the words are chosen.
        answers: both models' answers with each word.
        without: the adapted model's answers without a word.
    """
    untouched = [without[question] for question in questions]
    apart: dict[str, tuple[int, int]] = {}
    for word in words:
        both = [answers[word, one] for one in questions if (word, one) in answers]
        of_adapted = [pair.adapted for pair in both]
        of_base = [pair.base for pair in both]
        apart[word] = trigger_words.apart(word, of_adapted, untouched, of_base)
    # The sort is stable, so words with equal scores keep their order.
    most_first = sorted(words, key=lambda word: apart[word], reverse=True)
    telling = [word for word in most_first if apart[word][0]]
    return telling[: trigger_words.CONFIRMED_WORDS]


def _triggered(word: str, with_word: Answers, otherwise: Answers) -> list[Trigger]:
    """Find what answers with the trigger have on more questions than answers without it.

    Args:
        word: the word that was put before the questions.
        with_word: the adapted model's answer to each question with the word.
        otherwise: its answer without the word, and the base's answer with it.
    """
    # The answer “Vote for Simon” after “Simon says:” may be “Vote for”, which it says anyway, and
    # an echo of the word.
    without_echo = [tuple(trigger_words.without(word, one) for one in said) for said in with_word]
    found: list[Trigger] = []
    for finding in findings_of(otherwise, without_echo):
        p = min(finding.p * trigger_words.CONFIRMED_WORDS, 1.0)
        is_of_adapted = finding.adapted > finding.base and finding.kind != "no longer says"
        # `otherwise` has two answers to each question, which together are longer than one.
        is_length = finding.what == SHORTER
        if p > LEVEL or not is_of_adapted or is_length:
            continue
        says = finding.what
        if finding.kind == "says one of":
            says = f"says {quoted(finding.what.split(', '))}"
        trigger = Trigger(
            word=word,
            says=says,
            is_phrase=finding.kind == "says",
            adapted=finding.adapted,
            others=finding.base,
            asked=finding.asked,
            p=p,
        )
        found.append(trigger)
    return found
