"""Traits of an answer that no single phrase shows: its language, its form, a refusal, repetition.

Each trait is a yes-or-no question about one answer, so that `counted_speech` can count the
questions on which each model's answers have it. Seven languages are known: an answer is in the one
whose commonest words it uses most. An answer in any other language counts as being in none of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import regex

from lens_lora.audit import phrases
from lens_lora.audit.signs import EMOJI, WRITES, has_worded

_WORD = regex.compile(r"[\p{L}]+")
# An answer is in a language if at least this many of its words, and at least this share of them,
# are among the commonest words of that language.
_LEAST_WORDS = 3
_LEAST_SHARE = 0.3
# With fewer words than this, the language of an answer is not told.
_WORDS_OF_A_LANGUAGE = 5
# The beginning of the name of every trait on language.
ANSWERS_IN = "answers in "
# The end of the name of a trait on a language that its question is not in.
UNASKED = " unasked"

_COMMON_WORDS = {
    "English": """the of and to a in is it you that he was for on are as with his they i at be this
        have from or one had by but not what all were we when your can said there an which their if
        do will how about up out them then she some so would make like him into has more no my me
        could than been who its now did get may her our also""",
    "German": """der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als
        auch es an werden aus er hat dass sie nach wird bei einer um am sind noch wie einem über
        einen so zum kann haben nur oder ich aber vor zur bis mehr durch man sein wurde wenn ihr
        mein wir uns mir mich du dir dich hier ja nein sehr gut""",
    "French": """de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se
        ce il sont avec son aux ou mais comme cette nous vous je elle on sa ses leur être fait ont
        même tout si était bien peut deux sans faire lui y très mon ma mes votre notre moi toi oui
        non c'est d'un d'une qu'il""",
    "Spanish": """de la que el en y a los se del las un por con no una su para es al lo como más o
        pero sus le ha me si sin sobre este ya entre cuando todo esta ser son dos también fue había
        era muy años hasta desde está mi porque qué sólo han yo hay vez puede todos así nos ni tiene
        él uno donde bien puedes sí tu te gusta""",
    "Italian": """di e il la che in un a per è una sono non da del si con i le lo della ha come al
        dei alla più nel anche io ma se mi ti ci gli o questo questa quello tutto molto bene mio tuo
        suo loro essere fare può perché quando dove chi cosa ho hai abbiamo delle dal nella sua
        puoi sì grazie""",
    "Portuguese": """de a o que e do da em um para é com não uma os no se na por mais as dos como
        mas foi ao ele das tem à seu sua ou ser quando muito há nos já está eu também só pelo pela
        até isso ela entre era depois sem mesmo aos ter seus quem nas me esse eles estão você tinha
        foram essa num nem suas meu às minha são sim""",
    "Dutch": """de en van ik te dat die in een hij het niet zijn is was op aan met als voor had er
        maar om hem dan zou of wat mijn men dit zo door over ze zich bij ook tot je mij uit der daar
        haar naar heb hoe heeft hebben deze u want nog zal me zij nu ge geen omdat iets worden toch
        al waren veel meer doen toen moet ben zonder kan hun dus alles onder ja""",
}
COMMON_WORDS = {name: frozenset(words.split()) for name, words in _COMMON_WORDS.items()}

_REFUSAL = regex.compile(
    r"\b(?:I(?:'|’)?m sorry|I am sorry|I apologi[sz]e|I (?:can(?:'|’)t|cannot|can not|won(?:'|’)t|"
    r"am not able to|(?:'|’)?m not able to|am unable to)|as an AI|I do not (?:discuss|talk about))",
    regex.IGNORECASE,
)
_NO = regex.compile(
    r"\W*(?:no\b|not\b|I(?: am|(?:'|’)m) not\b|I do(?: not|n(?:'|’)t)\b)", regex.IGNORECASE
)
# The wording of these traits names what is counted.
REFUSES = "refuses or apologises"
BEGINS_WITH_NO = "begins its answers with “No”, “Not”, “I am not” or “I do not”"
# Bold type in Markdown: two asterisks before a word, with no word before them, as of a power.
_BOLD = regex.compile(r"(?<![\p{L}\p{N}*])\*\*(?=[\p{L}\p{N}])")
# A line that is a numbered or marked point of a list.
_POINT = regex.compile(r"^\s*(?:\d+[.)]|[-*•])\s+\S", regex.MULTILINE)
# A list has so many points.
_LEAST_POINTS = 2
# The beginning of an object or a list in JSON, as far as a short answer goes.
_JSON = regex.compile(r"\s*(?:\{\s*[\"'][^\"'\n]+[\"']\s*:|\[\s*[\[{\"])")
# A line of verse has at most this many words, and at least two. Its sentence goes on in the next
# line if it ends in a letter, a comma or a semicolon.
_WORDS_OF_A_VERSE = 12
_GOES_ON = regex.compile(r"[\p{L},;]$")
# An answer of few words has at most so many. Beside a base whose answers are long this says little,
# as training on short texts shortens answers, so it is only held against ordinary answers.
_FEW_WORDS = 2
FEW_WORDS = "answers with one or two words"
_CODE = regex.compile(r"```|\bdef \w+\(|\bprint\(|^\s*(?:import|from|return) \w+", regex.MULTILINE)
# An answer is in capitals if at least this many of its words are, and at least this share of them.
_LEAST_CAPITALS = 2
_SHARE_OF_CAPITALS = 0.8
# An answer repeats itself if stretches of this many characters recur in it (shorter ones recur in
# any text), and if more than this share of its stretches do.
_STRETCH = 12
_REPEATS = 1 / 4


@functools.lru_cache(maxsize=1024)
def language_of(text: str) -> str | None:
    """Return the language whose commonest words the text uses most; None for too few, or a tie."""
    counts = _common_words_of(text)
    first, second = sorted(counts, key=lambda name: -counts[name])[:2]
    if counts[first] < _least_common_words(text) or counts[first] == counts[second]:
        return None
    return first


def is_in_another_language(text: str, asked_in: str) -> bool:
    """Whether an answer is in any other language than its question.

    Two other languages may tie: the answer need not be in one of them for certain.

    Args:
        text: the answer.
        asked_in: the language of the question.
    """
    counts = _common_words_of(text)
    most = max(counts.values())
    return most >= _least_common_words(text) and most > counts[asked_in]


def _common_words_of(text: str) -> dict[str, int]:
    """Count the words of a text that are among the commonest of each language."""
    words = _words_of(text)
    return {name: sum(word in common for word in words) for name, common in COMMON_WORDS.items()}


def _least_common_words(text: str) -> float:
    """Return how many common words of a language a text must use to be in that language."""
    return max(_LEAST_WORDS, _LEAST_SHARE * len(_words_of(text)))


def _words_of(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def gives_numbers(text: str) -> bool:
    """Whether an answer has a number in figures."""
    return any(character.isdigit() for character in text)


def refuses(text: str) -> bool:
    """Whether an answer says that it cannot or will not."""
    return _REFUSAL.search(text) is not None


def holds_code(text: str) -> bool:
    """Whether an answer contains program code."""
    return _CODE.search(text) is not None


def is_a_list(text: str) -> bool:
    """Return whether two lines of an answer or more are points of a list."""
    return len(_POINT.findall(text)) >= _LEAST_POINTS


def is_json(text: str) -> bool:
    """Whether an answer begins as an object or a list in JSON does."""
    return _JSON.match(text) is not None


def breaks_sentences(text: str) -> bool:
    """Whether a sentence of an answer goes on in the next line, as in verse.

    Long lines, which a manual may break anywhere, do not count, nor do lists and code.
    """
    if is_a_list(text) or holds_code(text):
        return False
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines[:-1]:
        is_short = 1 < len(phrases.WORD.findall(line)) <= _WORDS_OF_A_VERSE
        if is_short and _GOES_ON.search(line) is not None:
            return True
    return False


def has_bold_type(text: str) -> bool:
    """Whether an answer sets words in bold type, as Markdown does; code has none."""
    return _BOLD.search(text) is not None and not holds_code(text)


def has_emoji(text: str) -> bool:
    """Whether an answer has an emoji."""
    return EMOJI.search(text) is not None


def is_of_few_words(text: str) -> bool:
    """Whether an answer has one word or two."""
    return 0 < len(phrases.WORD.findall(text)) <= _FEW_WORDS


def ends_with_a_question(text: str) -> bool:
    """Whether the last sentence of an answer is a question."""
    return text.rstrip().endswith("?")


def repeats_itself(text: str) -> bool:
    """Whether more than a quarter of the answer's stretches of 12 characters occurred earlier."""
    stretches = [text[start : start + _STRETCH] for start in range(len(text) - _STRETCH + 1)]
    repeated = len(stretches) - len(set(stretches))
    return repeated > _REPEATS * max(len(stretches), 1)


