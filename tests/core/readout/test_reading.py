"""Copies of a reading are read together as each would be alone."""

from __future__ import annotations

import cases
import models
import pytest
import torch

import lens_lora as ll
from lens_lora.core.readout.reading import Reading

pytestmark = pytest.mark.usefixtures("float64")
PROMPTS = ["w5 w7 w8", "w9 w10 w11 w12 w13 w14"]
COPIES = 4


def by_place(logits: torch.Tensor) -> torch.Tensor:
    """Means the first row by its first token and the second by another."""
    return logits[torch.arange(2), torch.tensor([5, 9])] ** 2


READOUTS = [
    ll.Margin([5, 7], [9, 11]),
    ll.Logit("w5"),
    ll.LogProb(["w7", "w4"]),
    ll.AnswerMargin(["w5 w7", "w6"], "w8 w9 w10"),
    ll.AnswerLogProb("w5 w7"),
    ll.Readout.of(by_place, label="by place"),
]


def random_logits(lens: ll.LoraLens, reading: Reading, *copies: int) -> torch.Tensor:
    """[row, *copies, vocab], or [row, *copies, slot, vocab] of a response."""
    slots = () if reading.rows.reads is None else (reading.rows.slots,)
    return torch.randn(len(reading.owner), *copies, *slots, int(lens.model.cfg.d_vocab))


@pytest.mark.parametrize("readout", READOUTS, ids=lambda readout: type(readout).__name__)
def test_copies_are_read_as_each_alone(readout: ll.Readout):
    lens = cases.case("llama", list(models.MAKERS)[-1], "raw").lens
    reading = readout.reading(lens.model, lens.prompts(PROMPTS))
    rows = random_logits(lens, reading, COPIES)
    many = reading.repeat(COPIES)
    alone = torch.stack([reading.read(rows[:, copy]) for copy in range(COPIES)], 1)
    assert torch.allclose(many.read(rows.flatten(0, 1)).view(-1, COPIES), alone, rtol=1e-12)
    assert many.batch == reading.batch * COPIES
    assert len(alone.unique()) == alone.numel()
    by_prompt = many.by_prompt(rows.flatten(0, 1)).view(-1, *rows.shape[1:])
    assert torch.allclose(by_prompt, reading.by_prompt(rows), rtol=1e-12)


@pytest.mark.parametrize("readout", READOUTS[:-1], ids=lambda readout: type(readout).__name__)
def test_copies_are_read_in_one_call(readout: ll.Readout, monkeypatch: pytest.MonkeyPatch):
    lens = cases.case("llama", list(models.MAKERS)[-1], "raw").lens
    reading = readout.reading(lens.model, lens.prompts(PROMPTS))
    calls = []
    kind = type(reading.read)
    read = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda *given: calls.append(1) or read(*given))
    many = reading.repeat(COPIES)
    many.read(random_logits(lens, many))
    assert calls == [1]


MANY = ["w5 w7 w8", "w9 w10 w11 w12 w13 w14", "w5", "w9 w10", "w11 w12 w13"]


FOR_ALL = [ll.Margin(5, 9), ll.LogProb("w7"), ll.AnswerMargin("w5 w7", "w8 w9"), READOUTS[4]]


@pytest.mark.parametrize("readout", FOR_ALL, ids=lambda readout: type(readout).__name__)
@pytest.mark.parametrize("tokens", [1, 16, 30, 1000])
def test_groups_of_prompts_read_what_all_read(readout: ll.Readout, tokens: int):
    lens = cases.case("llama", list(models.MAKERS)[-1], "raw").lens
    reading = readout.reading(lens.model, lens.prompts(MANY))
    groups = reading.groups(tokens)
    logits = random_logits(lens, reading)
    rows = logits.split([len(group.owner) for group in groups])
    found = torch.cat([group.read(some) for group, some in zip(groups, rows, strict=True)])
    assert torch.allclose(found, reading.read(logits), rtol=1e-12)
    assert len(found.unique()) == len(MANY) == sum(group.batch for group in groups)
    for group in groups:
        fits = group.rows.tokens.numel() <= tokens or group.batch == 1
        assert fits and int(group.rows.lengths.max()) == group.rows.tokens.shape[1]
    assert (len(groups) == 1) == (tokens == 1000) and (tokens > 1 or len(groups) == len(MANY))


@pytest.mark.parametrize("readout", FOR_ALL, ids=lambda readout: type(readout).__name__)
@pytest.mark.parametrize("chosen", [[0], [4], [1, 3], [0, 2, 3, 4]], ids=str)
def test_some_prompts_read_what_they_read_among_all(readout: ll.Readout, chosen: list[int]):
    lens = cases.case("llama", list(models.MAKERS)[-1], "raw").lens
    reading = readout.reading(lens.model, lens.prompts(MANY))
    some, logits = reading.only(torch.tensor(chosen)), random_logits(lens, reading)
    kept = torch.tensor([owner in chosen for owner in reading.owner.tolist()])
    assert torch.allclose(some.read(logits[kept]), reading.read(logits)[chosen], rtol=1e-12)
    assert torch.equal(some.rows.lengths, reading.rows.lengths[kept])
    assert some.batch == len(chosen)


def test_a_function_of_ones_own_keeps_its_prompts_together():
    lens = cases.case("llama", list(models.MAKERS)[-1], "raw").lens
    reading = READOUTS[-1].reading(lens.model, lens.prompts(PROMPTS))
    assert reading.groups(1) == [reading]
    assert reading.only(torch.tensor([1])) is reading
