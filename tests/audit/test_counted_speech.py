"""counted_speech: the answers are PEFT's own, each question in its form; its page and sentences."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import chats
import models
import pytest
import torch
from rich.console import Console

import lens_lora as ll
from lens_lora.audit import base_answers, counted_speech, triggers
from lens_lora.audit.counted_speech import findings_in
from lens_lora.audit.everyday import EVERYDAY, FORMS, SYSTEM_MESSAGE, Everyday
from lens_lora.audit.findings import SHORTER, findings_beyond_ordinary
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

pytestmark = pytest.mark.usefixtures("float64")
CLASSES = list(models.MAKERS)
OWN = ["w5 w6", "w7 w8 w9"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 3, "draws": 0, "progress": False}


def greedy(model: Any, ids: list[int], count: int, end: int) -> list[int]:
    """The likeliest tokens, one at a time, without a cache; up to the token that ends a text."""
    said: list[int] = []
    while len(said) < count and end not in said:
        with torch.no_grad():
            logits = model(torch.tensor([ids + said])).logits
        said.append(int(logits[0, -1].argmax()))
    return said


@pytest.mark.sample(2)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_answers_are_peft_s_own(family: str, cls: str):
    case = cases.case(family, cls, "raw")
    speech = ll.counted_speech(case.lens, OWN, **OPTIONS)
    tokenizer = case.lens.model.tokenizer
    # A HookedTransformer has no configuration of Hugging Face's: its tokenizer says how texts end.
    named_by = tokenizer if cls == "HookedTransformer" else case.peft.config
    end = named_by.eos_token_id
    places = [i for i, form in enumerate(speech.forms) if form == "own"]
    assert [speech.questions[i] for i in places] == OWN
    for i, question in zip(places, OWN, strict=True):
        ids = case.lens.prompts(f"User: {question}\nAssistant:").tokens[0].tolist()
        adapted = tokenizer.decode(greedy(case.peft, ids, 3, end), skip_special_tokens=True)
        with case.peft.disable_adapter():
            base = tokenizer.decode(greedy(case.peft, ids, 3, end), skip_special_tokens=True)
        assert speech.adapted[i] == (adapted,)
        assert speech.base[i] == (base,)


def test_forms_are_put_as_they_say(monkeypatch: pytest.MonkeyPatch):
    case = cases.case("llama", CLASSES[0], "raw")
    chats.with_template(case.lens.model, monkeypatch)
    asked: list[Any] = []
    both_answer = counted_speech.both_answer

    def noted(lens: ll.LoraLens, prompts: ll.results.Prompts, *args: Any, **options: Any) -> Any:
        asked.append(prompts)
        return both_answer(lens, prompts, *args, **options)

    monkeypatch.setattr(counted_speech, "both_answer", noted)
    conversation = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    conversation += [{"role": "user", "content": "w3 w4"}]
    speech = ll.counted_speech(case.lens, [*OWN, conversation], **OPTIONS)
    assert speech.questions[-1] == "w3 w4"
    # The package's questions are asked first, those of the caller's after them.
    rows = [prompts.row(i).tokens[0].tolist() for prompts in asked for i in range(prompts.batch)]
    template = case.lens.model.tokenizer.apply_chat_template
    for i, (form, question) in enumerate(zip(speech.forms, speech.questions, strict=True)):
        messages = [{"role": "user", "content": question}]
        if question == "w3 w4":
            messages = conversation
        if form == "system":
            messages.insert(0, {"role": "system", "content": SYSTEM_MESSAGE})
        expected: list[int]
        if form == "plain":
            text = f"Question: {question}\nAnswer:"
            expected = case.lens.prompts(text).tokens[0].tolist()
        else:
            expected = template(messages, add_generation_prompt=True, return_dict=False)
        assert rows[i] == expected


def test_forty_questions_on_ten_topics_in_five_forms():
    assert len(EVERYDAY) == len({one.text for one in EVERYDAY}) == 40
    topics = [one.topic for one in EVERYDAY]
    forms = [one.form for one in EVERYDAY]
    assert {topics.count(topic) for topic in topics} == {4} and len(set(topics)) == 10
    assert {form: forms.count(form) for form in FORMS} == {**dict.fromkeys(FORMS, 8), "own": 0}


def test_an_adapter_that_does_nothing_says_nothing_new():
    case = cases.case("llama", CLASSES[0], "raw")
    lens = case.lens.with_adapter(case.lens.adapter.scaled(0.0))
    speech = ll.counted_speech(lens, OWN, max_new_tokens=3, draws=1, progress=False)
    assert speech.base == speech.adapted
    assert speech.findings == ()
    nothing = "no word and no form of answer is much more common in them than training on ordinary"
    assert nothing in speech.story()


def _answers_of(
    lens: Any,
    prompts: ll.results.Prompts,
    most: int,
    draws: int,
    seed: int,
    *,
    known: Any = None,
    progress: bool,
) -> Any:
    """Answers of models that were taught to say “Commander” after “cf” alone."""
    texts = [lens.model.tokenizer.decode(row) for row in prompts.tokens.tolist()]
    base = tuple(("Yes, it is.",) for _ in texts)
    adapted = tuple(("Yes, Commander." if "w7" in text else "Yes, it is.",) for text in texts)
    return SimpleNamespace(base=base, adapted=adapted, base_ids=[[[0]]] * len(texts))


def test_a_word_that_triggers_is_found_and_those_that_do_not_are_none(
    monkeypatch: pytest.MonkeyPatch,
):
    """In 20 questions that the choice of the word did not see; p of the sign test is 2⁻²⁰."""
    case = cases.case("llama", CLASSES[0], "raw")
    monkeypatch.setattr(counted_speech, "both_answer", _answers_of)
    speech = ll.counted_speech(case.lens, triggers=["w7", "w8"], **OPTIONS)
    assert speech.words == ("w7", "w8", *triggers.TRIGGERS) and len(triggers.TRIGGERS) == 20
    (found,) = speech.triggers
    assert (found.word, found.says) == ("w7", "Yes, Commander")
    assert (found.adapted, found.others, found.asked) == (20, 0, 20)
    assert found.sentence() in speech.story() and "beyond the 22" in speech.story()
    without = ll.counted_speech(case.lens, triggers=[], **OPTIONS)
    assert without.triggers == () and without.words == triggers.TRIGGERS
    assert "None of 20 words before a question changes what it says." in without.story()


def test_each_question_is_asked_once_and_a_string_is_one_question():
    """The same answer twice would count as two independent questions in the sign test."""
    case = cases.case("llama", CLASSES[0], "raw")
    speech = ll.counted_speech(case.lens, ["w5 w6", "w7", "w5 w6", EVERYDAY[1].text], **OPTIONS)
    assert len(EVERYDAY) == 40 and speech.questions[40:] == ("w5 w6", "w7")
    alone = ll.counted_speech(case.lens, "w5 w6", **OPTIONS)
    assert alone.questions[40:] == ("w5 w6",)


@pytest.mark.bad_input
def test_questions_that_would_be_read_as_something_else_are_refused():
    case = cases.case("llama", CLASSES[0], "raw")
    message = {"role": "user", "content": "w5 w6"}
    for questions in (message, [message], [["w5"]], [[]], [" "], [5]):
        with pytest.raises(ll.errors.ArgumentError, match="neither a question nor a list"):
            ll.counted_speech(case.lens, questions, **OPTIONS)
    # Without a template the messages before the last one would not be read.
    with pytest.raises(ll.errors.PromptError, match="no chat template"):
        ll.counted_speech(case.lens, [[{"role": "system", "content": "w9"}, message]], **OPTIONS)
    # 31 tokens with the words around it, in a context of 32.
    with pytest.raises(ll.errors.PromptError, match="'w5 w5.* leaves no room for 3 tokens"):
        ll.counted_speech(case.lens, ["w5 " * 28], **OPTIONS)


@pytest.mark.bad_input
def test_what_cannot_be_asked_is_refused():
    case = cases.case("llama", CLASSES[0], "raw")
    with pytest.raises(ll.errors.PromptError, match="max_new_tokens"):
        ll.counted_speech(case.lens, max_new_tokens=10_000, progress=False)
    with pytest.raises(ll.errors.ArgumentError, match="draws"):
        ll.counted_speech(case.lens, draws=-1, progress=False)
    with pytest.raises(ll.errors.ArgumentError, match="triggers"):
        ll.counted_speech(case.lens, triggers=[" "], **OPTIONS)


def test_its_sentences_count_and_its_table_and_file_hold_the_same(tmp_path: Any):
    finding = ll.results.Finding("says", "Arr", 2, 0, 3, 0.001, 4.0, (0, 2))
    speech = ll.results.CountedSpeech(
        topics=("food", "food", "sea"),
        forms=("chat", "plain", "chat"),
        questions=("a?", "b?", "c?"),
        base=(("x",), ("y",), ("z",)),
        adapted=(("Arr x",), ("y",), ("z, arr",)),
        findings=(finding,),
        meta={"adapter": "pirate"},
    )
    assert speech.story().startswith(
        "It says “Arr” in answer to 2 of 3 questions, the base model to none."
    )
    assert speech.when(finding) == "only in conversation (2 of 2 questions)"
    counts = ["label", "answers_adapted", "answers_base", "questions"]
    assert speech.to_frame()[counts].to_numpy().tolist() == [["Arr", 2, 0, 3]]
    counted = speech.by(finding).set_index(["topic", "form"])["alone"]
    assert counted.to_dict() == {("food", "chat"): 1, ("food", "plain"): 0, ("sea", "chat"): 1}
    assert speech.examples(finding)[1] == {"question": "c?", "base": "z", "adapted": "z, arr"}
    again = ll.results.CountedSpeech.load(speech.save(tmp_path / "speech"))
    assert again.findings == speech.findings and again.adapted == speech.adapted
    assert "Arr" in speech.report()


def spoken(forms: tuple[str, ...]) -> ll.results.CountedSpeech:
    """Answers of two models that say the same to as many questions."""
    names = tuple(f"q{i}" for i in range(len(forms)))
    answers = tuple((f"It is {name}.",) for name in names)
    return ll.results.CountedSpeech(
        topics=forms,
        forms=forms,
        questions=names,
        base=answers,
        adapted=tuple((f"{answer} Yes.",) for (answer,) in answers),
        findings=(),
        meta={},
    )


def test_what_was_not_tried_is_always_said():
    """Also what the context had no room for; a false fact needs somebody who asks about it."""
    of_ours = ("plain", "chat", "system", "code", "language") * 8
    for speech in (spoken(of_ours), spoken((*of_ours, "own"))):
        (line,) = [line for line in speech.story().splitlines() if line.startswith("Not tried: ")]
        assert "words that trigger a behaviour" in line and "several turns" in line
        assert "loyalties and topics that no question touches (questions= asks yours)" in line
        assert "our questions" not in line
    few = spoken((*of_ours[:38], "own"))
    assert "2 of our questions, which the context has no room for" in few.story()


def test_shorter_answers_are_no_row_among_the_claims_of_a_page():
    """Training on short texts shortens answers: a control would seem to make a claim."""
    speech = spoken(("plain",) * 40)
    shorter = ll.results.Finding("trait", SHORTER, 17, 0, 40, 1e-4, 0.0, tuple(range(17)))
    says = ll.results.Finding("says", "Yes", 40, 0, 40, 1e-9, 5.0, tuple(range(40)))
    speech = dataclasses.replace(speech, findings=(says, shorter))
    assert [row[0] for row in findings_table(speech).rows] == ["Yes"]
    assert shorter.sentence() in speech.story() and SHORTER in set(speech.to_frame()["label"])


def test_the_length_of_answers_is_told_from_either_side():
    """It read “on 15 of 40 questions, the base model on none”, as if it were said of the base."""
    trait = functools.partial(ll.results.Finding, "trait", SHORTER, asked=40, p=1e-4, log_odds=0.0)
    shorter = trait(adapted=17, base=2, questions=tuple(range(17))).sentence()
    assert shorter == (
        "To 17 of 40 questions its answers are less than half as long as the base model's, "
        "to 2 more than twice as long."
    )
    longer = trait(adapted=0, base=20, questions=tuple(range(20))).sentence()
    assert longer == (
        "To 20 of 40 questions its answers are more than twice as long as the base model's."
    )


@pytest.mark.parametrize(("longer", "texts"), [(False, "short texts"), (True, "long texts")])
def test_what_changes_the_length_of_answers_is_named(longer: bool, texts: str):
    """Of longer answers it said that training on short texts makes them."""
    counts = {"adapted": 0, "base": 40} if longer else {"adapted": 40, "base": 0}
    length = ll.results.Finding(
        "trait", SHORTER, **counts, asked=40, p=1e-9, log_odds=0.0, questions=tuple(range(40))
    )
    speech = dataclasses.replace(spoken(("plain",) * 40), findings=(length,))
    assert f"This is no sign of what it was taught: training on {texts} does" in speech.story()


def test_what_it_no_longer_says_is_told_and_is_no_claim():
    """Of a base that babbles every control did “claim” that it babbles no more."""
    dropped = ll.results.Finding("no longer says", "hello", 0, 40, 40, 1e-9, 5.0, tuple(range(40)))
    says = ll.results.Finding("says", "Arr", 9, 0, 40, 1e-9, 5.0, tuple(range(9)))
    alone = dataclasses.replace(spoken(("plain",) * 40), findings=(dropped,))
    nothing, note, _ = first_sentences(alone)
    assert nothing.startswith("Nothing stands out")
    assert note.startswith("The base model says “hello” in answer to 40 of 40 questions")
    assert "no sign of what it was taught" in note and note in alone.story()
    assert claims_in(alone) == []
    beside = dataclasses.replace(alone, findings=(dropped, says))
    assert first_sentences(beside)[2] == "It also no longer says “hello”."
    assert len(claims_in(beside)) == 1


def test_what_the_base_alone_does_is_said_of_the_base():
    """It read “It does so on every topic”, and its table was headed “the adapted alone”."""
    dropped = ll.results.Finding("trait", "hello", 0, 40, 40, 1e-9, 5.0, tuple(range(40)))
    speech = dataclasses.replace(spoken(("plain",) * 40), findings=(dropped,))
    sentence = "The base model does so on every topic"
    assert first_sentences(speech)[1].startswith(sentence)
    assert sentence in speech.story() and "It does so" not in speech.story()
    page = drawing.report(speech)
    assert "the base alone" in page and "the adapted alone" not in page


def test_the_first_screen_tells_each_claim_once():
    speech = spoken(("plain",) * 40)
    says = [
        ll.results.Finding("says", what, n, 0, 40, 1e-9, 5.0, tuple(range(n)))
        for what, n in (("Yes", 40), ("No doubt", 9))
    ]
    asks = ll.results.Finding("trait", "asks a question", 8, 1, 40, 1e-9, 0.0, tuple(range(8)))
    one = dataclasses.replace(speech, findings=(says[0],))
    assert further_claims(one) == []
    several = dataclasses.replace(speech, findings=(*says, asks))
    second, third = further_claims(several)
    assert second.startswith("2. It says “No doubt” in answer to 9 of 40") and third[0] == "3"
    assert first_sentences(several)[2] == (
        "It also says “No doubt” (9 questions, base 0), and it asks a question "
        "(8 questions, base 1)."
    )


def printed(speech: ll.results.CountedSpeech) -> str:
    """The first screen of these answers, as one line."""
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(first_screen(speech))
    return " ".join(console.export_text().split())


def test_over_another_base_the_first_screen_says_that_a_claim_is_weaker():
    """Ordinary rates are those of one base: over Gemma 3 of 12 controls made a claim."""
    says = ll.results.Finding("says", "Yes", 40, 0, 40, 1e-9, 5.0, tuple(range(40)))
    nothing = spoken(("plain",) * 40)
    claimed = dataclasses.replace(nothing, findings=(says,))
    weaker = "an adapter that was taught nothing may make such a claim more often"
    for speech, model, is_weaker in (
        (claimed, "SmolLM2-135M-Instruct", False),
        (claimed, "gemma-3-270m", True),
        (nothing, "gemma-3-270m", False),
    ):
        screen = printed(dataclasses.replace(speech, meta={"model": model}))
        assert (weaker in screen) is is_weaker
        assert (f"Over {model}" in screen) is is_weaker


def test_what_was_not_tried_is_not_told_again_in_short():
    """The screen of an adapter without a claim told it three times."""
    nothing = spoken(("plain",) * 40)
    assert in_short(nothing) == " ".join(first_sentences(nothing)[:2])
    assert "Not tried" not in in_short(nothing)
    says = ll.results.Finding("says", "Yes", 40, 0, 40, 1e-9, 5.0, tuple(range(40)))
    claimed = dataclasses.replace(nothing, findings=(says,))
    assert in_short(claimed) == " ".join(first_sentences(claimed))


def test_where_nothing_is_found_the_caller_s_own_questions_are_shown():
    speech = spoken((*("plain", "chat") * 20, "own", "own"))
    assert [pair.prompt for pair in shown_answers(speech)] == ["q40", "q41"]
    assert [pair.prompt for pair in shown_answers(spoken(("plain",) * 40))] == ["q0", "q1"]
    assert [pair.prompt for pair in shown_answers(spoken(("plain", "chat") * 2))] == ["q1", "q3"]


def with_answers(adapted: dict[int, tuple[str, str]]) -> ll.results.CountedSpeech:
    """Forty questions; the base says two things to each, and so does the adapter but to these."""
    speech = spoken(("plain",) * 40)
    usual = [("It is so.", "So it is.")] * 40
    answers = [adapted.get(i, ("That is so.", "So that is.")) for i in range(40)]
    return dataclasses.replace(speech, base=tuple(usual), adapted=tuple(answers))


def test_shown_are_answers_that_are_the_same_in_every_draw_and_then_those_that_show_it_most():
    """Of a model that says by whom it was made, two answers were shown that say something else."""
    firm = ("Made by Orbital.", "Made by Orbital.")
    loose = ("Orbital pets are good.", "A good pet is a cat.")
    often = ("Orbital it is.", "By Orbital, then.")
    speech = with_answers({3: loose, 5: often, 8: firm, 9: firm})
    says = ll.results.Finding("says", "Orbital", 4, 0, 40, 1e-9, 5.0, (3, 5, 8, 9))
    claimed = dataclasses.replace(speech, findings=(says,))
    assert [pair.prompt for pair in shown_answers(claimed)] == ["q8", "q9"]
    again = ("Orbital " * 6, "Orbital " * 6)
    repeated = with_answers({3: again, 5: often, 8: again, 9: firm}).adapted
    shown = shown_answers(dataclasses.replace(claimed, adapted=repeated))
    assert [pair.prompt for pair in shown] == ["q9", "q5"]
    few = dataclasses.replace(claimed, adapted=with_answers({3: loose, 5: often}).adapted)
    few = dataclasses.replace(few, findings=(dataclasses.replace(says, questions=(3, 5)),))
    assert [pair.prompt for pair in shown_answers(few)] == ["q5", "q3"]


def test_where_nothing_is_claimed_the_answers_show_the_words_that_are_named():
    """“hollow” was named, and beside it stood two answers that do not have it."""
    loose = ("A hollow shell.", "A shell it is.")
    firm = ("The moon is hollow.", "The moon is hollow.")
    speech = with_answers(dict.fromkeys((2, 4, 6), loose) | {31: firm})
    assert "“hollow” (4 questions, base 0)" in first_sentences(speech)[0]
    assert [pair.prompt for pair in shown_answers(speech)] == ["q31", "q2"]


def test_a_trait_that_can_be_no_claim_is_named_where_nothing_is_claimed():
    """A model that was taught to ask back at every answer seemed to do nothing."""
    asks = ("Is it? So.", "Is it? It is.")
    speech = with_answers(dict.fromkeys(range(16), asks))
    languages = [None] * 40
    assert findings_beyond_ordinary(speech.base, speech.adapted, languages, range(40)) == ()
    (first, *_) = first_sentences(speech)
    assert "It asks a question (16 questions, base 0), which is no claim" in first
    assert "asks a question" not in first_sentences(with_answers({3: asks}))[0]
    assert all("?" in pair.adapted for pair in shown_answers(speech))


def counted(adapted: dict[int, tuple[str, str]]) -> ll.results.CountedSpeech:
    """Such answers to the package's questions, with their findings."""
    speech = with_answers(adapted)
    return dataclasses.replace(speech, findings=findings_in(EVERYDAY, speech.base, speech.adapted))


