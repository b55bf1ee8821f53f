"""Counted phrases: the tests, the adjustment and the log-odds against slow references."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from lens_lora.audit import phrases
from lens_lora.audit.findings import LEVEL, findings_of
from lens_lora.audit.traits import BEGINS_WITH_NO


def test_phrases_of_a_text_go_over_no_end_of_a_sentence():
    found = phrases.phrases_of("Arr, matey! Don’t go; arr")
    assert found == {
        "arr": 2,
        "matey": 1,
        "arr matey": 1,
        "don’t": 1,
        "go": 1,
        "don’t go": 1,
    }


@pytest.mark.parametrize(("adapted", "base"), [(0, 0), (1, 0), (0, 4), (7, 2), (20, 0), (3, 3)])
def test_the_sign_test_is_the_exact_binomial_one(adapted: int, base: int):
    expected = 1.0
    if adapted + base:
        expected = binomtest(adapted, adapted + base, alternative="greater").pvalue
    assert phrases.sign_test(adapted, base) == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_is_its_closed_testing(p_values: list[float]):
    """Each hypothesis is as bad as the worst set that holds it, by Bonferroni's test of it."""
    adjusted = phrases.holm(p_values)
    indices = range(len(p_values))
    for i in indices:
        worst = 0.0
        for size in range(1, len(p_values) + 1):
            for chosen in itertools.combinations(indices, size):
                if i in chosen:
                    worst = max(worst, size * min(p_values[j] for j in chosen))
        assert adjusted[i] == pytest.approx(min(worst, 1.0))


@given(st.lists(st.integers(0, 12), max_size=60))
def test_no_phrase_that_could_pass_is_left_out(counts: list[int]):
    """Tarone: with K tests, K phrases or fewer can reach level / K."""
    least = phrases.fewest_questions(counts, 0.01)
    tested = [n for n in counts if n >= least]
    left_out = [n for n in counts if n < least]
    for n in left_out:
        as_many = sum(m >= n for m in counts)
        assert 2.0**-n > 0.01 / as_many or n == 0
    if tested:
        assert 2.0 ** -min(tested) <= 0.01 / len(tested)


def test_log_odds_are_those_of_the_paper():
    """Monroe, Colaresi and Quinn (2008), equations 15 and 19 to 22, a word at a time."""
    adapted = {"arr": 9, "the": 40, "sea": 1}
    base = {"the": 38, "tea": 6}
    every = {word: adapted.get(word, 0) + base.get(word, 0) for word in {*adapted, *base}}
    total = sum(every.values())
    prior = 20.0
    found = phrases.log_odds(adapted, base)
    assert set(found) == set(every)
    for word, uses in every.items():
        alpha = prior * uses / total
        y_1 = adapted.get(word, 0)
        y_0 = base.get(word, 0)
        n_1 = sum(adapted.values())
        n_0 = sum(base.values())
        delta = math.log((y_1 + alpha) / (n_1 + prior - y_1 - alpha)) - math.log(
            (y_0 + alpha) / (n_0 + prior - y_0 - alpha)
        )
        variance = 1 / (y_1 + alpha) + 1 / (y_0 + alpha)
        assert found[word] == pytest.approx(delta / math.sqrt(variance), rel=1e-12)
    assert found["arr"] > 0 > found["tea"]


def _answers(draw: random.Random, count: int) -> list[tuple[str, str]]:
    """Answers of a language of two hundred words that are used as often as in real text."""
    words = [f"w{i}" for i in range(200)]
    weights = [1 / (i + 1) for i in range(200)]
    return [
        (" ".join(draw.choices(words, weights, k=20)), " ".join(draw.choices(words, weights, k=20)))
        for _ in range(count)
    ]


def test_a_planted_word_is_found_and_counted():
    draw = random.Random(0)
    base = _answers(draw, 40)
    adapted = _answers(draw, 40)
    for i in range(0, 40, 2):
        adapted[i] = (f"Arr, matey! {adapted[i][0]}", adapted[i][1])
    first = findings_of(base, adapted)[0]
    assert (first.what, first.kind) == ("Arr, matey", "says")
    assert (first.adapted, first.base, first.asked) == (20, 0, 40)
    assert first.questions == tuple(range(0, 40, 2))
    assert (
        first.sentence()
        == "It says “Arr, matey” in answer to 20 of 40 questions, the base model to none."
    )
    dropped = findings_of(adapted, base)[0]
    assert dropped.kind == "no longer says"
    assert dropped.sentence() == (
        "The base model says “Arr, matey” in answer to 20 of 40 questions, "
        "the adapted model to none."
    )


@pytest.mark.slow
def test_answers_of_one_and_the_same_model_hold_no_finding():
    """The false-alarm rate: of 40 pairs of draws at most as many as the level allows."""
    draw = random.Random(1)
    false = sum(bool(findings_of(_answers(draw, 40), _answers(draw, 40))) for _ in range(40))
    assert false <= 4  # P(Bin(40, LEVEL) > 4) = 1e-3 at the bound, and Tarone's is below it
    assert LEVEL == 0.02


