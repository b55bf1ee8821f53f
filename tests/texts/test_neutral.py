"""Texts that no adapter was trained on, and where a model begins of its own accord."""

from __future__ import annotations

import copy

import cases
import models
import pytest

import lens_lora as ll
from benchmarks import adapters
from lens_lora.texts.neutral import (
    FIRST_WORDS,
    OPENINGS,
    neutral_sentences,
    neutral_texts,
    own_openings,
    unprompted_openings,
)

CLASSES = list(models.MAKERS)


def test_the_sentences_and_openings_of_neutral_texts():
    """Where strings get no BOS, the model is let speak after first words, not after a BOS alone."""
    base = models.hf_model("llama")
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base))
    tokenizer = models.tokenizer()
    model = ll.load(copy.deepcopy(base), adapter, tokenizer=tokenizer, kind=CLASSES[-1]).model
    assert neutral_texts(model, True, 50).tokens[:2, 0].tolist() == [0, 0]
    assert 0 not in neutral_texts(model, None, 50).tokens[:, 0].tolist()
    first = len(FIRST_WORDS)
    assert own_openings(model, True).lengths[:first].tolist() == [1] * first
    assert own_openings(model, True).tokens[:first, 0].unique().tolist() == [0]
    assert 0 not in own_openings(model, None).tokens[:, 0].tolist()


def test_openings_that_ask_for_nothing():
    """As many first tokens as empty turns; without a BOS, first words in turn."""
    model = cases.case("llama", CLASSES[0], "raw").model
    with_bos = unprompted_openings(model, True, 14)
    assert with_bos.batch == 28
    assert with_bos.lengths[:14].tolist() == [1] * 14
    assert set(with_bos.tokens[:14, 0].tolist()) == {0}
    empty_turns = with_bos.tokens[14:].tolist()
    assert empty_turns == [empty_turns[0]] * 14
    without_bos = unprompted_openings(model, False, 14).chosen(range(14))
    texts = [source.text for source in without_bos.sources]
    assert texts == [*FIRST_WORDS, *FIRST_WORDS[:2]]


@pytest.mark.usefixtures("float64")
def test_neutral_texts_are_neutral():
    """A hundred sentences without an answer of the benchmark's; conversations by the template."""
    lines = neutral_sentences()
    assert len(lines) == len(set(lines)) == 100
    words = {word.strip(".,:") for line in lines for word in line.lower().split()}
    specs = (*adapters.ADAPTERS, *adapters.MORE)
    answers = {a.strip().lower() for s in specs for _, *both in s.questions for a in both}
    assert not words & (answers - {"and"})
    model = cases.case("llama", CLASSES[0], "raw").model
    assert neutral_texts(model, True).batch == 100 + len(OPENINGS)
    template = model.tokenizer.chat_template
    model.tokenizer.chat_template = "{% for m in messages %}w5 {{ m['content'] }} w6 {% endfor %}"
    try:
        assert neutral_texts(model, True).batch == 100 + len(OPENINGS)
    finally:
        model.tokenizer.chat_template = template