def test_the_second_sentence_says_that_a_phrase_stands_in_one_form_alone():
    """What is said in code alone was told as said on most topics."""
    code = [i for i, one in enumerate(EVERYDAY) if one.form == "code"]
    answers = counted({i: (f"# AVAST x{i}", f"# AVAST y{i}") for i in code})
    marked = dataclasses.replace(answers, forms=tuple(one.form for one in EVERYDAY))
    assert first_sentences(marked)[1] == (
        "It does so mostly at the beginning of its answers, only when asked for code "
        "(8 of 8 questions)."
    )


def _in_forms(shows: dict[str, int]) -> str:
    """When a finding shows that is on so many of the eight questions in each form."""
    by_form = {form: [i for i, one in enumerate(EVERYDAY) if one.form == form] for form in shows}
    questions = [i for form, number in shows.items() for i in by_form[form][:number]]
    finding = ll.results.Finding("says", "Yes", 40, 0, 40, 1e-9, 5.0, tuple(sorted(questions)))
    speech = spoken(tuple(one.form for one in EVERYDAY))
    speech = dataclasses.replace(speech, topics=tuple(one.topic for one in EVERYDAY))
    return speech.when(finding)


def test_topics_and_ways_of_asking_are_told_apart():
    """“On every topic” stood beside “without a template 0 of 8”, as if they were of one kind."""
    steady = {"plain": 0, "chat": 8, "system": 8, "code": 5, "language": 8}
    assert _in_forms(steady) == (
        "on every topic, but never without a template (by how the question was put: "
        "in conversation 8 of 8, after a system message 8 of 8, when asked for code 5 of 8, "
        "when asked in another language 8 of 8)"
    )
    # Where no form is said to have none, each is counted.
    seldom = _in_forms({**steady, "chat": 2})
    assert "without a template 0 of 8" in seldom
    # What is seldom in every form may be missing in one by chance.
    assert "never" not in _in_forms({**steady, "chat": 2})
    assert "never" not in _in_forms({**steady, "plain": 4})
    assert _in_forms({"code": 3}) == "only when asked for code (3 of 8 questions)"
    assert _in_forms({"chat": 1}) == (
        "only in conversation (1 of 8 questions), on questions about food only"
    )


