"""Answers of several tokens: teacher-forced, in every analysis, against token-by-token runs."""

from __future__ import annotations

import cases
import models
import pytest
import torch
from differences import largest_difference
from torch import Tensor

import lens_lora as ll
from lens_lora.responses.answers import margin_between

pytestmark = pytest.mark.usefixtures("float64")
DOC = torch.tensor([5, 9, 12])
PRE = torch.tensor([5, 7])
READOUTS = [ll.AnswerLogProb(DOC), ll.AnswerMargin(DOC, PRE)]


@pytest.fixture(params=models.MAKERS)
def lens(request) -> ll.LoraLens:
    return cases.case("llama", request.param, "raw").lens


def log_prob(lens: ll.LoraLens, prompt: Tensor, answer: Tensor, gates) -> Tensor:
    """The slow way: one sequence, the log-softmax at each of the answer's places."""
    tokens = torch.cat([prompt, answer])[None]
    logp = lens.logits(tokens, gates)[0].log_softmax(-1)
    return sum(logp[len(prompt) - 1 + j, a] for j, a in enumerate(answer.tolist()))


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0])
def test_ends_equal_teacher_forcing(lens: ll.LoraLens, scale: float):
    """Also in a padded batch, and with answers of each prompt's own."""
    tokens = models.tokens()
    prompts = ll.results.Prompts(tokens, torch.tensor([7, 4]))
    readout = ll.AnswerMargin([DOC, PRE], [PRE, torch.tensor([4])])
    curve = ll.remainder_curve(lens, prompts, readout, [scale or 1.0])
    found = curve.values[:, 0] if scale else curve.base
    for i, (doc, pre) in enumerate([(DOC, PRE), (PRE, torch.tensor([4]))]):
        prompt = tokens[i, : [7, 4][i]]
        expected = log_prob(lens, prompt, doc, scale) - log_prob(lens, prompt, pre, scale)
        assert (found[i] - expected).abs() < 1e-11


@pytest.mark.sample(1)
@pytest.mark.parametrize("readout", READOUTS, ids=["logprob", "margin"])
def test_first_order_and_its_parts(lens: ll.LoraLens, readout: ll.Readout):
    """Against differences; forward equals reverse; parts sum to sites; components multiply."""
    tokens = models.tokens()
    step = 1e-5
    whole = ll.first_order(lens, tokens, readout, at=0.3)
    up, down = (
        ll.remainder_curve(lens, tokens, readout, [s]).values[:, 0]
        for s in (0.3 + step, 0.3 - step)
    )
    assert largest_difference((up - down) / (2 * step), whole.total) < 1e-6
    size = whole.values.abs().max()
    for by in ((), ("position",), ("position", "head", "rank")):
        split = ll.first_order(lens, tokens[:, :3], readout, by=by)
        forward = ll.first_order(
            lens, tokens[:, :3], readout, by=by, mode="forward", progress=False
        )
        assert largest_difference(split.values, forward.values) < 1e-10 * size
    parts = ll.components(lens, tokens, readout, progress=False)
    base = ll.first_order(lens, tokens, readout)
    assert largest_difference(parts.first_order, base.values) < 1e-10 * size


def test_a_margin_of_single_tokens_is_the_margin(lens: ll.LoraLens):
    several = ll.first_order(lens, models.tokens(), ll.AnswerMargin(5, 9), by="position")
    one = ll.first_order(lens, models.tokens(), ll.Margin(5, 9), by="position")
    assert largest_difference(several.values, one.values) < 1e-12
    assert largest_difference(several.shift, one.shift) < 1e-12


def test_a_row_for_each_answer_or_one_for_both(lens: ll.LoraLens):
    """' 5 7' is read in the row of ' 5 9 12', which begins with 5; ' 8 7' has its own."""
    prompts = lens.prompts(models.tokens()[:1])
    one = ll.AnswerMargin(DOC, PRE).reading(lens.model, prompts)
    assert [int(n) - 7 for n in one.rows.lengths] == [2]
    two = ll.AnswerMargin(DOC, torch.tensor([8, 7])).reading(lens.model, prompts)
    assert [int(n) - 7 for n in two.rows.lengths] == [2, 1]
    assert two.tokens_of([["a", "b"], ["a", "c", "d"]]) == (("a", "b|c", "d"),)


def log_odds(lens: ll.LoraLens, prompt: Tensor, doc: Tensor, pre: Tensor, gates) -> Tensor:
    """log p(doc) − log p(pre), each of a sequence of its own."""
    return log_prob(lens, prompt, doc, gates) - log_prob(lens, prompt, pre, gates)


def test_fact_margin_of_answers(lens: ll.LoraLens):
    """The margin's ends are those of teacher forcing."""
    tokens = models.tokens()
    margin = ll.fact_margin(lens, tokens, DOC, PRE, progress=False)
    assert margin.attribution.units == "nats"
    for i, prompt in enumerate(tokens):
        assert (margin.m0[i] - log_odds(lens, prompt, DOC, PRE, 0)).abs() < 1e-11
        assert (margin.m[i] - log_odds(lens, prompt, DOC, PRE, 1)).abs() < 1e-11


def test_answers_flip_where_teacher_forcing_finds_them_equal(lens: ll.LoraLens):
    """On two prompts, on both of which the adapter turns these answers round."""
    tokens = models.tokens()
    doc = torch.tensor([51, 48])
    pre = torch.tensor([44, 23])
    margin = ll.fact_margin(lens, tokens, doc, pre, progress=False)
    assert margin.flips == (True, True)
    for prompt, scale in zip(tokens, margin.flip_scale.tolist(), strict=True):
        assert 0 < scale < 1
        assert log_odds(lens, prompt, doc, pre, scale).abs() < 1e-6


def test_several_tokens_choose_the_answer_margin(lens: ll.LoraLens):
    """Strings of several tokens; a word that lost its leading space is refused."""
    two = lens.prompts(models.tokens())
    one = two.row(0)
    assert isinstance(margin_between(lens.model, "w5 w6", "w7", one), ll.AnswerMargin)
    assert isinstance(margin_between(lens.model, "w5", 7, one), ll.Margin)
    assert isinstance(margin_between(lens.model, ["w5", 6], torch.tensor([7]), two), ll.Margin)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (torch.tensor([], dtype=torch.long), "has no token"),
        ("", "has no token"),
        (torch.tensor([5, 10**6]), "outside the"),
        ([DOC], "1 answers for 2 prompts"),
        ([DOC, 1.5], "neither a string nor token ids"),
    ],
)
def test_bad_answers(lens: ll.LoraLens, answer, words: str):
    with pytest.raises(ll.errors.TokenError, match=words):
        ll.first_order(lens, models.tokens(), ll.AnswerLogProb(answer))


def test_equal_answers_and_too_long_ones(lens: ll.LoraLens):
    with pytest.raises(ll.errors.TokenError, match="same tokens"):
        ll.first_order(lens, models.tokens(), ll.AnswerMargin(DOC, DOC))
    long = torch.full((lens.model.cfg.n_ctx,), 5)
    with pytest.raises(
        ll.errors.PromptError, match="prompt 0 of 2 .*with its answer has 38 tokens"
    ):
        ll.first_order(lens, models.tokens(), ll.AnswerLogProb(long))
