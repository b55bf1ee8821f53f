"""Readouts: the number they name, of the tokens they name, or an error that shows the tokens."""

from __future__ import annotations

from types import SimpleNamespace

import chats
import models
import pytest
import torch

import lens_lora as ll
from lens_lora.core import Tokens
from lens_lora.errors import TokenError

BATCH = 3
IDS = [5, 60, 7]


BPE_TOKENIZER = chats.byte_pairs()
WORDS = SimpleNamespace(cfg=SimpleNamespace(d_vocab=models.VOCAB), tokenizer=models.tokenizer())
PIECES = SimpleNamespace(cfg=SimpleNamespace(d_vocab=len(BPE_TOKENIZER)), tokenizer=BPE_TOKENIZER)
BARE = SimpleNamespace(cfg=SimpleNamespace(d_vocab=models.VOCAB), tokenizer=None)


@pytest.fixture
def logits() -> torch.Tensor:
    """Large enough that a log-probability taken without care overflows."""
    generator = models.seeded(0)
    return 300 * torch.randn(BATCH, models.VOCAB, generator=generator, dtype=torch.float64)


# --- values

FORMS = {
    "string": ("w7", [7] * BATCH),
    "id": (7, [7] * BATCH),
    "first id": (0, [0] * BATCH),
    "last id": (60, [60] * BATCH),
    "string per prompt": (["w5", "w60", "w7"], IDS),
    "id per prompt": (tuple(IDS), IDS),
    "either per prompt": (["w5", 60, "w7"], IDS),
    "tensor": (torch.tensor(IDS), IDS),
    "scalar tensor": (torch.tensor(7), [7] * BATCH),
    "special token": ("<eos>", [1] * BATCH),
    "the unknown token itself": ("<unk>", [3] * BATCH),
}
OTHER = [8, 9, 10]


@pytest.mark.parametrize("token, ids", FORMS.values(), ids=FORMS)
def test_values(token, ids, logits):
    """Logit is an entry, Margin a difference, LogProb an entry of log_softmax, in every form."""
    rows = range(BATCH)
    picked = torch.stack([logits[r, ids[r]] for r in rows])
    other = torch.stack([logits[r, OTHER[r]] for r in rows])
    logp = torch.stack([logits.log_softmax(-1)[r, ids[r]] for r in rows])
    assert torch.equal(ll.Logit(token).of_logits(WORDS, BATCH)(logits), picked)
    assert torch.equal(ll.Margin(token, OTHER).of_logits(WORDS, BATCH)(logits), picked - other)
    assert torch.equal(ll.Margin(OTHER, token).of_logits(WORDS, BATCH)(logits), other - picked)
    torch.testing.assert_close(
        ll.LogProb(token).of_logits(WORDS, BATCH)(logits), logp, rtol=1e-12, atol=1e-12
    )
    assert Tokens(WORDS).one_each(token, BATCH).tolist() == ids


@pytest.mark.parametrize("readout", [ll.Logit(7), ll.Margin(7, 8), ll.LogProb(7)])
def test_each_row_alone_and_differentiable(readout, logits):
    """A row's number depends on that row's logits alone, with the derivative by hand."""
    logits.requires_grad_()
    values = readout.of_logits(WORDS, BATCH)(logits)
    assert values.shape == (BATCH,)
    (grad,) = torch.autograd.grad(values[1], logits)
    expected = torch.zeros_like(logits)
    expected[1, 7] = 1
    if isinstance(readout, ll.Margin):
        expected[1, 8] = -1
    if isinstance(readout, ll.LogProb):
        expected[1] -= logits[1].softmax(-1).detach()
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


def test_only_logit_depends_on_a_common_constant(logits):
    """Centring the unembedding adds a constant to all logits: margins and log p do not see it."""
    for readout in (ll.Margin(7, 8), ll.LogProb(7)):
        g = readout.of_logits(WORDS, BATCH)
        torch.testing.assert_close(g(logits + 10), g(logits), rtol=1e-12, atol=1e-10)
    g = ll.Logit(7).of_logits(WORDS, BATCH)
    torch.testing.assert_close(g(logits + 10), g(logits) + 10)


def test_any_callable(logits):
    def entropy(x):
        return -(x.softmax(-1) * x.log_softmax(-1)).sum(-1)

    readout = ll.Readout.of(entropy)
    assert torch.equal(readout.of_logits(WORDS, BATCH)(logits), entropy(logits))
    assert readout.label == "entropy"
    assert ll.Readout.of(entropy, "H").label == "H"
    assert ll.Readout.of(torch.nn.Identity()).label == "readout"


@pytest.mark.parametrize("name", models.MAKERS)
def test_on_a_model(name):
    """A readout bound to a hooked model looks tokens up in its tokenizer and vocabulary."""
    model = models.MAKERS[name](models.hf_model("llama"))
    logits = model(models.tokens())[:, -1]
    margin = ll.Margin("w5", ["w6", 7]).of_logits(model, 2)
    assert torch.equal(margin(logits), logits[:, 5] - torch.stack([logits[0, 6], logits[1, 7]]))
    with pytest.raises(TokenError, match="token id 61 is outside the vocabulary of 61"):
        ll.Logit(61).of_logits(model, 2)


# --- labels

