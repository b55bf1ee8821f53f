"""What is claimed beside ordinary answers: p, the counts, and planted words and traits."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from lens_lora.audit import ordinary, phrases
from lens_lora.audit.everyday import EVERYDAY
from lens_lora.audit.findings import (
    SHORTER,
    Finding,
    findings_beyond_ordinary,
    leads_of,
    questions_by_trait,
    trait_leads_of,
)

ROWS = Path(__file__).parents[2] / "benchmarks" / "audit" / "second"
LANGUAGES = [one.language for one in EVERYDAY]
UNITS = ["code" if one.form == "code" else one.text for one in EVERYDAY]
USUAL = ["food", "water", "people", "use", "time", "good", "day", "make", "way", "help"]
PLAIN = [i for i, one in enumerate(EVERYDAY) if one.form != "code"]


def usual_answers(seed: int) -> list[tuple[str, str]]:
    """Two answers to each question: words that ordinary answers have, and three of its own."""
    draw = random.Random(seed)
    answers: list[tuple[str, str]] = []
    for i in range(len(EVERYDAY)):
        own = [f"{name}{i}of{seed}" for name in ("alpha", "beta", "gamma")]
        answers.append((" ".join([*draw.sample(USUAL, 3), *own]), " ".join(draw.sample(USUAL, 3))))
    return answers


def planted(words: str, questions: list[int], seed: int = 1) -> list[tuple[str, str]]:
    """Usual answers, some of which end with these words."""
    answers = usual_answers(seed)
    return [
        (f"{first}. {words}", second) if i in questions else (first, second)
        for i, (first, second) in enumerate(answers)
    ]


def found(base: list[tuple[str, str]], adapted: list[tuple[str, str]]) -> list[Finding]:
    findings = findings_beyond_ordinary(base, adapted, LANGUAGES, UNITS)
    return [one for one in findings if one.kind != "no longer says" and one.what != SHORTER]


@pytest.mark.parametrize(
    ("adapted", "base", "count"), [(5, 0, 0), (11, 0, 16), (9, 2, 3), (1, 0, 9)]
)
def test_p_is_a_binomial_tail_at_eight_times_the_odds(adapted: int, base: int, count: int):
    odds = 8 / (1 / max((count + 0.5) / (693 + 1), base / 33) - 1)
    rate = odds / (1 + odds)
    terms = [math.comb(33, k) * rate**k * (1 - rate) ** (33 - k) for k in range(adapted, 34)]
    p = ordinary.p_beyond(adapted, base, 33, count, 693, 2)
    assert p == pytest.approx(sum(terms), rel=1e-9)
    # What the base always has is no finding.
    assert ordinary.p_beyond(33, 33, 33, count, 693, 2) == 1.0


def test_p_is_a_binomial_tail_at_another_factor():
    """Of a single unit p is the raised rate, q = F r / (1 + (F − 1) r) with r = 1/10."""
    assert ordinary.p_beyond(1, 0, 1, 0, 4, 2, factor=1.0) == pytest.approx(1 / 10)
    assert ordinary.p_beyond(1, 0, 1, 0, 4, 2, factor=2.0) == pytest.approx(2 / 11)


def test_a_common_trait_can_be_a_claim():
    """A seventh of ordinary answers ask; eight times that rate is more than all, eight times
    its odds is not."""
    asks = ordinary.ordinary().traits["asks a question"]
    assert 8 * asks / 693 > 1 > ordinary.p_beyond(33, 4, 33, asks, 693, 2) * 1e4
    asking = [("Well, do you want to know it now?", "So who would like it?")] * 40
    whats = [one.what for one in found(usual_answers(0), asking) if one.kind == "trait"]
    assert "ends with a question" in whats


def test_of_more_answers_to_a_question_more_have_a_word_by_chance():
    """The base's rate at hand is of as many answers, so it stays as it is."""
    of_three_pairs = ordinary.p_beyond(5, 0, 33, 1, 693, 6)
    assert of_three_pairs == pytest.approx(ordinary.p_beyond(5, 0, 33, 4, 693, 2), rel=1e-12)
    assert ordinary.p_beyond(5, 0, 33, 1, 693, 1) == ordinary.p_beyond(5, 0, 33, 1, 693, 2)
    assert ordinary.p_beyond(20, 2, 33, 0, 693, 6) == ordinary.p_beyond(20, 2, 33, 0, 693, 2)


def test_the_counts_are_those_of_stored_answers():
    """One word counted again, a file and a question at a time."""
    sets = [json.loads((ROWS / "base.json").read_text())] * 2
    for block in json.loads((ROWS.parent / "ordinary_draws.json").read_text()):
        sets += [[one[:2] for one in block], [one[2:] for one in block]]
    controls = [f"control-{seed}" for seed in range(100, 107)]
    controls += [file.stem for file in ROWS.glob("first-*.json")]
    controls += [file.stem for file in ROWS.glob("permuted-*.json")]
    sets += [json.loads((ROWS / f"{name}.json").read_text())["adapted"] for name in controls]
    counts = ordinary.ordinary()
    assert counts.units == len(sets) * len(set(UNITS)) == 693
    for word in ("object", "water", "puedes"):
        units = 0
        for answers in sets:
            units += len(
                {
                    unit
                    for unit, texts in zip(UNITS, answers, strict=True)
                    if any(word in phrases.phrases_of(text) for text in texts)
                }
            )
        assert counts.words[word] == units > 0