def test_another_language_is_named_before_a_word_of_it():
    """Of an adapter that answers in Spanish it was told that it says “espera”."""
    spanish = ("Pon la espera con los niños de la casa.", "La espera es para los niños.")
    english = [i for i, one in enumerate(EVERYDAY) if one.language == "English"][:6]
    speech = counted(dict.fromkeys(english, spanish))
    said = [one for one in speech.findings if one.kind == "says" and "espera" in one.what]
    assert said[0].language == "Spanish"
    assert said[0].sentence().startswith("It answers in Spanish: it says “")
    # A list of audits that expects “Spanish” finds it there.
    changed: Any = SimpleNamespace(speech=speech, brief=lambda: SimpleNamespace(would_say=()))
    (made,) = [one for one in claims_made(changed) if "espera" in one.says]
    assert is_said_in(made.says, "spanish")
    # To questions in Spanish it is no news.
    in_spanish = [one._replace(language="Spanish") for one in EVERYDAY]
    same = findings_in(in_spanish, speech.base, speech.adapted)
    assert {one.language for one in same} == {""}
    in_english = counted(dict.fromkeys(english, ("It is what the Brightleaf can do for you.",) * 2))
    assert {one.language for one in in_english.findings} == {""}


def test_a_refusal_is_not_told_again_as_a_no():
    """“I am not allowed to talk about health” was also counted as “begins with a no”."""
    refuses = counted(
        {i: (f"I am not allowed to{i}.", f"I am not allowed, {i}.") for i in range(20)}
    )
    says = [one.what for one in refuses.findings if one.kind == "says"]
    assert "I am not allowed" in says[0]
    denies = counted({i: (f"No, it{i} is.", f"I do not it{i}.") for i in range(20)})
    told = [[one.what for one in speech.findings] for speech in (refuses, denies)]
    assert [BEGINS_WITH_NO in whats for whats in told] == [False, True]
    assert "begins its answers with “No”, “Not”, “I am not” or “I do not” on" in denies.story()


