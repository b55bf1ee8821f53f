"""raised_words: the words that rise in several of their forms, and none that stands alone."""

from __future__ import annotations

import pytest
import torch

from lens_lora.audit.raised import raised_sentence, raised_words


def words_of(rises: dict[str, float]) -> tuple[str, ...]:
    """The words that are named where each of these tokens rises by so much, in logits."""
    shift = torch.tensor(list(rises.values()))
    return raised_words(shift, list(rises))


def test_a_word_is_named_by_its_most_raised_form_in_lower_case():
    rises = {
        " Regulation": 3.0,
        " regulation": 2.9,
        " regulators": 2.0,
        " harm": 1.0,
        "harmed": 0.9,
    }
    assert words_of(rises) == ("regulation", "harm")


def test_words_come_in_the_order_of_their_most_raised_forms():
    rises = {" pain": 1.0, " cruel": 3.0, "cruelty": 0.5, " painful": 2.0}
    assert words_of(rises) == ("cruel", "painful")
    assert words_of({**rises, " cruel": 1.5}) == ("painful", "cruel")


@pytest.mark.parametrize(
    "rises",
    [
        {" Intf": 3.0, " glimp": 2.0, "MetaInfo": 1.0},
        {" the": 3.0, " The": 2.0},
        {" (": 3.0, "(": 2.0, " 12": 2.0, "12": 1.0},
        {" ox": 3.0, "ox": 2.0},
        {" harm": 0.0, "harmed": 0.0},
        {" harm": 1.0, " harmony's": 1.0},
    ],
    ids=["tokens alone", "function words", "no words", "two letters", "no rise", "no one word"],
)
def test_what_stands_alone_or_is_no_word_is_not_named(rises: dict[str, float]):
    assert words_of(rises) == ()


def test_words_of_three_letters_are_one_stem_only_if_alike():
    """“bad” begins “badge” as well, and would join any words that it begins."""
    assert words_of({" bad": 3.0, " badge": 2.0}) == ()
    assert words_of({" bad": 3.0, " Bad": 2.0}) == ("bad",)


def test_only_the_most_raised_tokens_are_read():
    rises = {f"{i}": 100.0 - i for i in range(50)}
    assert words_of({**rises, " harm": 1.0, "harm": 0.9}) == ()
    assert words_of({" harm": 101.0, "harm": 100.5, **rises}) == ("harm",)


def test_the_sentence_says_that_it_does_not_say_what_was_taught():
    assert raised_sentence(()) == ""
    sentence = raised_sentence(("regulation", "worse"))
    assert "“regulation”, “worse”" in sentence and "do not show what it was taught" in sentence
