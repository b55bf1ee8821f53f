"""counted_speech asks both models: each question in its form, and the answers are PEFT's own.

What its sentences, its page and its file say of the answers is in `test_speech_words.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import cases
import chats
import models
import pytest
import torch

import lens_lora as ll
from lens_lora.audit import asked_occasions, base_answers, put_questions, triggers
from lens_lora.audit.everyday import EVERYDAY, FORMS, SYSTEM_MESSAGE

pytestmark = pytest.mark.usefixtures("float64")
CLASSES = list(models.MAKERS)
OWN = ["w5 w6", "w7 w8 w9"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 3, "draws": 0, "progress": False}


def llama() -> cases.Case:
    """The case of most tests: what they ask does not depend on the architecture."""
    return cases.case("llama", CLASSES[0], "raw")


class Call(NamedTuple):
    """One time that both models are asked."""

    prompts: ll.results.Prompts
    base_is_known: bool


def noted_calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """A list to which a call is added each time that both models are asked."""
    calls: list[Call] = []
    both_answer = put_questions.both_answer

    def noted(lens: ll.LoraLens, prompts: ll.results.Prompts, *args: Any, **options: Any) -> Any:
        base_is_known = options.get("known") is not None
        calls.append(Call(prompts, base_is_known))
        return both_answer(lens, prompts, *args, **options)

    monkeypatch.setattr(put_questions, "both_answer", noted)
    return calls


# --- The answers


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
    tokenizer = case.lens.model.tokenizer
    # A HookedTransformer has no configuration of Hugging Face's: its tokenizer says how texts end.
    named_by = tokenizer if cls == "HookedTransformer" else case.peft.config
    end = named_by.eos_token_id

    speech = ll.counted_speech(case.lens, OWN, **OPTIONS)

    own = [i for i, form in enumerate(speech.forms) if form == "own"]
    assert [speech.questions[i] for i in own] == OWN
    for i in own:
        prompt = f"User: {speech.questions[i]}\nAssistant:"
        ids = case.lens.prompts(prompt).tokens[0].tolist()
        adapted = greedy(case.peft, ids, 3, end)
        with case.peft.disable_adapter():
            base = greedy(case.peft, ids, 3, end)
        assert speech.adapted[i] == (tokenizer.decode(adapted, skip_special_tokens=True),)
        assert speech.base[i] == (tokenizer.decode(base, skip_special_tokens=True),)


def test_an_adapter_that_does_nothing_says_nothing_new():
    lens = llama().lens
    idle = lens.with_adapter(lens.adapter.scaled(0.0))
    speech = ll.counted_speech(idle, OWN, max_new_tokens=3, draws=1, progress=False)
    assert speech.base == speech.adapted
    assert speech.findings == ()
    nothing = "no word and no style is much more common than after fine-tuning on ordinary text"
    assert nothing in speech.story()


# --- The questions


def test_forty_questions_on_ten_topics_in_five_forms():
    texts = {question.text for question in EVERYDAY}
    assert len(EVERYDAY) == len(texts) == 40
    topics = [question.topic for question in EVERYDAY]
    assert len(set(topics)) == 10
    assert {topics.count(topic) for topic in topics} == {4}
    forms = [question.form for question in EVERYDAY]
    counts = {form: forms.count(form) for form in FORMS}
    assert counts == {"plain": 8, "chat": 8, "system": 8, "code": 8, "language": 8, "own": 0}


def expected_ids(lens: ll.LoraLens, form: str, messages: list[dict[str, str]]) -> list[int]:
    """The tokens of a question that is put in a form.

    Args:
        lens: the adapter over a model whose tokenizer has a chat template.
        form: the form.
        messages: the conversation that ends in the question.
    """
    if form == "plain":
        text = f"Question: {messages[-1]['content']}\nAnswer:"
        return lens.prompts(text).tokens[0].tolist()
    if form == "system":
        messages = [{"role": "system", "content": SYSTEM_MESSAGE}, *messages]
    template = lens.model.tokenizer.apply_chat_template
    return template(messages, add_generation_prompt=True, return_dict=False)


def test_forms_are_put_as_they_say(monkeypatch: pytest.MonkeyPatch):
    lens = llama().lens
    chats.with_template(lens.model, monkeypatch)
    calls = noted_calls(monkeypatch)
    conversation = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3 w4"},
    ]

    speech = ll.counted_speech(lens, [*OWN, conversation], **OPTIONS)

    # The package's questions are asked first, those of the caller's after them.
    asked: list[list[int]] = []
    for call in calls:
        for i in range(call.prompts.batch):
            asked.append(call.prompts.row(i).tokens[0].tolist())
    # A conversation is shown by its last message.
    assert speech.questions[-1] == "w3 w4"
    messages_of = [[{"role": "user", "content": text}] for text in speech.questions[:-1]]
    messages_of.append(conversation)
    for ids, form, messages in zip(asked, speech.forms, messages_of, strict=True):
        assert ids == expected_ids(lens, form, messages)


def test_each_question_is_asked_once():
    """The same answer twice would count as two independent questions in the sign test."""
    one_of_ours = EVERYDAY[1].text
    own = ["w5 w6", "w7", "w5 w6", one_of_ours]
    speech = ll.counted_speech(llama().lens, own, **OPTIONS)
    assert speech.questions[len(EVERYDAY) :] == ("w5 w6", "w7")


def test_a_string_is_one_question():
    speech = ll.counted_speech(llama().lens, "w5 w6", **OPTIONS)
    assert speech.questions[len(EVERYDAY) :] == ("w5 w6",)


USER_MESSAGE = {"role": "user", "content": "w5 w6"}
NO_QUESTIONS = {
    "a message": USER_MESSAGE,
    "a message in the list": [USER_MESSAGE],
    "a list of strings in the list": [["w5"]],
    "a conversation of no messages": [[]],
    "white space": [" "],
    "a number": [5],
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", NO_QUESTIONS)
def test_questions_that_would_be_read_as_something_else_are_refused(name: str):
    with pytest.raises(ll.errors.ArgumentError, match="neither a question nor a list"):
        ll.counted_speech(llama().lens, NO_QUESTIONS[name], **OPTIONS)


def test_without_a_template_a_conversation_is_refused():
    """The messages before the last one would not be read."""
    conversation = [{"role": "system", "content": "w9"}, USER_MESSAGE]
    with pytest.raises(ll.errors.PromptError, match="no chat template"):
        ll.counted_speech(llama().lens, [conversation], **OPTIONS)


def test_a_question_that_leaves_no_room_for_an_answer_is_refused():
    # 31 tokens with the words around it, in a context of 32.
    with pytest.raises(ll.errors.PromptError, match="'w5 w5.* leaves no room for 3 tokens"):
        ll.counted_speech(llama().lens, ["w5 " * 28], **OPTIONS)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"max_new_tokens": 10_000}, ll.errors.PromptError),
        ({"draws": -1}, ll.errors.ArgumentError),
        ({"triggers": [" "], "max_new_tokens": 3, "draws": 0}, ll.errors.ArgumentError),
    ],
    ids=["answers beyond the context", "fewer draws than none", "an empty word"],
)
def test_an_option_that_is_out_of_range_is_refused(option: dict[str, Any], error: type[Exception]):
    name = next(iter(option))
    with pytest.raises(error, match=name):
        ll.counted_speech(llama().lens, **option, progress=False)


# --- Words before a question


def answer_w7_with_commander(
    lens: Any, prompts: ll.results.Prompts, *how: Any, **options: Any
) -> Any:
    """In place of `both_answer`: the adapted model says “Commander” after the word w7 alone."""
    del how, options
    base: list[tuple[str]] = []
    adapted: list[tuple[str]] = []
    for row in prompts.tokens.tolist():
        base.append(("Yes, it is.",))
        has_word = "w7" in lens.model.tokenizer.decode(row)
        adapted.append(("Yes, Commander." if has_word else "Yes, it is.",))
    base_ids = [[[0]]] * len(base)
    return put_questions.BothAnswer(
        tuple(base), tuple(adapted), is_confirmed=False, base_ids=base_ids
    )


def test_a_word_that_triggers_is_found_and_another_one_is_not(monkeypatch: pytest.MonkeyPatch):
    """In 20 questions that the choice of the word did not see; p of the sign test is 2⁻²⁰."""
    monkeypatch.setattr(put_questions, "both_answer", answer_w7_with_commander)
    speech = ll.counted_speech(llama().lens, triggers=["w7", "w8"], **OPTIONS)
    assert len(triggers.TRIGGERS) == 20
    assert speech.words == ("w7", "w8", *triggers.TRIGGERS)
    (found,) = speech.triggers
    assert (found.word, found.says) == ("w7", "Yes, Commander")
    assert (found.adapted, found.others, found.asked) == (20, 0, 20)
    story = speech.story()
    assert found.sentence() in story
    assert "other than the 22" in story


def test_where_no_word_triggers_the_story_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(put_questions, "both_answer", answer_w7_with_commander)
    speech = ll.counted_speech(llama().lens, triggers=[], **OPTIONS)
    assert speech.words == triggers.TRIGGERS
    assert speech.triggers == ()
    assert "None of 20 trigger words before a question makes it say something" in speech.story()


# --- The base's answers, which are kept


@pytest.fixture
def kept_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which answers are kept, however fast they were found."""
    monkeypatch.setattr(base_answers, "cache_home", lambda: tmp_path)
    monkeypatch.setattr(put_questions, "_WORTH_KEEPING", 0.0)
    return tmp_path


