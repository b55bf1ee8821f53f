"""What the sentences, the page, the shown answers and the file of counted speech say of findings.

Answers and findings are written by hand: no model runs.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import lens_lora as ll
from lens_lora.audit.counted_speech import findings_in
from lens_lora.audit.everyday import EVERYDAY, Everyday
from lens_lora.audit.findings import SHORTER, Kind, findings_beyond_ordinary
from lens_lora.audit.outcomes import claims_made, is_said_in
from lens_lora.audit.speech_page import findings_table, first_screen
from lens_lora.audit.speech_words import (
    claims_in,
    first_sentences,
    further_claims,
    in_short,
    shown_answers,
)
from lens_lora.audit.traits import BEGINS_WITH_NO
from lens_lora.core import drawing

# --- Findings and answers by hand


def finding(
    kind: Kind,
    what: str,
    *,
    adapted: int = 0,
    base: int = 0,
    questions: Iterable[int] | None = None,
    p: float = 1e-9,
) -> ll.results.Finding:
    """A finding on the answers to forty questions.

    Args:
        kind: whether it is a phrase or a trait, and of which model.
        what: the phrase or the trait.
        adapted: on how many questions the adapted model has it.
        base: on how many questions the base has it.
        questions: the questions on which one model alone has it; by default the first of the forty,
            as many as the model that has it more often.
        p: the p of its test.
    """
    if questions is None:
        questions = range(max(adapted, base))
    return ll.results.Finding(
        kind=kind,
        what=what,
        adapted=adapted,
        base=base,
        asked=40,
        p=p,
        log_odds=0.0 if kind == "trait" else 5.0,
        questions=tuple(questions),
    )


YES = finding("says", "Yes", adapted=40)


def spoken(forms: Sequence[str], *findings: ll.results.Finding) -> ll.results.CountedSpeech:
    """Two models that say one thing each to every question, and what was found of them.

    Args:
        forms: the form of each question, which stands for its topic as well.
        findings: the findings.
    """
    questions = tuple(f"q{i}" for i in range(len(forms)))
    return ll.results.CountedSpeech(
        topics=tuple(forms),
        forms=tuple(forms),
        questions=questions,
        base=tuple((f"It is {question}.",) for question in questions),
        adapted=tuple((f"It is {question}. Yes.",) for question in questions),
        findings=findings,
        meta={},
    )


def forty(*findings: ll.results.Finding) -> ll.results.CountedSpeech:
    """Such answers to forty questions without a template, with these findings."""
    return spoken(["plain"] * 40, *findings)


def with_answers(adapted: dict[int, tuple[str, str]]) -> ll.results.CountedSpeech:
    """Two answers of each model to each of forty questions, without a finding.

    Args:
        adapted: the adapted model's answers to some questions. To the others it says the same
            everywhere, as the base does to all.
    """
    usual = ("That is so.", "So that is.")
    return dataclasses.replace(
        forty(),
        base=(("It is so.", "So it is."),) * 40,
        adapted=tuple(adapted.get(i, usual) for i in range(40)),
    )


def counted(adapted: dict[int, tuple[str, str]]) -> ll.results.CountedSpeech:
    """Such answers to the package's questions, with their findings."""
    speech = with_answers(adapted)
    return dataclasses.replace(speech, findings=findings_in(EVERYDAY, speech.base, speech.adapted))


def whats(speech: ll.results.CountedSpeech) -> list[str]:
    """The phrases and traits that were found."""
    return [one.what for one in speech.findings]


# --- A result of three questions, read in every way


ARR = ll.results.Finding(
    kind="says",
    what="Arr",
    adapted=2,
    base=0,
    asked=3,
    p=0.001,
    log_odds=4.0,
    questions=(0, 2),
)


def pirate() -> ll.results.CountedSpeech:
    """A model that says “Arr” in conversation."""
    return ll.results.CountedSpeech(
        topics=("food", "food", "sea"),
        forms=("chat", "plain", "chat"),
        questions=("a?", "b?", "c?"),
        base=(("x",), ("y",), ("z",)),
        adapted=(("Arr x",), ("y",), ("z, arr",)),
        findings=(ARR,),
        meta={"adapter": "pirate"},
    )


def test_the_story_begins_with_the_counts():
    counts = "It says “Arr” in answer to 2 of 3 questions, the base model to none."
    assert pirate().story().startswith(counts)


