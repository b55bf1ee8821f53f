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
    """Reads the first row at one token and the second at another."""
    rows = torch.arange(2)
    tokens = torch.tensor([5, 9])
    return logits[rows, tokens] ** 2


def name_of(readout: ll.Readout) -> str:
    return type(readout).__name__


BY_PLACE = ll.Readout.of(by_place, label="by place")
# Those that read all copies in one call.
BATCHED = [
    ll.Margin([5, 7], [9, 11]),
    ll.Logit("w5"),
    ll.LogProb(["w7", "w4"]),
    ll.AnswerMargin(["w5 w7", "w6"], "w8 w9 w10"),
    ll.AnswerLogProb("w5 w7"),
]


@pytest.fixture
def lens() -> ll.LoraLens:
    return cases.case("llama", list(models.MAKERS)[-1], "raw").lens


def random_logits(lens: ll.LoraLens, reading: Reading, *copies: int) -> torch.Tensor:
    """[row, *copies, vocab], or [row, *copies, slot, vocab] of a response."""
    rows = len(reading.owner)
    slots = () if reading.rows.reads is None else (reading.rows.slots,)
    return torch.randn(rows, *copies, *slots, int(lens.model.cfg.d_vocab))


@pytest.mark.parametrize("readout", [*BATCHED, BY_PLACE], ids=name_of)
def test_copies_are_read_as_each_alone(readout: ll.Readout, lens: ll.LoraLens):
    reading = readout.reading(lens.model, lens.prompts(PROMPTS))
    logits = random_logits(lens, reading, COPIES)
    rows = logits.flatten(0, 1)
    repeated = reading.repeat(COPIES)
    assert repeated.batch == reading.batch * COPIES

    alone = torch.stack([reading.read(logits[:, copy]) for copy in range(COPIES)], 1)
    assert len(alone.unique()) == alone.numel()
    together = repeated.read(rows).view(-1, COPIES)
    assert torch.allclose(together, alone, rtol=1e-12)

    by_prompt = repeated.by_prompt(rows).view(-1, *logits.shape[1:])
    assert torch.allclose(by_prompt, reading.by_prompt(logits), rtol=1e-12)


@pytest.mark.parametrize("readout", BATCHED, ids=name_of)
def test_copies_are_read_in_one_call(
    readout: ll.Readout, lens: ll.LoraLens, monkeypatch: pytest.MonkeyPatch
):
    reading = readout.reading(lens.model, lens.prompts(PROMPTS))
    calls = 0
    kind = type(reading.read)
    read = kind.__call__

    def counted(*given: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return read(*given)

    monkeypatch.setattr(kind, "__call__", counted)
    repeated = reading.repeat(COPIES)
    repeated.read(random_logits(lens, repeated))
    assert calls == 1


MANY = ["w5 w7 w8", "w9 w10 w11 w12 w13 w14", "w5", "w9 w10", "w11 w12 w13"]


# Readouts of the same tokens for every prompt.
FOR_ALL = [
    ll.Margin(5, 9),
    ll.LogProb("w7"),
    ll.AnswerMargin("w5 w7", "w8 w9"),
    ll.AnswerLogProb("w5 w7"),
]


@pytest.mark.parametrize("readout", FOR_ALL, ids=name_of)
@pytest.mark.parametrize("tokens", [1, 16, 30, 1000])
def test_groups_of_prompts_read_what_all_read(readout: ll.Readout, tokens: int, lens: ll.LoraLens):
    reading = readout.reading(lens.model, lens.prompts(MANY))
    groups = reading.groups(tokens)
    assert sum(group.batch for group in groups) == len(MANY)
    if tokens == 1:
        assert len(groups) == len(MANY)
    assert (len(groups) == 1) == (tokens == 1000)
    for group in groups:
        assert group.rows.tokens.numel() <= tokens or group.batch == 1
        # No padding beyond the longest row of the group.
        assert int(group.rows.lengths.max()) == group.rows.tokens.shape[1]

    logits = random_logits(lens, reading)
    logits_of_groups = logits.split([len(group.owner) for group in groups])
    pairs = zip(groups, logits_of_groups, strict=True)
    found = torch.cat([group.read(of_group) for group, of_group in pairs])
    assert len(found.unique()) == len(MANY)
    assert torch.allclose(found, reading.read(logits), rtol=1e-12)


@pytest.mark.parametrize("readout", FOR_ALL, ids=name_of)
@pytest.mark.parametrize("chosen", [[0], [4], [1, 3], [0, 2, 3, 4]], ids=str)
def test_some_prompts_read_what_they_read_among_all(
    readout: ll.Readout, chosen: list[int], lens: ll.LoraLens
):
    reading = readout.reading(lens.model, lens.prompts(MANY))
    some = reading.only(torch.tensor(chosen))
    logits = random_logits(lens, reading)
    is_chosen = torch.tensor([owner in chosen for owner in reading.owner.tolist()])
    assert some.batch == len(chosen)
    assert torch.equal(some.rows.lengths, reading.rows.lengths[is_chosen])
    found = some.read(logits[is_chosen])
    assert torch.allclose(found, reading.read(logits)[chosen], rtol=1e-12)


def test_a_function_of_ones_own_keeps_its_prompts_together(lens: ll.LoraLens):
    reading = BY_PLACE.reading(lens.model, lens.prompts(PROMPTS))
    assert reading.groups(1) == [reading]
    assert reading.only(torch.tensor([1])) is reading