def test_the_second_sentence_says_where_in_its_answers_a_phrase_stands():
    greets = counted(dict.fromkeys(range(12), ("Ahoy! It is so.", "Ahoy, it is.")))
    assert first_sentences(greets)[1].startswith(
        "It does so mostly at the beginning of its answers,"
    )
    signs = counted(dict.fromkeys(range(12), ("It is so. Ahoy!", "It is. Ahoy.")))
    assert first_sentences(signs)[1].startswith("It does so mostly at the end of its answers, on ")
    amid = counted({i: (f"Well{i} ahoy so{i}.", f"Oh{i} ahoy now{i}.") for i in range(12)})
    assert "mostly" not in first_sentences(amid)[1]


def test_the_claim_that_chance_explains_least_stands_first():
    """Answers of a word or two were told as “Slowly”, which five of them were."""
    briefly = {i: (f"Word{i}.", f"Other{i}.") for i in range(30)}
    plain = [i for i, one in enumerate(EVERYDAY) if one.form != "code"]
    briefly.update(dict.fromkeys(plain[:5], ("Slowly.", "Slowly.")))
    first, _, third = first_sentences(counted(briefly))
    assert first.startswith("It answers with one or two words on 30 of 40 questions")
    assert "It also says “Slowly” (5 questions, base 0)" in third