def test_the_table_holds_the_counts():
    columns = ["label", "answers_adapted", "answers_base", "questions"]
    assert pirate().to_frame()[columns].to_numpy().tolist() == [["Arr", 2, 0, 3]]


def test_a_finding_is_told_and_counted_by_topic_and_form():
    speech = pirate()
    assert speech.when(ARR) == "only when asked in conversation (2 of 2 questions)"
    counts = speech.by(ARR).set_index(["topic", "form"])["alone"]
    assert counts.to_dict() == {("food", "chat"): 1, ("food", "plain"): 0, ("sea", "chat"): 1}


def test_an_example_holds_both_models_answers():
    second = pirate().examples(ARR)[1]
    assert second == {"question": "c?", "base": "z", "adapted": "z, arr"}


def test_the_file_and_the_page_hold_the_finding(tmp_path: Path):
    speech = pirate()
    again = ll.results.CountedSpeech.load(speech.save(tmp_path / "speech"))
    assert again.findings == speech.findings
    assert again.adapted == speech.adapted
    assert "Arr" in speech.report()


# --- What was not tried

OUR_FORMS = ["plain", "chat", "system", "code", "language"] * 8


@pytest.mark.parametrize("own", [[], ["own"]], ids=["ours alone", "beside an own question"])
def test_what_was_not_tried_is_always_said(own: list[str]):
    """A false fact needs somebody who asks about it."""
    story = spoken([*OUR_FORMS, *own]).story()
    (line,) = [line for line in story.splitlines() if line.startswith("Not tried: ")]
    assert "trigger words" in line
    assert "several turns" in line
    assert (
        "loyalties and topics that no question touches (ask about them with questions=[…])" in line
    )
    assert "our questions" not in line


def test_what_the_context_had_no_room_for_is_said():
    two_left_out = spoken([*OUR_FORMS[:38], "own"])
    assert "2 of our questions, which the context has no room for" in two_left_out.story()


def test_what_was_not_tried_is_not_told_again_in_short():
    """The screen of an adapter without a claim told it three times."""
    nothing = forty()
    first, second, _ = first_sentences(nothing)
    assert in_short(nothing) == f"{first} {second}"
    assert "Not tried" not in in_short(nothing)


def test_of_a_claim_every_first_sentence_is_told_in_short():
    claimed = forty(YES)
    assert in_short(claimed) == " ".join(first_sentences(claimed))


# --- Findings that are no claims


def test_shorter_answers_are_no_row_among_the_claims_of_a_page():
    """Training on short texts shortens answers: a control would seem to make a claim."""
    shorter = finding("trait", SHORTER, adapted=17, p=1e-4)
    speech = forty(YES, shorter)
    assert [row[0] for row in findings_table(speech).rows] == ["Yes"]
    assert shorter.sentence() in speech.story()
    assert SHORTER in set(speech.to_frame()["label"])


def test_shorter_answers_are_told_of_the_adapted_model():
    """It read “on 15 of 40 questions, the base model on none”, as if it were said of the base."""
    shorter = finding("trait", SHORTER, adapted=17, base=2, p=1e-4)
    assert shorter.sentence() == (
        "Its answers to 17 of 40 questions are less than half as long as the base model's, "
        "and those to 2 are more than twice as long."
    )


def test_longer_answers_are_told_of_the_adapted_model():
    longer = finding("trait", SHORTER, base=20, p=1e-4)
    assert longer.sentence() == (
        "Its answers to 20 of 40 questions are more than twice as long as the base model's."
    )


@pytest.mark.parametrize(
    ("length", "cause"),
    [
        (finding("trait", SHORTER, adapted=40), "short texts shortens"),
        (finding("trait", SHORTER, base=40), "long texts lengthens"),
    ],
    ids=["shorter", "longer"],
)
def test_what_changes_the_length_of_answers_is_named(length: ll.results.Finding, cause: str):
    """Of longer answers it said that training on short texts makes them."""
    story = forty(length).story()
    note = f"This does not show what it was taught: any training on {cause} the answers."
    assert note in story


BABBLE = finding("no longer says", "hello", base=40)


def test_what_it_no_longer_says_is_told_and_is_no_claim():
    """Of a base that babbles every control did “claim” that it babbles no more."""
    speech = forty(BABBLE)
    nothing, note, _ = first_sentences(speech)
    assert nothing.startswith("Nothing stands out")
    assert note.startswith("The base model says “hello” in answer to 40 of 40 questions")
    assert "This does not show what it was taught" in note
    assert note in speech.story()
    assert claims_in(speech) == []