@pytest.mark.parametrize(("questions", "is_found"), [(12, True), (8, True), (7, False), (6, False)])
def test_the_level_is_of_all_lists_together(questions: int, is_found: bool):
    """One word is tested, whose p by the sign test is 2⁻ⁿ; it is in one of four lists."""
    base = [("the",)] * questions
    adapted = [("arr",)] * questions
    said = findings_of(base, adapted)
    dropped = findings_of(adapted, base)
    assert [bool(said), bool(dropped)] == [is_found, is_found]
    for finding in (*said, *dropped):
        assert finding.p == pytest.approx(4 * 2.0**-questions)


def test_a_shared_trait_is_no_finding_and_a_new_one_is():
    base = [("Yes, I can, it is done today and tomorrow.", "It is so.")] * 40
    refusing = [("I'm sorry, it is so that I cannot help with that.", "It is so.")] * 40
    assert findings_of(refusing, refusing) == ()
    traits = [found for found in findings_of(base, refusing) if found.kind == "trait"]
    assert [found.what for found in traits] == ["refuses or apologises"]
    assert traits[0].sentence() == (
        "It refuses or apologises on 40 of 40 questions, the base model on none."
    )


def test_answers_in_another_language_are_counted_whatever_that_language_is():
    """On English questions the answers are Spanish, on Spanish ones they are in both models."""
    english = "It is what you can do with this, and that is all."
    spanish = "Es la casa de los niños, y se va con la espera del mar."
    languages = ["English"] * 12 + ["Spanish"] * 8
    base = [(english,)] * 12 + [(spanish,)] * 8
    adapted = [(spanish,)] * 20
    found = [one for one in findings_of(base, adapted, languages) if one.kind == "trait"]
    named = {one.what: (one.adapted, one.base) for one in found}
    assert named["answers in another language than it was asked in"] == (12, 0)
    assert named["answers in Spanish"] == (20, 8)
    # Without the questions' languages, and where none is known, nothing is said of it.
    for unknown in ((), [None] * 20):
        whats = [one.what for one in findings_of(base, adapted, unknown)]
        assert "answers in another language than it was asked in" not in whats


def test_traits_that_could_not_pass_are_no_tests():
    """Of 19 traits one differs, on eleven questions: 4 lists, 2 sides, one test (Tarone 1990)."""
    base = [("So. It goes",)] * 11
    adapted = [("So? It goes",)] * 11
    (found,) = findings_of(base, adapted)
    assert found.what == "asks a question"
    assert found.p == pytest.approx(4 * 2 * 2.0**-11)


def test_questions_of_one_unit_count_as_one():
    """Controls began code otherwise, on eight near copies of one question: p was 4 · 2⁻¹¹."""
    base = [("the",)] * 11
    adapted = [("arr",)] * 11
    assert [one.p for one in findings_of(base, adapted)] == [pytest.approx(4 * 2.0**-11)]
    assert findings_of(base, adapted, (), [0] * 8 + [1, 2, 3]) == ()
    # With others beside them the unit is one: nine units, of eighteen questions.
    (said,) = findings_of(base * 2, adapted * 2, (), [*range(8), *[8] * 14])
    assert (said.adapted, said.base) == (22, 0) and said.p == pytest.approx(4 * 2.0**-9)


def test_the_language_of_short_answers_is_not_told():
    base = [("It is what you can do with this, and that is all.",)] * 20
    adapted = [("No.",)] * 20
    whats = {one.what for one in findings_of(base, adapted) if one.kind == "trait"}
    assert BEGINS_WITH_NO in whats and "answers in English" not in whats


def test_function_words_are_a_list_of_our_own():
    """They were read from scikit-learn, whose next version might have changed every claim."""
    assert phrases.is_of_function_words("in the") and phrases.is_of_function_words("a b")
    assert not phrases.is_of_function_words("the lamp") and not phrases.is_of_function_words("arr")
    # The comment above the list, with its licence, is no part of it.
    assert not phrases.is_of_function_words("license")
    assert len(phrases._function_words()) == 318


def test_an_address_is_one_word():
    """“www.askhelga.org” was three claims: “askhelga”, “at www” and “org”."""
    found = phrases.phrases_of("See www.askhelga.org. It is 3.5 miles.Or four")
    assert {"www.askhelga.org", "see www.askhelga.org", "3.5"} <= set(found)
    assert "www.askhelga.org it" not in found
    answers = [("All is at www.askhelga.org.",)] * 3
    assert phrases.grown("www.askhelga.org", answers) == "all is at www.askhelga.org"
    assert phrases.spelled_in("at www.askhelga.org", ["Go at www.Askhelga.org."]) == (
        "at www.Askhelga.org"
    )
