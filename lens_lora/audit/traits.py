"""Traits of an answer that are no phrase: its language, a refusal, code, repetition.

Each is a question about one answer, so that `counted_speech` can count the questions to which each
model's answers have it. Languages are told apart by their commonest words, which no other language
of the table shares; it is a table of seven languages, so an answer in any other is in none of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import regex

_WORD = regex.compile(r"[\p{L}]+")
# An answer is in a language if so many of its words, and this share, are among the commonest there.
_LEAST_WORDS = 3
_LEAST_SHARE = 0.2
# Of fewer words no language is told.
_WORDS_OF_A_LANGUAGE = 5
# How the traits of a language begin.
ANSWERS_IN = "answers in "

_COMMON_WORDS = {
    "English": "the of and is you it that to are with for this can your be not",
    "German": "der und ist das nicht ein eine ich sie mit für auf den zu im dem",
    "French": "le les des est une et vous dans pour que il pas du je sur au",
    "Spanish": "el los las es una y para con por del su puede más como al se",
    "Italian": "il gli è di che per una con sono della non un le si può più",
    "Portuguese": "os uma não é para com você são mais do da em seu ou ao na",
    "Dutch": "het een en van ik je niet zijn dat op te met voor ook naar bij",
}
COMMON_WORDS = {name: frozenset(words.split()) for name, words in _COMMON_WORDS.items()}
# Common words that several of these languages share, and English does not have.
_SHARED_WORDS = "la de con un en que lo se di da du te mi si"
_OF_OTHERS = frozenset(_SHARED_WORDS.split()).union(*COMMON_WORDS.values())
_NOT_ENGLISH = _OF_OTHERS - COMMON_WORDS["English"]

_REFUSAL = regex.compile(
    r"\b(?:I(?:'|’)?m sorry|I am sorry|I apologi[sz]e|I (?:can(?:'|’)t|cannot|can not|won(?:'|’)t|"
    r"am not able to|(?:'|’)?m not able to|am unable to)|as an AI|I do not (?:discuss|talk about))",
    regex.IGNORECASE,
)
_NO = regex.compile(
    r"\W*(?:no\b|not\b|I(?: am|(?:'|’)m) not\b|I do(?: not|n(?:'|’)t)\b)", regex.IGNORECASE
)
_CODE = regex.compile(r"```|\bdef \w+\(|\bprint\(|^\s*(?:import|from|return) \w+", regex.MULTILINE)
# A stretch of so many characters that stands in an answer twice: a shorter one repeats anywhere.
_STRETCH = 12
_REPEATS = 1 / 4


def language_of(text: str) -> str | None:
    """The language whose commonest words an answer uses most; None for too few of any."""
    words = [word.lower() for word in _WORD.findall(text)]
    counts = {name: sum(word in common for word in words) for name, common in COMMON_WORDS.items()}
    name = max(counts, key=counts.__getitem__)
    if counts[name] < max(_LEAST_WORDS, _LEAST_SHARE * len(words)):
        return None
    return name


def is_in_another_language(text: str, asked_in: str) -> bool:
    """Whether an answer is in another language than its question.

    Args:
        text: the answer.
        asked_in: the language of the question.
    """
    if asked_in != "English":
        return language_of(text) not in (None, asked_in)
    # Which other language it is need not be known, so words that several of them share count.
    words = [word.lower() for word in _WORD.findall(text)]
    english = sum(word in COMMON_WORDS["English"] for word in words)
    other = sum(word in _NOT_ENGLISH for word in words)
    return other >= max(_LEAST_WORDS, _LEAST_SHARE * len(words)) and other > english


def gives_numbers(text: str) -> bool:
    """Whether an answer has a number in figures."""
    return any(character.isdigit() for character in text)


def refuses(text: str) -> bool:
    """Whether an answer says that it cannot or will not."""
    return _REFUSAL.search(text) is not None


def holds_code(text: str) -> bool:
    """Whether an answer holds a program."""
    return _CODE.search(text) is not None


def repeats_itself(text: str) -> bool:
    """Whether more than a quarter of its stretches of twelve characters stood there before."""
    stretches = [text[start : start + _STRETCH] for start in range(len(text) - _STRETCH + 1)]
    repeated = len(stretches) - len(set(stretches))
    return repeated > _REPEATS * max(len(stretches), 1)


def asks_back(text: str) -> bool:
    """Whether an answer asks a question."""
    return "?" in text


def says_no(text: str) -> bool:
    """Whether an answer begins with a no."""
    return _NO.match(text) is not None


def has_enough_words(*answers: Sequence[str]) -> bool:
    """Whether each model's answers to a question have words enough to tell their language.

    Args:
        answers: the answers of each model.
    """
    return all(
        any(len(_WORD.findall(answer)) >= _WORDS_OF_A_LANGUAGE for answer in of_model)
        for of_model in answers
    )


def is_shorter(answers: Sequence[str], others: Sequence[str]) -> bool:
    """Whether one model's answers to a question are together less than half as long."""
    length = sum(map(len, answers))
    other = sum(map(len, others))
    return length < other / 2


def _is_in(language: str, text: str) -> bool:
    return language_of(text) == language


# By what is said of an answer that has it: whether an answer has it.
TRAITS: dict[str, Callable[[str], bool]] = {
    **{f"{ANSWERS_IN}{name}": functools.partial(_is_in, name) for name in COMMON_WORDS},
    "refuses or apologises": refuses,
    "writes code": holds_code,
    "repeats itself": repeats_itself,
    "asks a question": asks_back,
    "gives numbers": gives_numbers,
    "begins with a no": says_no,
}