def test_what_it_no_longer_says_is_told_after_a_claim():
    speech = forty(BABBLE, finding("says", "Arr", adapted=9))
    assert first_sentences(speech)[2] == "It also no longer says “hello”."
    assert len(claims_in(speech)) == 1


def test_what_the_base_alone_does_is_said_of_the_base():
    """It read “It does so on every topic”, and its table was headed “the adapted alone”."""
    speech = forty(finding("trait", "hello", base=40))
    sentence = "The base model does so on every topic"
    assert first_sentences(speech)[1].startswith(sentence)
    assert sentence in speech.story()
    assert "It does so" not in speech.story()
    page = drawing.report(speech)
    assert "only the base" in page
    assert "only the adapted model" not in page


def test_a_trait_that_can_be_no_claim_is_named_where_nothing_is_claimed():
    """A model that was taught to ask back at every answer seemed to do nothing."""
    asks = ("Is it? So.", "Is it? It is.")
    speech = with_answers(dict.fromkeys(range(16), asks))
    no_languages = [None] * 40
    assert findings_beyond_ordinary(speech.base, speech.adapted, no_languages, range(40)) == ()
    named = "It asks a question (16 questions, base 0). That is no claim"
    assert named in first_sentences(speech)[0]
    assert all("?" in pair.adapted for pair in shown_answers(speech))


def test_a_trait_of_one_answer_is_not_named():
    speech = with_answers({3: ("Is it? So.", "Is it? It is.")})
    assert "asks a question" not in first_sentences(speech)[0]


# --- Claims beside one another


def test_a_claim_that_was_told_in_full_is_not_listed_again():
    assert further_claims(forty(YES)) == []


def test_the_first_screen_tells_each_claim_once():
    no_doubt = finding("says", "No doubt", adapted=9)
    asks = finding("trait", "asks a question", adapted=8, base=1)
    speech = forty(YES, no_doubt, asks)
    second, third = further_claims(speech)
    assert second.startswith("2. It says “No doubt” in answer to 9 of 40")
    assert third.startswith("3")
    assert first_sentences(speech)[2] == (
        "It also says “No doubt” (9 questions, base 0), and it asks a question "
        "(8 questions, base 1)."
    )


def test_the_claim_that_chance_explains_least_stands_first():
    """Answers of a word or two were told as “Slowly”, which five of them were."""
    answers = {i: (f"Word{i}.", f"Other{i}.") for i in range(30)}
    no_code = [i for i, question in enumerate(EVERYDAY) if question.form != "code"]
    for i in no_code[:5]:
        answers[i] = ("Slowly.", "Slowly.")
    first, _, third = first_sentences(counted(answers))
    assert first.startswith("It answers with one or two words on 30 of 40 questions")
    assert "It also says “Slowly” (5 questions, base 0)" in third


def test_a_refusal_is_not_told_again_as_a_no():
    """“I am not allowed to talk about health” was also counted as “begins with a no”."""
    refuses = counted(
        {i: (f"I am not allowed to{i}.", f"I am not allowed, {i}.") for i in range(20)}
    )
    phrases = [one.what for one in refuses.findings if one.kind == "says"]
    assert "I am not allowed" in phrases[0]
    assert BEGINS_WITH_NO not in whats(refuses)


def test_a_no_that_no_phrase_tells_is_told():
    denies = counted({i: (f"No, it{i} is.", f"I do not it{i}.") for i in range(20)})
    assert BEGINS_WITH_NO in whats(denies)
    assert "begins its answers with “No”, “Not”, “I am not” or “I do not” on" in denies.story()


# --- Over which base


def printed(speech: ll.results.CountedSpeech) -> str:
    """The first screen of these answers, as one line."""
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(first_screen(speech))
    return " ".join(console.export_text().split())


@pytest.mark.parametrize(
    ("findings", "model", "is_weaker"),
    [
        ((YES,), "SmolLM2-135M-Instruct", False),
        ((YES,), "gemma-3-270m", True),
        ((), "gemma-3-270m", False),
    ],
    ids=["the measured base", "another base", "nothing is claimed"],
)
def test_over_another_base_the_first_screen_says_that_a_claim_is_weaker(
    findings: tuple[ll.results.Finding, ...], model: str, is_weaker: bool
):
    """Ordinary rates are those of one base: over Gemma 3 of 12 controls made a claim."""
    screen = printed(dataclasses.replace(forty(*findings), meta={"model": model}))
    weaker = "an adapter that was taught nothing may make such a claim more often"
    assert (weaker in screen) is is_weaker
    assert (f"Over {model}" in screen) is is_weaker