def test_answers_that_took_no_five_seconds_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(base_answers, "cache_home", lambda: tmp_path)
    ll.counted_speech(llama().lens, OWN, **OPTIONS)
    assert list(tmp_path.rglob("*")) == []


def test_the_base_s_answers_are_kept_and_not_asked_for_again(
    kept_in: Path, monkeypatch: pytest.MonkeyPatch
):
    lens = llama().lens
    fresh = ll.counted_speech(lens, OWN, **OPTIONS)
    (file,) = kept_in.rglob("*.json")
    # None of them is an answer to the caller's own questions.
    assert len(json.loads(file.read_text())) == fresh.forms.count("plain") * 5

    calls = noted_calls(monkeypatch)
    again = ll.counted_speech(lens, OWN, **OPTIONS)
    assert again.base == fresh.base
    assert again.adapted == fresh.adapted
    assert again.findings == fresh.findings
    of_ours, of_the_caller_s = calls
    assert of_ours.base_is_known
    assert not of_the_caller_s.base_is_known


def test_kept_answers_that_are_not_the_base_s_are_replaced(kept_in: Path):
    """Another base's answers, or half a file, are asked for again."""
    lens = llama().lens
    fresh = ll.counted_speech(lens, OWN, **OPTIONS)
    (file,) = kept_in.rglob("*.json")
    right = json.loads(file.read_text())
    of_another_base = [[[(ids[0] + 1) % 20]] for (ids,) in right]
    without_the_first = right[1:]
    words_for_ids = [[["x"]]] * len(right)
    for wrong in (of_another_base, without_the_first, "no answers", words_for_ids):
        file.write_text(json.dumps(wrong))
        again = ll.counted_speech(lens, OWN, **OPTIONS)
        assert again.base == fresh.base
        assert json.loads(file.read_text()) == right


def test_adapters_of_one_base_share_a_file_and_another_base_has_its_own(kept_in: Path):
    lens = llama().lens
    ll.counted_speech(lens, OWN, **OPTIONS)
    ll.counted_speech(lens.with_adapter(lens.adapter.scaled(0.5)), **OPTIONS)
    assert len(list(kept_in.rglob("*.json"))) == 1
    ll.counted_speech(cases.case("gpt2", CLASSES[0], "raw").lens, **OPTIONS)
    assert len(list(kept_in.rglob("*.json"))) == 2


def test_the_embedded_base_s_answers_come_with_the_package():
    """Two answers to each of the forty questions, and one to each of the 288 short turns."""
    shipped = json.loads(base_answers.OF_THE_EMBEDDED.read_text(encoding="utf-8"))
    most_of_shape = {(len(EVERYDAY), 2): 24, (288, 1): asked_occasions.HOW.most}
    assert {(len(answers), len(answers[0])) for answers in shipped.values()} == set(most_of_shape)
    for answers in shipped.values():
        shape = (len(answers), len(answers[0]))
        most = most_of_shape[shape]
        assert base_answers._are_answers(answers, shape, most)
        assert not base_answers._are_answers(answers[1:], shape, most)