LABELS = [
    (ll.Logit(" Paris"), "logit(' Paris')", "logits"),
    (ll.Logit(7), "logit(7)", "logits"),
    (ll.Logit([7, 8]), "logit([7, 8])", "logits"),
    (ll.Margin(" Lyon", " Paris"), "margin(' Lyon' − ' Paris')", "logits"),
    (ll.Margin(torch.tensor([1]), 8), "margin(1 − 8)", "logits"),
    (
        ll.Margin([" Lyon", " Rome", " Bonn"], [" a"] * 3),
        "margin([' Lyon', ' Rome', …] − ' a')",
        "logits",
    ),
    (ll.LogProb(" Paris"), "log p(' Paris')", "nats"),
    (
        ll.AnswerLogProb([" an answer of so many words", " yes"]),
        "log p([' an answer of so man…', ' yes'])",
        "nats",
    ),
    (ll.AnswerLogProb([torch.tensor([1, 2]), torch.tensor([3])]), "log p(per prompt)", "nats"),
    (ll.Readout.of(len, "size"), "size", "units of the readout"),
]


@pytest.mark.parametrize("readout, label, units", LABELS)
def test_labels_and_units(readout, label, units):
    assert (readout.label, readout.units) == (label, units)


# --- tokens of several pieces


def test_byte_pair_tokens():
    """The tokenizer of these tests behaves as told: a leading space makes one token."""
    assert [len(BPE_TOKENIZER(t)["input_ids"]) for t in (" Paris", "Paris", " London")] == [1, 2, 6]
    (paris,) = BPE_TOKENIZER(" Paris")["input_ids"]
    assert Tokens(PIECES).one_each([" Paris", paris], 2).tolist() == [paris, paris]


SEVERAL = {
    "one with a space": ("Paris", ["'Paris' is 2 tokens ['P', 'aris']", "' Paris' is one token"]),
    "one with one space": ("  Paris", ["is 2 tokens [' ', ' Paris']", "' Paris' is one token"]),
    "several either way": ("London", ["'London' is 6 tokens ['L', 'o', 'n', 'd'", "AnswerMargin"]),
    "two words": (" Paris Lyon", ["is 2 tokens [' Paris', ' Lyon']", "AnswerMargin"]),
    "nothing": ("", ["'' holds no token"]),
}


@pytest.mark.parametrize("token, needles", SEVERAL.values(), ids=SEVERAL)
@pytest.mark.parametrize("make", [ll.Logit, ll.LogProb, lambda t: ll.Margin(t, 5)])
def test_several_tokens_are_refused(make, token, needles):
    """With the pieces, and the variant with a leading space where that is one token."""
    with pytest.raises(TokenError) as caught:
        make(token).of_logits(PIECES, 1)
    message = str(caught.value)
    assert all(needle in message for needle in needles), message
    assert ("is one token" in message) == ("Paris" in token and "Lyon" not in token)


# --- other refusals

REFUSED = {
    "above": (WORDS, 61, "token id 61 is outside the vocabulary of 61 tokens"),
    "below": (WORDS, -1, "token id -1 is outside the vocabulary of 61"),
    "one of several above": (WORDS, [5, 99, 7], "token id 99 is outside"),
    "too few": (WORDS, [5, 6], "2 tokens for 3 prompts; pass one, or one per prompt"),
    "too many": (WORDS, ["w5"] * 4, "4 tokens for 3 prompts"),
    "too few in a tensor": (WORDS, torch.tensor([5]), "1 tokens for 3 prompts"),
    "none": (WORDS, [], "0 tokens for 3 prompts"),
    "not in the vocabulary": (WORDS, "Paris", "'Paris' is not in the vocabulary.*'<unk>'"),
    "no tokenizer": (BARE, "w5", "no tokenizer to look up 'w5'; pass ids"),
    "float": (
        WORDS,
        torch.tensor([5.0, 6.0, 7.0]),
        "token ids must be integers, not torch.float32",
    ),
    "two axes": (WORDS, torch.ones(3, 1).int(), r"\[1\] is neither a token string nor an id"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("model, token, message", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("make", [ll.Logit, ll.LogProb, lambda t: ll.Margin(5, t)])
def test_refused(make, model, token, message):
    with pytest.raises(TokenError, match=message) as caught:
        make(token).of_logits(model, BATCH)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, ll.errors.LensLoraError)


def test_tokenizer_larger_than_the_model():
    """A word of the tokenizer that the model's vocabulary lacks is named with its id."""
    small = SimpleNamespace(cfg=SimpleNamespace(d_vocab=50), tokenizer=WORDS.tokenizer)
    assert Tokens(small).one_each("w49", 1).tolist() == [49]
    with pytest.raises(
        TokenError, match="'w50' is token id 50, which is outside the vocabulary of 50"
    ):
        Tokens(small).one_each("w50", 1)


def test_ids_need_no_tokenizer():
    assert Tokens(BARE).one_each([5, 6], 2).tolist() == [5, 6]


@pytest.mark.parametrize("doc, pre", [("w5", "w5"), ("w5", 5), (["w4", "w5", "w6"], [7, 5, 8])])
def test_margin_of_a_token_with_itself(doc, pre):
    """Zero whatever the model does, so it is refused, even where only one prompt has it."""
    with pytest.raises(TokenError, match="doc and pre are the same token.*zero whatever"):
        ll.Margin(doc, pre).of_logits(WORDS, BATCH)
