"""An answer has the tokens with which it follows that very prompt; what says nothing is refused."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import cases
import chats
import models
import pytest
import torch
from differences import largest_difference
from real import hugging_face, lens
from torch import Tensor

import lens_lora as ll
from lens_lora.core import Prompts, Source
from lens_lora.responses.answers import answer_ids, margin_between

FACT = "The capital is"
TURN = "The capital\n"


@functools.cache
def stub(make: Any) -> Any:
    tokenizer = make()
    return SimpleNamespace(
        cfg=SimpleNamespace(d_vocab=len(tokenizer), n_ctx=64), tokenizer=tokenizer
    )


PIECES = stub(chats.byte_pairs)
SPACED = stub(chats.spaced_pieces)


def said(model: Any, *texts: str) -> Prompts:
    """The texts as prompts of a model without a forward pass."""
    rows = [torch.tensor(model.tokenizer(text)["input_ids"]) for text in texts]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    sources = tuple(Source(text, "text without BOS") for text in texts)
    return Prompts(tokens, torch.tensor([len(row) for row in rows]), sources=sources)


def pieces_of(model: Any, answer: str, text: str) -> list[str]:
    (ids,) = answer_ids(model, answer, 1, (text,))
    return [model.tokenizer.decode([i]) for i in ids]


# --- which tokens


@pytest.mark.parametrize("model", [PIECES, SPACED], ids=["byte pairs", "spaced pieces"])
@pytest.mark.parametrize("text", [FACT, TURN])
@pytest.mark.parametrize("answer", [" Lyon", " Lyon and Lyon", "Lyon", "\nLyon"])
def test_a_response_row_is_the_whole_text(model, text, answer):
    """Prompt and answer are tokenised as one text, whatever the answer's tokens are by itself."""
    prompts = said(model, text)
    row = torch.tensor(answer_ids(model, answer, 1, prompts.texts)[0])
    whole = model.tokenizer(text + answer)["input_ids"]
    assert torch.cat([prompts.tokens[0], row]).tolist() == whole


def test_where_a_tokenizer_puts_a_space_before_every_text():
    """' Lyon' is one token after a word, though two by itself; every readout of one reads it."""
    (lyon,) = SPACED.tokenizer(FACT + " Lyon")["input_ids"][len(FACT) + 1 :]
    assert len(SPACED.tokenizer(" Lyon")["input_ids"]) == 2
    logits = torch.randn(1, len(SPACED.tokenizer), generator=models.seeded(0))
    for make in (ll.Logit, ll.LogProb, lambda t: ll.Margin(t, 3)):
        found = make(" Lyon").reading(SPACED, said(SPACED, FACT)).read(logits)
        assert torch.equal(found, make(lyon).reading(SPACED, said(SPACED, FACT)).read(logits))
    with pytest.raises(ll.errors.TokenError, match="is 2 tokens"):
        ll.Logit(" Lyon").reading(SPACED, Prompts(torch.tensor([[5]]), torch.tensor([1])))


def test_after_ids_an_answer_is_tokenised_alone():
    ids = Prompts(
        torch.tensor([PIECES.tokenizer(FACT)["input_ids"]]), torch.tensor([len(FACT) - 1])
    )
    assert ids.texts == (None,)
    assert answer_ids(PIECES, "Lyon", 1, ids.texts) == answer_ids(PIECES, "Lyon", 1)
    assert pieces_of(PIECES, "Lyon", TURN) == ["L", "yon"]


@pytest.mark.parametrize(
    "make", [ll.Logit, ll.AnswerLogProb, ll.KL, lambda a: ll.AnswerMargin(3, a)]
)
@pytest.mark.parametrize("text, answer", [("The capital is ", "Lyon"), ("The L", "yon")])
def test_what_cannot_follow_is_refused(make, text, answer):
    """A space at the prompt's end belongs to the answer's token; 'L' and 'yon' join."""
    words = f"'{answer}' cannot follow a prompt that ends in '{text}'.*leading space.*token ids"
    with pytest.raises(ll.errors.TokenError, match=words):
        make(answer).reading(PIECES, said(PIECES, text))


# --- the space


def test_space_after_a_word_and_none_after_a_template():
    """'Lyon' for ' Lyon' is a slip after a word; where a turn begins it is the answer."""
    assert isinstance(margin_between(PIECES, " Lyon", " Paris", said(PIECES, FACT)), ll.Margin)
    with pytest.raises(
        ll.errors.TokenError, match=r"'Lyon' is 2 tokens \['L', 'yon'\], and ' Lyon' is one"
    ):
        margin_between(PIECES, "Lyon", "Paris", said(PIECES, FACT))
    free = margin_between(PIECES, "Lyon", "Paris", said(PIECES, TURN))
    assert isinstance(free, ll.AnswerMargin)
    assert isinstance(margin_between(PIECES, " Lyon", " Paris", said(PIECES, TURN)), ll.Margin)
    by_ids = [said(PIECES, text) for text in (FACT, TURN)]
    after_word, after_turn = (Prompts(p.tokens, p.lengths) for p in by_ids)
    assert isinstance(margin_between(PIECES, "Lyon", "Paris", after_turn), ll.AnswerMargin)
    with pytest.raises(ll.errors.TokenError, match="' Lyon' is one token"):
        margin_between(PIECES, "Lyon", "Paris", after_word)