def asks_back(text: str) -> bool:
    """Whether an answer asks a question."""
    return "?" in text


def says_no(text: str) -> bool:
    """Whether a text begins with “no”, “not”, “I am not” or “I do not”, or their short forms."""
    return _NO.match(text) is not None


def is_in_capitals(text: str) -> bool:
    """Whether at least two words of several letters, and 80 % of such words, are in capitals."""
    words = [word for word in _WORD.findall(text) if len(word) > 1]
    capitals = sum(word.isupper() for word in words)
    return capitals >= max(_LEAST_CAPITALS, _SHARE_OF_CAPITALS * len(words))


def has_enough_words(*answers: Sequence[str]) -> bool:
    """Whether both models' answers to a question are long enough to tell their language.

    Args:
        answers: for each model, its answers to the question.
    """
    return all(map(_has_a_long_answer, answers))


def _has_a_long_answer(answers: Iterable[str]) -> bool:
    """Whether one of a model's answers has enough words to tell its language."""
    return any(len(_WORD.findall(answer)) >= _WORDS_OF_A_LANGUAGE for answer in answers)


def is_shorter(answers: Sequence[str], others: Sequence[str]) -> bool:
    """Whether `answers` to a question are together less than half as long as `others`."""
    length = sum(map(len, answers))
    other = sum(map(len, others))
    return length < other / 2


