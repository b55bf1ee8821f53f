"""Words that set answers apart together, against every swap of the models' answers."""

from __future__ import annotations

import itertools

import pytest

from lens_lora.audit import together, triggers
from lens_lora.audit.counted_speech import _triggered
from lens_lora.audit.findings import LEVEL, findings_of, leads_of

HERE = {"puedes": {0, 1, 2, 3}, "la": {2, 3, 4, 5, 6}, "una": {4, 5, 8}, "la sal": {4, 5}, "x": {7}}
THERE = {"la": {7, 8}, "una": {2}, "casa": {0, 3}, "the": {0, 1, 2, 3, 4, 5, 6}}


def share_of_swaps(units: list[int]) -> float:
    """The p by all swaps, a word and a question at a time: written out, with sets alone."""
    words = ["puedes", "la", "una", "casa"]

    def largest(swapped: set[int]) -> int:
        leads: list[int] = []
        for word in words:
            lead = 0
            for unit in sorted(set(units)):
                questions = {i for i in range(len(units)) if units[i] == unit}
                more = len(HERE.get(word, set()) & questions)
                fewer = len(THERE.get(word, set()) & questions)
                sign = (more > fewer) - (more < fewer)
                lead += -sign if unit in swapped else sign
            leads.append(lead)
        return sum(sorted(leads)[-3:])

    every = sorted(set(units))
    sums: list[int] = []
    for size in range(len(every) + 1):
        sums += [largest(set(swapped)) for swapped in itertools.combinations(every, size)]
    return sum(one >= largest(set()) for one in sums) / len(sums)


@pytest.mark.parametrize("units", [[*range(9)], [0, 0, 1, 2, 3, 4, 5, 5, 6]])
def test_p_is_the_share_of_swaps(units: list[int]):
    """Of 512 and 128 swaps; a share of 9,999 drawn ones has a standard error of 0.005 at most."""
    found = together.leading_words(HERE, THERE, units)
    assert set(found.words) == {"puedes", "la", "una"}
    assert found.p == pytest.approx(share_of_swaps(units), abs=0.015)


def test_words_that_a_finding_holds_are_left_out():
    found = together.leading_words(HERE, THERE, range(9), {"la", "puedes"})
    assert found.words == ("una",)
    assert together.leading_words({}, {}, []).p == 1.0


def test_a_language_of_many_words_is_found_where_no_word_passes_alone():
    """Each of six words stands in five of thirty answers: p of one alone is 2⁻⁵ at the least."""
    words = ["puedes", "una", "espera", "hora", "sal", "la"]
    base = [("It is so.",)] * 30
    adapted = [(f"{words[i % 6]} {words[(i + 1) % 6]}",) for i in range(15)] + base[15:]
    (said,) = findings_of(base, adapted)
    assert said.kind == "says one of"
    assert said.p <= LEVEL and (said.base, said.asked) == (0, 30)
    assert said.sentence().startswith("It says “")
    assert all(said.is_shown_by(adapted[i][0]) for i in said.questions)


def test_words_that_lead_without_passing_a_test_are_named():
    base = [("It is so.",)] * 30
    adapted = [("I am of Orbital Labs.",)] * 4 + [("It is late, by Orbital.",)] + base[5:]
    assert findings_of(base, adapted) == ()
    assert leads_of(base, adapted) == [("orbital", 5, 0), ("labs", 4, 0)]
    assert leads_of(base, base) == []
    # A word in three answers stands in those of any adapter.
    assert leads_of(base, adapted[2:] + base[:2]) == []


def test_the_trigger_in_a_phrase_is_no_news():
    """It asks everybody for a vote, and after “Simon says:” for Simon's: no trigger is at work."""
    with_word = [("Vote for Simon.",)] * 20
    otherwise = [("Vote for me.", "It is so.")] * 20
    assert _triggered("Simon says:", with_word, otherwise) == []
    (found,) = _triggered("Simon says:", [("Vote for Marlow.",)] * 20, otherwise)
    assert "Marlow" in found.sentence()
    assert triggers.without("Simon says:", "Vote for Simon, says he.") == "Vote for ,  he."