def test_each_prompt_of_a_batch_decides_for_itself():
    both = said(SPACED, FACT, TURN)
    found = answer_ids(SPACED, " Lyon", 2, both.texts)
    assert found == [answer_ids(SPACED, " Lyon", 1, (text,))[0] for text in (FACT, TURN)]
    with pytest.raises(ll.errors.TokenError, match="' Lyon' is one token"):
        margin_between(PIECES, "Lyon", "Paris", said(PIECES, TURN, FACT))


# --- what says nothing, or is too long


@pytest.fixture(params=models.MAKERS)
def never_run(request, monkeypatch) -> ll.LoraLens:
    found = cases.case("llama", request.param, "raw").lens

    def forward(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(found.model, "forward", forward)
    return found


CALLS = {
    "log p": lambda lens, response: ll.first_order(lens, "w7 w8", ll.AnswerLogProb(response)),
    "KL": lambda lens, response: ll.path_attribution(lens, "w7 w8", ll.KL(response)),
    "margin": lambda lens, response: ll.patch_sites(
        lens, "w7 w8", ll.AnswerMargin(torch.tensor([5, 6]), response), "add_one"
    ),
    "token_shifts": lambda lens, response: ll.token_shifts(lens, "w7 w8", response),
    "activations": lambda lens, response: ll.lora_activations(lens, "w7 w8", response),
}
NOTHING: dict[str, tuple[str | Tensor, type[Exception], str]] = {
    "empty": ("", ll.errors.TokenError, "has no token"),
    "white space": ("  ", ll.errors.TokenError, "has no token"),
    "no ids": (torch.tensor([], dtype=torch.long), ll.errors.TokenError, "has no token"),
    "special": (
        "<eos>",
        ll.errors.TokenError,
        r"to the prompt is \['<eos>'\], special tokens only",
    ),
    "specials": (
        " <eos> <bos>",
        ll.errors.TokenError,
        r"\['<eos>', '<bos>'\], special tokens only",
    ),
    "special ids": (torch.tensor([1, 1]), ll.errors.TokenError, "special tokens only.*use Logit"),
    "too long": (
        " w5" * 31,
        ll.errors.PromptError,
        "with its answer has 3[34] tokens, and .* holds 32",
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("response, error, message", NOTHING.values(), ids=NOTHING)
def test_refused_before_the_model_runs(never_run, call, response, error, message):
    with pytest.raises(error, match=message):
        call(never_run, response)


def test_a_finished_response_keeps_its_end(never_run):
    """EOS after words is content; EOS alone is read by Logit."""
    prompts = never_run.prompts("w7 w8")
    reading = ll.AnswerLogProb(" w5 <eos>").reading(never_run.model, prompts)
    assert reading.read.tokens.tolist() == [5, 1]
    ll.Logit("<eos>").reading(never_run.model, prompts)


# --- the real one


@pytest.mark.real
@pytest.mark.parametrize("kind", models.MAKERS)
def test_a_real_answer_in_a_conversation(kind: str):
    """Σ log p of the words after the template, against Hugging Face on the whole text."""
    hf, tokenizer = hugging_face()
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    whole = tokenizer(text + "The capital is Paris.", add_special_tokens=False)["input_ids"]
    start = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logp = hf(torch.tensor([whole])).logits[0].log_softmax(-1)
    places = range(start - 1, len(whole) - 1)
    expected = sum(float(logp[place, whole[place + 1]]) for place in places)
    answer = ll.AnswerLogProb("The capital is Paris.")
    curve = ll.remainder_curve(lens(kind), messages, answer, [1.0])
    assert abs(float(curve.base) - expected) < 1e-2
    seen = ll.lora_activations(
        lens(kind), messages, "The capital is Paris.", sites="blocks.0.attn.q"
    )
    assert list(seen.str_tokens[0]) == [tokenizer.decode([i]) for i in whole]
    assert int(seen.starts) == start


def test_what_a_model_said_may_be_its_end_alone():
    """The distribution from which an immediate EOS was chosen; the same ids by hand are refused."""
    lens = cases.case("llama", list(models.MAKERS)[0], "raw").lens
    prompts = lens.prompts(["w7 w8", "w5"])
    said = ll.results.Generated(
        (torch.tensor([1]), torch.tensor([6, 1])), ("", "w6"), prompts, (True, True)
    )
    shifts = ll.token_shifts(lens, prompts, said)
    assert shifts.response == (("<eos>",), ("w6", "<eos>"))
    alone = ll.first_order(lens, "w7 w8", ll.LogProb("<eos>"))
    for readout in (ll.AnswerLogProb(said), ll.KL(said)):
        ll.path_attribution(lens, prompts, readout, progress=False)
    by_token = ll.first_order(lens, prompts, ll.AnswerLogProb(said), by="token", progress=False)
    assert largest_difference(by_token.values[0, :, 0], alone.values[0]) < 1e-5
    assert float(shifts.total[0]) == pytest.approx(float(alone.shift[0]), abs=1e-5)
    with pytest.raises(ll.errors.TokenError, match="special tokens only"):
        ll.token_shifts(lens, prompts, list(said.ids))