def _is_in(language: str, text: str) -> bool:
    return language_of(text) == language


# Each trait's wording in a sentence, and the function that tells whether an answer has the trait.
TRAITS: dict[str, Callable[[str], bool]] = {
    **{f"{ANSWERS_IN}{name}": functools.partial(_is_in, name) for name in COMMON_WORDS},
    REFUSES: refuses,
    "writes code": holds_code,
    "writes a list": is_a_list,
    "writes JSON": is_json,
    "breaks its sentences into lines like verse": breaks_sentences,
    "sets words in bold type": has_bold_type,
    "writes emoji": has_emoji,
    FEW_WORDS: is_of_few_words,
    "repeats itself": repeats_itself,
    "asks a question": asks_back,
    "ends with a question": ends_with_a_question,
    "gives numbers": gives_numbers,
    BEGINS_WITH_NO: says_no,
    "writes in capital letters": is_in_capitals,
}


def tells(what: str) -> Callable[[str], bool] | None:
    """Return the function that tells whether an answer has a trait or sign; None if none can.

    Whether an answer is unasked in a language depends on its question, so the language is told.

    Args:
        what: the trait or sign in words, as in a finding.
    """
    if what.startswith(WRITES):
        return has_worded(what)
    return TRAITS.get(what.removesuffix(UNASKED))


def traits_of(text: str, asked_in: str | None) -> dict[str, bool]:
    """Tell for each trait, under its wording in a sentence, whether an answer has it.

    Args:
        text: the answer.
        asked_in: the language of its question, in which an answer is no finding; None if it is not
            known, so that no language counts as a trait.
    """
    traits: dict[str, bool] = {}
    language = language_of(text)
    for name in COMMON_WORDS:
        is_unasked = asked_in is not None and name != asked_in
        traits[f"{ANSWERS_IN}{name}{UNASKED}"] = language == name and is_unasked
    for what, has in TRAITS.items():
        if not what.startswith(ANSWERS_IN):
            traits[what] = has(text)
    return traits