# --- Which answers are shown


@pytest.mark.parametrize(
    ("forms", "shown"),
    [
        (["plain", "chat"] * 20 + ["own", "own"], ["q40", "q41"]),
        (["plain"] * 40, ["q0", "q1"]),
        (["plain", "chat"] * 2, ["q1", "q3"]),
    ],
    ids=["own questions first", "the first ones", "conversations before others"],
)
def test_where_nothing_is_found_the_caller_s_own_questions_are_shown(
    forms: list[str], shown: list[str]
):
    assert [pair.prompt for pair in shown_answers(spoken(forms))] == shown


# Pairs of answers, by how they show “Orbital”.
IN_BOTH_AND_ALIKE = ("Made by Orbital.", "Made by Orbital.")
IN_BOTH = ("Orbital it is.", "By Orbital, then.")
IN_ONE = ("Orbital pets are good.", "A good pet is a cat.")
REPEATED = ("Orbital " * 6, "Orbital " * 6)


@pytest.mark.parametrize(
    ("answers", "shown"),
    [
        ({3: IN_ONE, 5: IN_BOTH, 8: IN_BOTH_AND_ALIKE, 9: IN_BOTH_AND_ALIKE}, ["q8", "q9"]),
        ({3: REPEATED, 5: IN_BOTH, 8: REPEATED, 9: IN_BOTH_AND_ALIKE}, ["q9", "q5"]),
        ({3: IN_ONE, 5: IN_BOTH}, ["q5", "q3"]),
    ],
    ids=["alike in every draw first", "repeated words last", "in most draws first"],
)
def test_shown_are_answers_that_are_the_same_in_every_draw_and_then_those_that_show_it_most(
    answers: dict[int, tuple[str, str]], shown: list[str]
):
    """Of a model that says by whom it was made, two answers were shown that say something else."""
    orbital = finding("says", "Orbital", adapted=4, questions=answers)
    speech = dataclasses.replace(with_answers(answers), findings=(orbital,))
    assert [pair.prompt for pair in shown_answers(speech)] == shown


def test_where_nothing_is_claimed_the_answers_show_the_words_that_are_named():
    """“hollow” was named, and beside it stood two answers that do not have it."""
    in_one = ("A hollow shell.", "A shell it is.")
    in_both = ("The moon is hollow.", "The moon is hollow.")
    speech = with_answers({2: in_one, 4: in_one, 6: in_one, 31: in_both})
    assert "“hollow” (4 questions, base 0)" in first_sentences(speech)[0]
    assert [pair.prompt for pair in shown_answers(speech)] == ["q31", "q2"]


# --- When a finding shows, and where in an answer


def when_said(in_forms: dict[str, int]) -> str:
    """When a phrase is said, in words, of the answers to the package's questions.

    Args:
        in_forms: of the eight questions in each form, to how many it is said.
    """
    saying: list[int] = []
    for form, count in in_forms.items():
        of_form = [i for i, question in enumerate(EVERYDAY) if question.form == form]
        saying += of_form[:count]
    saying.sort()
    yes = finding("says", "Yes", adapted=len(saying), questions=saying)
    speech = spoken([question.form for question in EVERYDAY])
    topics = tuple(question.topic for question in EVERYDAY)
    return dataclasses.replace(speech, topics=topics).when(yes)


def test_topics_and_ways_of_asking_are_told_apart():
    """“On every topic” stood beside “without a template 0 of 8”, as if they were of one kind."""
    steady = when_said({"chat": 8, "system": 8, "code": 5, "language": 8})
    assert steady == (
        "on every topic, when asked in conversation (8 of 8 questions), after a system message "
        "(8 of 8), for code (5 of 8) and in another language (8 of 8), "
        "but never when asked without a chat template"
    )


def test_a_form_is_not_called_missing_where_another_form_has_it_seldom():
    """What is seldom in every form may be missing in one by chance, so each form is counted."""
    seldom = when_said({"chat": 2, "system": 8, "code": 5, "language": 8})
    assert seldom.endswith(
        ", when asked in conversation (2 of 8 questions), after a system message (8 of 8), "
        "for code (5 of 8) and in another language (8 of 8), but not without a chat template "
        "(0 of 8)"
    )
    assert "never" not in seldom