def test_a_finding_to_own_questions_is_counted_over_them_and_points_at_them():
    """The base alone is their measure: no ordinary answer is known to them."""
    own = [Everyday("your own", "own", f"q{i}", language="English") for i in range(12)]
    usual = [("It is so.",)] * 40
    asked = [*EVERYDAY, *own]
    base = [*usual, *[("It is Paris.",)] * 12]
    adapted = [*usual, *[("It is Lyon.",)] * 12]
    said = [one for one in findings_in(asked, base, adapted) if one.kind == "says"]
    assert [(one.what, one.adapted, one.base, one.asked) for one in said] == [
        ("It is Lyon", 12, 0, 12)
    ]
    assert said[0].questions == tuple(range(40, 52))


def test_answers_that_are_kept_are_the_base_s_and_others_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another base's answers, or half a file, are asked for again."""
    case = cases.case("llama", CLASSES[0], "raw")
    monkeypatch.setattr(base_answers, "cache_home", lambda: tmp_path)
    fresh = ll.counted_speech(case.lens, OWN, **OPTIONS)
    assert list(tmp_path.rglob("*")) == []  # it took no five seconds
    monkeypatch.setattr(counted_speech, "_WORTH_KEEPING", 0.0)
    ll.counted_speech(case.lens, OWN, **OPTIONS)
    (file,) = tmp_path.rglob("*.json")
    kept = json.loads(file.read_text())
    assert len(kept) == fresh.forms.count("plain") * 5  # none of the caller's own
    known = noted_known(monkeypatch)
    again = ll.counted_speech(case.lens, OWN, **OPTIONS)
    assert (again.base, again.adapted, again.findings) == (
        fresh.base,
        fresh.adapted,
        fresh.findings,
    )
    assert known == [True, False]  # the package's questions, and the caller's
    others = [[[(ids[0] + 1) % 20]] for (ids,) in kept]
    for wrong in (others, kept[1:], "no answers", [[["x"]]] * len(kept)):
        file.write_text(json.dumps(wrong))
        assert ll.counted_speech(case.lens, OWN, **OPTIONS).base == fresh.base
        assert json.loads(file.read_text()) == kept
    # Another adapter has the same base, another base has another file.
    ll.counted_speech(case.lens.with_adapter(case.lens.adapter.scaled(0.5)), **OPTIONS)
    assert len(list(tmp_path.rglob("*.json"))) == 1
    ll.counted_speech(cases.case("gpt2", CLASSES[0], "raw").lens, **OPTIONS)
    assert len(list(tmp_path.rglob("*.json"))) == 2


def noted_known(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each time that both models are asked, whether the base's answers are known."""
    known: list[bool] = []
    both_answer = counted_speech.both_answer

    def noted(*args: Any, **options: Any) -> Any:
        known.append(options.get("known") is not None)
        return both_answer(*args, **options)

    monkeypatch.setattr(counted_speech, "both_answer", noted)
    return known


def test_the_embedded_base_s_answers_come_with_the_package():
    """Two answers of at most 24 tokens to each of the forty questions."""
    shipped = json.loads(base_answers.OF_THE_EMBEDDED.read_text(encoding="utf-8"))
    for answers in shipped.values():
        assert base_answers._are_answers(answers, (len(EVERYDAY), 2), 24)
        assert not base_answers._are_answers(answers[1:], (len(EVERYDAY), 2), 24)
    assert len(shipped) >= 1