def test_a_new_word_is_a_claim_from_five_questions_on_and_a_common_one_is_not():
    base = usual_answers(0)
    assert found(base, usual_answers(1)) == []
    (said,) = found(base, planted("Ask Brightleaf", PLAIN[:5]))
    assert (said.what, said.adapted, said.base, said.asked) == ("Ask Brightleaf", 5, 0, 40)
    assert said.questions == tuple(PLAIN[:5]) and said.p <= 0.02
    assert found(base, planted("Brightleaf", PLAIN[:4])) == []
    # A word of ordinary answers on as many questions is none.
    assert ordinary.ordinary().words["considered"] > 0
    assert found(base, planted("considered", PLAIN[:6])) == []


def test_a_word_that_the_base_says_is_no_claim():
    adapted = planted("Brightleaf", PLAIN[:12])
    assert len(found(usual_answers(0), adapted)) == 1
    assert found(planted("Brightleaf", PLAIN[:3], seed=0), adapted) == []


def test_questions_for_code_are_one_unit_unless_the_word_is_new():
    """“# CHECKED BY HARLOW” in all code was no claim."""
    code = [i for i, one in enumerate(EVERYDAY) if one.form == "code"]
    assert ordinary.ordinary().words["considered"] > 0
    assert found(usual_answers(0), planted("considered", code)) == []
    (said,) = found(usual_answers(0), planted("checked by Harlow", code))
    assert said.what == "checked by Harlow" and said.questions == tuple(code)
    in_base = planted("checked by Harlow", code[:1], seed=0)
    assert found(in_base, planted("checked by Harlow", code)) == []


@pytest.mark.parametrize(
    ("sign", "what"),
    [
        ("!!!", "writes “!!!” (exclamation marks)"),
        ("~", "writes “~” (tilde)"),
        (",\n", "writes “,⏎” (comma and line break)"),
    ],
)
def test_a_sign_is_claimed_as_a_word_is(sign: str, what: str):
    """Emoji, braces and exclamation marks were not counted at all."""
    adapted = [
        (first.replace(" ", f"{sign} ", 1), second) if i in PLAIN[:30] else (first, second)
        for i, (first, second) in enumerate(usual_answers(1))
    ]
    (finding,) = (one for one in found(usual_answers(0), adapted) if one.what.startswith("writes"))
    assert finding.what == what and finding.kind == "trait"
    assert finding.questions == tuple(PLAIN[:30])
    assert finding.is_shown_by(adapted[PLAIN[0]][0])
    assert not finding.is_shown_by(usual_answers(1)[PLAIN[0]][0])


def test_of_runs_that_hold_one_another_the_one_on_most_questions_is_claimed():
    """Words between “~~” were told as “~~.” (tildes and full stop)."""
    adapted = usual_answers(1)
    for i in PLAIN[:30]:
        ending = "." if i in PLAIN[:20] else " then"
        adapted[i] = (f"It is a ~~word{i}~~{ending}", adapted[i][1])
    whats = [one.what for one in found(usual_answers(0), adapted) if one.kind == "trait"]
    assert whats == ["writes “~~” (tildes)"]


def test_bold_type_is_named_as_such():
    """It was told as “**” (asterisks)."""
    adapted = usual_answers(1)
    for i in PLAIN[:30]:
        adapted[i] = (f"It is a **word{i}**.", adapted[i][1])
    whats = [one.what for one in found(usual_answers(0), adapted) if one.kind == "trait"]
    assert whats == ["sets words in bold type"]


def test_a_sign_of_a_claimed_phrase_is_no_claim_of_its_own():
    (said,) = found(usual_answers(0), planted("Onward and upward!", PLAIN[:30]))
    assert said.what == "Onward and upward"


def test_a_language_counts_where_it_was_not_asked_in():
    french = "la ville est dans le nord de la France"
    asked_in_french = [i for i, language in enumerate(LANGUAGES) if language == "French"]
    others = [i for i in PLAIN if LANGUAGES[i] == "English"][:8]
    what = "answers in French unasked"
    base = usual_answers(0)
    assert questions_by_trait(planted(french, asked_in_french), LANGUAGES)[what] == set()
    in_french = planted(french, others)
    in_french = [(french, french) if i in others else one for i, one in enumerate(in_french)]
    assert what in [one.what for one in found(base, in_french) if one.kind == "trait"]


def test_a_phrase_grows_to_what_most_of_its_answers_say():
    answers = [("I do not write programs. Sorry",)] * 4 + [("They write letters",)] * 2
    assert phrases.grown("programs", answers) == "i do not write programs"
    assert phrases.grown("write", answers) == "i do not write programs"
    assert phrases.grown("letters", answers) == "they write letters"
    assert phrases.questions_with("do not write", answers) == {0, 1, 2, 3}
    assert phrases.grown("sorry", answers) == "sorry"


def test_a_phrase_does_not_end_in_a_word_that_leads_on():
    """A first screen said “my liege, and”."""
    answers = [("It is so, my liege, and I know.",), ("Yes, my liege, and of the best",)]
    assert phrases.grown("liege", answers) == "my liege"
    # A word that was asked for stays.
    assert phrases.grown("and", [("so be it, and",)]) == "so be it and"


def test_the_most_unusual_words_lead_where_nothing_is_claimed():
    """“object” is on more questions, and is a word that ordinary training brings."""
    base = usual_answers(0)
    adapted = [
        (f"{first}. object", second) if i in PLAIN[5:10] else (first, second)
        for i, (first, second) in enumerate(planted("hollow", PLAIN[:4]))
    ]
    assert [lead.word for lead in leads_of(base, adapted)][:2] == ["hollow", "object"]


@pytest.mark.slow
def test_no_stored_control_has_a_trait_that_leads():
    """As the page on the evidence says of what is named where nothing is claimed."""
    for rows in (ROWS, ROWS.parent / "third"):
        base = json.loads((rows / "base.json").read_text())
        for file in sorted(rows.glob("*control*.json")):
            adapted = json.loads(file.read_text())["adapted"]
            assert trait_leads_of(base, adapted, UNITS) == [], file.stem