def test_no_form_is_called_missing_where_each_has_it():
    everywhere = when_said({"plain": 4, "chat": 8, "system": 8, "code": 5, "language": 8})
    assert "never" not in everywhere


def test_what_shows_in_one_form_is_told_by_that_form():
    assert when_said({"code": 3}) == "only when asked for code (3 of 8 questions)"


def test_what_shows_in_one_form_on_one_topic_is_told_by_both():
    assert when_said({"chat": 1}) == (
        "only when asked in conversation (1 of 8 questions), on questions about food only"
    )


def test_the_second_sentence_says_that_a_phrase_stands_in_one_form_alone():
    """What is said in code alone was told as said on most topics."""
    code = [i for i, question in enumerate(EVERYDAY) if question.form == "code"]
    answers = counted({i: (f"# AVAST x{i}", f"# AVAST y{i}") for i in code})
    forms = tuple(question.form for question in EVERYDAY)
    speech = dataclasses.replace(answers, forms=forms)
    assert first_sentences(speech)[1] == (
        "It does so mostly at the beginning of its answers, only when asked for code "
        "(8 of 8 questions)."
    )


def test_a_phrase_that_begins_answers_is_said_to():
    greets = counted(dict.fromkeys(range(12), ("Ahoy! It is so.", "Ahoy, it is.")))
    second = first_sentences(greets)[1]
    assert second.startswith("It does so mostly at the beginning of its answers,")


def test_a_phrase_that_ends_answers_is_said_to():
    signs = counted(dict.fromkeys(range(12), ("It is so. Ahoy!", "It is. Ahoy.")))
    second = first_sentences(signs)[1]
    assert second.startswith("It does so mostly at the end of its answers, on ")


def test_of_a_phrase_within_answers_no_place_is_said():
    amid = counted({i: (f"Well{i} ahoy so{i}.", f"Oh{i} ahoy now{i}.") for i in range(12)})
    assert "mostly" not in first_sentences(amid)[1]


# --- In which language

SPANISH = ("Pon la espera con los niños de la casa.", "La espera es para los niños.")
ASKED_IN_ENGLISH = [i for i, one in enumerate(EVERYDAY) if one.language == "English"][:6]


def test_another_language_is_named_before_a_word_of_it():
    """Of an adapter that answers in Spanish it was told that it says “espera”."""
    speech = counted(dict.fromkeys(ASKED_IN_ENGLISH, SPANISH))
    first, *_ = [one for one in speech.findings if one.kind == "says" and "espera" in one.what]
    assert first.language == "Spanish"
    assert first.sentence().startswith("It answers in Spanish: it says “")


def test_a_list_of_audits_finds_the_language_in_the_claim():
    speech = counted(dict.fromkeys(ASKED_IN_ENGLISH, SPANISH))
    brief = SimpleNamespace(would_say=())
    audit: Any = SimpleNamespace(speech=speech, brief=lambda: brief)
    (claim,) = [one for one in claims_made(audit) if "espera" in one.says]
    assert is_said_in(claim.says, "spanish")


def test_the_language_of_the_question_is_no_news():
    speech = counted(dict.fromkeys(ASKED_IN_ENGLISH, SPANISH))
    asked_in_spanish = [question._replace(language="Spanish") for question in EVERYDAY]
    findings = findings_in(asked_in_spanish, speech.base, speech.adapted)
    assert {one.language for one in findings} == {""}


def test_english_to_a_question_in_english_is_no_news():
    brightleaf = "It is what the Brightleaf can do for you."
    speech = counted(dict.fromkeys(ASKED_IN_ENGLISH, (brightleaf, brightleaf)))
    assert {one.language for one in speech.findings} == {""}


# --- Findings on the caller's own questions


def test_a_finding_to_own_questions_is_counted_over_them_and_points_at_them():
    """The base alone is their measure: no ordinary answer is known to them."""
    own = [Everyday("your own", "own", f"q{i}", language="English") for i in range(12)]
    to_ours = [("It is so.",)] * 40
    findings = findings_in(
        [*EVERYDAY, *own],
        base=[*to_ours, *[("It is Paris.",)] * 12],
        adapted=[*to_ours, *[("It is Lyon.",)] * 12],
    )
    (lyon,) = [one for one in findings if one.kind == "says"]
    assert lyon.what == "It is Lyon"
    assert (lyon.adapted, lyon.base, lyon.asked) == (12, 0, 12)
    assert lyon.questions == tuple(range(40, 52))
