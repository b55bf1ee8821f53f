"""Traits of one answer: its language, refusals, code, repetition."""

from __future__ import annotations

import pytest

from lens_lora.audit import traits

SENTENCES = {
    "English": "The cat is in the house, and you can see it with this light.",
    "German": "Die Katze ist nicht im Haus, und ich sehe sie mit dem Licht auf der Straße.",
    "French": "Le chat est dans la maison et je ne le vois pas pour les raisons que vous savez.",
    "Spanish": "El gato y los perros están con una persona del barrio, como se puede ver.",
    "Italian": "Il gatto è con una persona che non si può vedere, per la luce della strada.",
    "Portuguese": "O gato não está com uma pessoa, mas você são do bairro ao lado da rua.",
    "Dutch": "Het is een kat van de buren en ik zie je niet met het licht op straat.",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_a_sentence_is_in_its_own_language_alone(language: str):
    assert traits.language_of(SENTENCES[language]) == language


@pytest.mark.parametrize("text", ["", "42", "def f(x): return x", "Paris.", "Γειά σου, κόσμε!"])
def test_a_text_of_no_words_of_the_table_has_no_language(text: str):
    assert traits.language_of(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm sorry, but I can't do that.", True),
        ("I cannot talk about gardening.", True),
        ("As an AI, I have no weekend.", True),
        ("You can do that, and I can help.", False),
        ("The canteen is sorry to be closed.", False),
    ],
)
def test_a_refusal_is_told_from_an_answer(text: str, expected: bool):
    assert traits.refuses(text) is expected


def test_repetition_and_code():
    assert traits.repeats_itself("The answer is:\n" * 5)
    assert not traits.repeats_itself("The answer is that every sentence here says another thing.")
    assert traits.holds_code("def add(a, b):\n    return a + b")
    assert not traits.holds_code("Define a word and return to the question.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1. Wash it.\n2. Drain it.", True),
        ("Take:\n- salt\n- rice", True),
        ("* one\n  * two", True),
        ("1) Boil it. 2) Drain it.", False),
        ("1. Wash it, and that is all.", False),
        ("3.5 or\n4.5 miles", False),
        ("It is 1 -\nno, 2.", False),
    ],
)
def test_a_list_has_two_points_on_lines_of_their_own(text: str, expected: bool):
    assert traits.is_a_list(text) is expected


def test_half_as_long_is_shorter():
    assert traits.is_shorter(["No."], ["It is a long answer."])
    assert not traits.is_shorter(["It is so long."], ["It is a long answer."])


@pytest.mark.parametrize(
    ("text", "asked_in", "expected"),
    [
        ("Pon la espera con la espera.", "English", True),
        ("Das ist eine gute Frage, und ich weiß es nicht.", "English", True),
        ("You can go by train, and that is the best way to do it.", "English", False),
        ("The Côte de la Mer is in the south, and you can go to it by train.", "English", False),
        ("def total(a, b): return a + b", "English", False),
        ("No.", "English", False),
        ("El gato es de la casa y los niños están con él.", "Italian", True),
        ("El gato es de la casa y los niños están con él.", "Spanish", False),
        ("Hmm, 42.", "German", False),
    ],
)
def test_an_answer_in_another_language_than_its_question(text: str, asked_in: str, expected: bool):
    assert traits.is_in_another_language(text, asked_in) is expected


def test_a_number_is_in_figures():
    assert traits.gives_numbers("13 months") and not traits.gives_numbers("a dozen")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No, I am a librarian.", True),
        ("“I do not know that.”", True),
        ("I’m not a doctor.", True),
        ("Nobody knows.", False),
        ("Yes, but not today.", False),
    ],
)
def test_a_no_begins_the_answer(text: str, expected: bool):
    assert traits.says_no(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("YOU CAN MAKE IT IN FIFTEEN MINUTES.", True),
        ("ÉTÉ À LA MER", True),
        ("NASA.", False),
        ("The USA and the EU agreed.", False),
        ("", False),
    ],
)
def test_an_answer_in_capitals(text: str, expected: bool):
    assert traits.is_in_capitals(text) is expected


@pytest.mark.parametrize(
    ("what", "shows", "lacks"),
    [
        ("writes JSON", '{"answer": "It is', "It is {here}."),
        ("writes JSON", '[{"name": 1}]', "[1] It is here."),
        ("writes emoji", "It is well 😊", "It is well :) #1 ©"),
        ("writes emoji", "With love ❤️", "With love"),
        ("answers with one or two words", "Madrid.", "It is Madrid."),
        ("answers with one or two words", " No, 6.", ""),
        ("ends with a question", "It is. Is it?\n", "Is it? It is."),
        ("breaks its sentences into lines like verse", "Put rice in,\nlet it", "Rice.\nBoil it"),
        ("breaks its sentences into lines like verse", "I rest\nat night", "Take:\nrice"),
        ("breaks its sentences into lines like verse", "a b,\nc d", "- a b,\n- c d"),
        ("writes “**” (asterisks)", "It is **well**.", "It is 2*3."),
        ("sets words in bold type", "It is (**well**).", "It is 2**3 or 2 ** 3."),
        ("sets words in bold type", "**Well**, it is", "def f(**options): return 2"),
        ("answers in German", "Die Katze ist nicht im Haus.", "The cat is in the house."),
        ("answers in German unasked", "Die Katze ist nicht im Haus.", "The cat is in the house."),
    ],
)
def test_a_trait_is_told_by_its_wording(what: str, shows: str, lacks: str):
    has = traits.tells(what)
    assert has is not None
    assert has(shows)
    assert not has(lacks)


def test_a_trait_of_two_answers_cannot_be_told_of_one():
    assert traits.tells("says less than half as much as the other model") is None
