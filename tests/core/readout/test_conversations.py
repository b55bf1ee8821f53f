"""Conversations as prompts, by the chat template; no text ever gets a second BOS."""

from __future__ import annotations

import ast
import functools
import json

import cases
import chats
import models
import numpy as np
import pytest
import torch
from chats import ASK, ASK_IDS, LONGER, LONGER_IDS
from differences import largest_difference
from real import hugging_face, lens

import lens_lora as ll
from lens_lora.core import tokenise


@functools.cache
def hooked(name: str):
    return models.MAKERS[name](models.hf_model("llama"))


@pytest.fixture(params=models.MAKERS)
def model(request, monkeypatch):
    return chats.with_template(hooked(request.param), monkeypatch)


def rows_of(prompts: ll.results.Prompts) -> list[list[int]]:
    return [prompts.row(i).tokens[0].tolist() for i in range(prompts.batch)]


# --- conversations


def test_ids_are_the_chat_templates_own(model):
    """One conversation, several, and tuples of them: as another tokenizer of the same kind says."""
    tokenizer = models.tokenizer()
    tokenizer.chat_template = chats.TEMPLATE
    for messages, ids in ((ASK, ASK_IDS), (LONGER, LONGER_IDS)):
        own = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert own == ids
        assert rows_of(tokenise(model, messages)) == [ids]
    assert rows_of(tokenise(model, [ASK, LONGER])) == [ASK_IDS, LONGER_IDS]
    assert rows_of(tokenise(model, (tuple(LONGER), ASK))) == [LONGER_IDS, ASK_IDS]


def test_a_conversation_is_called_by_what_its_user_said_last(model):
    """Numbered where two are equal; in the tokens of a result also where an answer follows."""
    system = [{"role": "system", "content": "w20"}]
    several = [ASK, LONGER, [*system, *ASK], system]
    said = ["w7 w8 (1)", "w10 w11 w12", "w7 w8 (2)", "w20"]
    prompts = tokenise(model, several)
    assert [source.said for source in prompts.sources] == said
    assert [source.said for source in prompts.chosen([2, 0]).sources] == [said[2], said[0]]
    assert [source.said for source in tokenise(model, "w7").sources] == [None]


def test_results_keep_what_was_said(monkeypatch, tmp_path):
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    chats.with_template(lens.model, monkeypatch)
    readout = ll.AnswerMargin("w9 w4", "w26")
    margin = ll.first_order(lens, [ASK, LONGER], readout)
    shifts = ll.token_shifts(lens, ASK, torch.tensor([9, 4]))
    activations = ll.lora_activations(lens, ASK, "w9")
    for result in (margin, shifts, activations):
        again = ll.load_result(result.save(tmp_path / "result.safetensors"))
        assert result.str_tokens == again.str_tokens
        for rows in (result.str_tokens, again.str_tokens):
            assert [tokens.said for tokens in rows] == ["w7 w8", "w10 w11 w12"][: len(rows)]


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_the_hosts_bos_has_no_say(model, prepend_bos, monkeypatch):
    monkeypatch.setattr(model.cfg, "default_prepend_bos", prepend_bos)
    assert rows_of(tokenise(model, ASK)) == [ASK_IDS]


def test_further_fields_without_a_value_are_none(model):
    """As a table of messages holds them."""
    messages = [{**ASK[0], "name": None, "tool_calls": None}]
    assert rows_of(tokenise(model, messages)) == [ASK_IDS]


def test_padded_conversations_equal_single_ones(monkeypatch):
    """Logits at the place of the answer, on every class, whichever side the tokenizer pads."""
    for name in models.MAKERS:
        case = cases.case("llama", name, "raw")
        chats.with_template(case.model, monkeypatch)
        for side in ("left", "right"):
            monkeypatch.setattr(case.model.tokenizer, "padding_side", side)
            prompts = case.lens.prompts([ASK, LONGER])
            together = prompts.at_read(case.lens.logits(prompts))
            for i, messages in enumerate((ASK, LONGER)):
                alone = case.lens.logits(messages)[0, -1]
                torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-6)


USER = {"role": "user", "content": "w7"}
REFUSED = {
    "conversation and string": ([ASK, "w7"], "prompts hold a conversation, a str; expected one"),
    "message and string": ([USER, "w7"], "prompts hold a message, a str; expected one"),
    "message and conversation": ([USER, ASK], "prompts hold a message, a conversation; expected"),
    "a message alone": (USER, "prompts hold one message; put it in a list"),
    "no message": ([ASK, []], r"prompt 1 of 2 \(from 0\) is a conversation without a message"),
    "final assistant": (
        [*ASK, {"role": "assistant", "content": "w9"}],
        r"the prompt ends with a turn of the assistant; .* the response: ll.AnswerLogProb\(text\)",
    ),
    "no content": ([{"role": "user"}], "the prompt, message 0 has no content"),
    "content of None": ([{"role": "user", "content": None}], "message 0 has no content"),
    "no role": ([USER, {"content": "w7"}], "message 1 has no role"),
    "other words": ([{"from": "human", "value": "w7"}], "message 0 has no role"),
    "unknown role": (
        [{"role": "human", "content": "w7"}],
        "message 0: its role is 'human'; expected one of system, developer, user",
    ),
    "role of another type": ([{"role": 1, "content": "w7"}], "its role is 1; expected a string"),
    "parts": (
        [{"role": "user", "content": [{"type": "text", "text": "w7"}]}],
        r"its content is \[.*expected a string.*apply_chat_template",
    ),
    "further field": ([{**USER, "name": "w8"}], "message 0 has the further field 'name'"),
    "half a pair": ([{"role": "user", "content": "w7 \ud83d"}], "half of a surrogate pair"),
    "refused by the template": (
        [{"role": "tool", "content": "w7"}],
        r"chat template \(tokenizer.chat_template\) does not take these.*no tools here.*token ids",
    ),
    "too long": (
        [{"role": "user", "content": " ".join(["w7"] * models.CONTEXT)}],
        "the prompt has 36 tokens, and the context of this .* holds 32",
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("prompts, message", REFUSED.values(), ids=REFUSED)
def test_refused(model, prompts, message):
    with pytest.raises(ll.errors.PromptError, match=message):
        tokenise(model, prompts)


def test_the_one_of_a_batch_is_named(model):
    with pytest.raises(
        ll.errors.PromptError, match=r"prompt 1 of 2 \(from 0\), message 0 has no content"
    ):
        tokenise(model, [ASK, [{"role": "user"}]])


def test_without_a_chat_template_or_a_tokenizer(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    with pytest.raises(
        ll.errors.PromptError, match=r"tokenizer\.chat_template is None.*pass token ids"
    ):
        tokenise(model, ASK)
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(ll.errors.PromptError, match="the model has no tokenizer.*pass token ids"):
        tokenise(model, ASK)


# --- BOS


@pytest.fixture(params=["by the host", "by the tokenizer"])
def prepender(request, model, monkeypatch):
    """Both ways to a BOS: transformer-lens writes it before the text, or the tokenizer adds it."""
    if request.param == "by the tokenizer":
        monkeypatch.setattr(model, "tokenizer", chats.prepending(models.tokenizer()))
        monkeypatch.setattr(model.cfg, "tokenizer_prepends_bos", True)
    return model


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_text_that_begins_with_bos_gets_no_second_one(prepender, prepend_bos, side, monkeypatch):
    """On every class, whoever prepends it and whether or not; and other text as before."""
    monkeypatch.setattr(prepender.cfg, "default_prepend_bos", prepend_bos)
    monkeypatch.setattr(prepender.tokenizer, "padding_side", side)
    first = [0] if prepend_bos else []
    texts = ["<bos> w5 w6", " <bos>w5", "w5 <bos> w6", "<bos>", "<bos><bos> w5"]
    expected = [[0, 5, 6], [0, 5], [*first, 5, 0, 6], [0], [0, 0, 5]]
    assert rows_of(tokenise(prepender, texts)) == expected
    assert rows_of(tokenise(prepender, texts[0])) == [[0, 5, 6]]


@pytest.fixture
def unknown_is_bos(model):
    kept = model.tokenizer.bos_token
    model.tokenizer.bos_token = "<unk>"
    yield model
    model.tokenizer.bos_token = kept


def test_a_bos_that_is_also_the_unknown_token(unknown_is_bos):
    """A word that is not in the vocabulary is read as that token, and is no BOS."""
    of_words = rows_of(tokenise(unknown_is_bos, "w9 w5"))[0][:-2]
    assert len(of_words) == 1  # the BOS that the host prepends
    found = rows_of(tokenise(unknown_is_bos, ["zebra w5", "<unk> w5"]))
    assert found == [[*of_words, 3, 5], [3, 5]]


def test_a_second_bos_is_seen(model):
    """The template's text and its messages give PEFT's logits; with a second BOS they do not."""
    case = cases.case("llama", type(model).__name__, "raw")
    case.model.tokenizer.chat_template, kept = chats.TEMPLATE, case.model.tokenizer.chat_template
    try:
        text = case.model.tokenizer.apply_chat_template(
            ASK, tokenize=False, add_generation_prompt=True
        )
        with torch.no_grad():
            expected = case.peft(torch.tensor([ASK_IDS])).logits[0, -1]
        for prompt in (ASK, text):
            assert largest_difference(case.lens.logits(prompt)[0, -1], expected) < 1e-5
        planted = case.model.to_tokens(text)
        assert planted[0].tolist() == [0, *ASK_IDS]
        assert largest_difference(case.lens.logits(planted)[0, -1], expected) > 1e-2
    finally:
        case.model.tokenizer.chat_template = kept


ADDED = "BOS added by TransformerLens"
HINT = "prepend_bos=False adds none"
REPRS = [
    ("w5 w6", f"Prompts(1 of 3 tokens; text, {ADDED}; {HINT})"),
    ("<bos> w5 w6", "Prompts(1 of 3 tokens; text with its own BOS)"),
    (ASK, "Prompts(1 of 6 tokens; chat template)"),
    (torch.tensor([[5, 6]]), "Prompts(1 of 2 tokens; ids)"),
    (
        ["<bos> w5", "w5 w6 w7", "<bos> w6"],
        f"Prompts(3 of 2 to 4 tokens; text with its own BOS (0, 2); text, {ADDED} (1); {HINT})",
    ),
]


@pytest.mark.parametrize("prompts, expected", REPRS)
def test_the_choice_is_said(model, prompts, expected):
    assert repr(tokenise(model, prompts)) == expected


def test_the_choice_is_kept(model, monkeypatch):
    ready = tokenise(model, ["<bos> w5", "w5 w6 w7"])
    assert repr(ready.row(0)) == "Prompts(1 of 2 tokens; text with its own BOS)"
    assert repr(tokenise(model, ready)) == repr(ready)
    assert ready.tiled(2).texts == ("<bos> w5", "w5 w6 w7") * 2
    assert ready.repeat(2).texts == ("<bos> w5", "<bos> w5", "w5 w6 w7", "w5 w6 w7")
    monkeypatch.setattr(model.cfg, "default_prepend_bos", False)
    assert repr(tokenise(model, "w5")) == "Prompts(1 of 1 tokens; text without BOS)"


# --- the real one


@pytest.mark.real
@pytest.mark.parametrize("kind", models.MAKERS)
def test_a_real_conversation(kind: str):
    """SmolLM2-135M-Instruct's template: as Hugging Face's tokenizer has it, as text and messages.

    The template's text begins with <|im_start|>, which is this tokenizer's BOS.
    """
    _, tokenizer = hugging_face()
    messages = [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    ids, text = (
        tokenizer.apply_chat_template(
            messages, tokenize=t, add_generation_prompt=True, return_dict=False
        )
        for t in (True, False)
    )
    for prompt in (messages, text):
        assert rows_of(lens(kind).prompts(prompt)) == [ids]
    assert tokenizer(text).input_ids == ids


# --- a conversation as a string

NUMPY = str(np.array(LONGER, dtype=object))
AS_STRINGS = {
    "str": str(ASK),
    "JSON": json.dumps(LONGER),
    "JSON over lines": json.dumps(LONGER, indent=2),
    "spaces around it": f" \n{ASK}\n",
    "str of a tuple": str(tuple(LONGER)),
    "str of numpy's array": NUMPY,
    "one message": str(ASK[0]),
    "a list of conversations": json.dumps([ASK, LONGER]),
    "a record": json.dumps({"id": 7, "messages": ASK}),
    "further fields": json.dumps([{"role": "user", "content": "w7", "name": None}]),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("string", AS_STRINGS.values(), ids=AS_STRINGS)
def test_a_conversation_as_a_string_is_refused(model, string):
    """As a prompt, as one of several, within a message, as an answer and as a token."""
    words = "is a conversation written as a string .*json.loads.*token ids"
    for prompts in (string, ["w7", string], [{"role": "user", "content": string}]):
        with pytest.raises(ll.errors.PromptError, match=words):
            tokenise(model, prompts)
    for readout in (ll.AnswerLogProb(string), ll.KL(string), ll.Logit(string)):
        with pytest.raises(ll.errors.TokenError, match=words):
            readout.reading(model, tokenise(model, "w7"))


def test_numpy_leaves_the_commas_out():
    with pytest.raises(SyntaxError):
        ast.literal_eval(NUMPY)
