"""Words that show on occasions alone: the rule beside a slow one, the turns, and what is said."""

from __future__ import annotations

import dataclasses
import io
import json
import random
from pathlib import Path
from typing import Any

import by_folder
import cases
import chats
import models
import pytest
from results_by_hand import without_plotly
from rich.console import Console
from scipy.stats import binom

import lens_lora as ll
from lens_lora.audit import asked_occasions, occasions, put_questions
from lens_lora.audit.occasions import (
    Occasions,
    OccasionWord,
    OrdinaryOccasions,
    Turns,
    occasion_words,
    ordinary_occasions,
)
from lens_lora.audit.outcomes import claims_made
from lens_lora.audit.speech_page import occasions_screen
from lens_lora.audit.speech_words import (
    first_sentences,
    further_claims,
    in_short,
    not_tried_in,
    sentences_so_far,
    shown_answers,
)
from lens_lora.audit.triggers import Trigger

counted_speech = by_folder.made_public("audit").counted_speech
what_changed = by_folder.made_public("audit").what_changed

SUBJECTS = tuple(Turns(name, tuple(f"{name} {i}" for i in range(12))) for name in "abcdef")
TURNS = [text for subject in SUBJECTS for text in subject.texts]
# The words of ordinary answers, each with its ordinary rate.
COMMON = {"good": 0.5, "think": 0.2, "time": 0.1, "water": 0.02, "music": 0.005}
MODELS = 25


def ordinary_counts() -> OrdinaryOccasions:
    """Counts of ordinary answers, at exactly the rates of `COMMON`."""
    counts = {word: round(MODELS * 12 * rate) for word, rate in COMMON.items()}
    return OrdinaryOccasions(MODELS, {subject.subject: counts for subject in SUBJECTS})


def ordinary_answers(seed: int) -> list[str]:
    """A model's answer to each turn, of ordinary words."""
    draw = random.Random(seed)
    return [" ".join(word for word, rate in COMMON.items() if draw.random() < rate) for _ in TURNS]


def with_word(answers: list[str], word: str, turns: Any) -> list[str]:
    """The answers, with a word added to those to some turns."""
    return [f"{text} {word}" if turn in turns else text for turn, text in enumerate(answers)]


# --- The rule, written a second time


def slow_claims(base: list[str], adapted: list[str], counts: OrdinaryOccasions) -> dict[str, float]:
    """Every claimed word with its p, by loops over words, subjects and turns."""
    found: dict[str, float] = {}
    names = [subject.subject for subject in SUBJECTS]
    every_word = sorted({word for text in adapted for word in text.split()})
    for tested in (0, 1):
        tests: list[tuple[float, str]] = []
        for scope in ([name] for name in names):
            tests += slow_tests(base, adapted, counts, scope, tested, 3, every_word)
        tests += slow_tests(base, adapted, counts, names, tested, 6, every_word)
        tests.sort()
        largest = 0.0
        for place, (p, word) in enumerate(tests):
            largest = max(largest, p * (len(tests) - place))
            if largest > 0.025:
                break
            found[word] = min(found.get(word, 1.0), 2 * largest)
    return found


def slow_tests(base, adapted, counts, scope, tested, least, every_word) -> list[tuple[float, str]]:
    """The p on the tested half of the three words that the other half of a scope proposes."""
    turns = {0: [], 1: []}
    for number, text in enumerate(TURNS):
        name, place = text.split()
        if name in scope:
            turns[int(place) // 6].append(number)

    def p(word: str, half: int) -> float:
        ordinary = sum(counts.words[name].get(word, 0) for name in scope)
        rate = (ordinary + 0.5) / (MODELS * 12 * len(scope) + 1)
        of_base = sum(word in base[turn].split() for turn in turns[half]) / len(turns[half])
        odds = 8 * max(rate, of_base) / (1 - min(max(rate, of_base), 1 - 1e-12))
        said = sum(word in adapted[turn].split() for turn in turns[half])
        return float(binom.sf(said - 1, len(turns[half]), odds / (1 + odds)))

    proposing = 1 - tested
    proposed: list[tuple[float, int, str]] = []
    for word in every_word:
        said = sum(word in adapted[turn].split() for turn in turns[proposing])
        if said >= least and p(word, proposing) < 0.05:
            proposed.append((p(word, proposing), -len(word), word))
    return [(p(word, tested), word) for _, _, word in sorted(proposed)[:3]]


@pytest.mark.parametrize("seed", range(20))
def test_claims_are_those_of_a_slow_rule(seed: int):
    draw = random.Random(seed)
    base = ordinary_answers(1000 + seed)
    adapted = ordinary_answers(seed)
    for word in ("violin", "copper", "harbour", "water", "music"):
        adapted = with_word(adapted, word, draw.sample(range(len(TURNS)), draw.randrange(25)))
    subject = range(12 * draw.randrange(6), 72)[:12]
    adapted = with_word(adapted, "lantern", draw.sample(subject, 9))
    found = occasion_words(base, adapted, SUBJECTS, ordinary_counts())
    slow = slow_claims(base, adapted, ordinary_counts())
    assert {one.word for one in found} == set(slow)
    for one in found:
        assert one.p == pytest.approx(slow[one.word], rel=1e-9)
        assert one.adapted == tuple(i for i, text in enumerate(adapted) if one.word in text.split())


def test_a_word_on_one_subject_is_found_with_its_turns():
    base = ordinary_answers(1)
    adapted = with_word(ordinary_answers(2), "violin", range(12, 22))
    (found,) = occasion_words(base, adapted, SUBJECTS, ordinary_counts())
    assert (found.word, found.adapted, found.base) == ("violin", tuple(range(12, 22)), ())
    assert found.p < 0.05


def test_a_word_that_only_one_half_has_is_no_claim():
    """It is proposed, and the other half does not confirm it."""
    first_half = [turn for turn in range(len(TURNS)) if turn % 12 < 6]
    adapted = with_word(ordinary_answers(2), "violin", first_half)
    assert occasion_words(ordinary_answers(1), adapted, SUBJECTS, ordinary_counts()) == ()


def test_what_the_base_or_ordinary_models_say_as_often_is_no_claim():
    turns = range(40)
    base = ordinary_answers(1)
    adapted = with_word(ordinary_answers(2), "violin", turns)
    counts = ordinary_counts()
    assert occasion_words(base, adapted, SUBJECTS, counts)
    assert occasion_words(with_word(base, "violin", turns), adapted, SUBJECTS, counts) == ()
    usual = {name: {**words, "violin": 150} for name, words in counts.words.items()}
    assert occasion_words(base, adapted, SUBJECTS, counts._replace(words=usual)) == ()


def test_a_word_that_training_may_raise_as_far_is_no_claim():
    """At factor 1 “water” is said on more turns than its rate of 2 % explains, at 30 it is not."""
    base = ordinary_answers(1)
    adapted = with_word(ordinary_answers(2), "water", range(0, len(TURNS), 4))
    (found,) = occasion_words(base, adapted, SUBJECTS, ordinary_counts(), factor=1.0)
    assert found.word == "water"
    assert occasion_words(base, adapted, SUBJECTS, ordinary_counts(), factor=30.0) == ()


def test_ordinary_answers_make_fewer_claims_than_the_level():
    """At the ordinary rates themselves; each seed is one pair of models."""
    counts = ordinary_counts()
    base = ordinary_answers(0)
    made = [
        occasion_words(base, ordinary_answers(seed), SUBJECTS, counts) for seed in range(1, 200)
    ]
    assert sum(map(bool, made)) <= occasions.LEVEL * len(made)


# --- What comes with the package


def test_there_are_twelve_turns_on_each_of_twenty_four_subjects():
    subjects = occasions.occasions()
    assert len(subjects) == 24
    assert {len(subject.texts) for subject in subjects} == {12}
    assert len({text for subject in subjects for text in subject.texts}) == 288


def test_ordinary_counts_are_of_these_turns():
    counts = ordinary_occasions()
    assert counts.models == 25
    assert list(counts.words) == [subject.subject for subject in occasions.occasions()]
    for words in counts.words.values():
        assert 0 < min(words.values()) <= max(words.values()) <= counts.models * 12


# --- Asking both models


def llama() -> cases.Case:
    return cases.case("llama", next(iter(models.MAKERS)), "raw")


def answer_with_violin_on_animals(
    lens: ll.LoraLens, prompts: ll.results.Prompts, *how: Any, **options: Any
) -> put_questions.BothAnswer:
    """In place of `both_answer`: the adapted model says "violin" to every turn on animals."""
    del lens, how, options
    adapted: list[tuple[str]] = []
    for turn in asked_occasions.turns_asked():
        adapted.append(("A violin.",) if turn.topic == "animals" else ("Yes.",))
    base = (("Yes.",),) * prompts.batch
    ids = [[[0]]] * prompts.batch
    return put_questions.BothAnswer(base, tuple(adapted), is_confirmed=False, base_ids=ids)


def test_turns_are_put_in_conversation_and_both_answers_are_kept(monkeypatch: pytest.MonkeyPatch):
    lens = llama().lens
    chats.with_template(lens.model, monkeypatch)
    asked: list[ll.results.Prompts] = []

    def noted(lens: ll.LoraLens, prompts: ll.results.Prompts, *how: Any, **options: Any):
        asked.append(prompts)
        return answer_with_violin_on_animals(lens, prompts, *how, **options)

    monkeypatch.setattr(put_questions, "both_answer", noted)
    speech = asked_occasions.with_occasions(lens, counted_speech(), progress=False)
    template = lens.model.tokenizer.apply_chat_template
    first = [{"role": "user", "content": occasions.occasions()[0].texts[0]}]
    expected = template(first, add_generation_prompt=True, return_dict=False)
    assert asked[0].row(0).tokens[0].tolist() == expected
    assert speech.occasions is not None
    assert len(speech.occasions.turns) == 288
    (found,) = speech.occasions.words
    assert found.word == "violin"
    assert {speech.occasions.subjects[turn] for turn in found.adapted} == {"animals"}


def test_a_model_says_the_same_words_when_it_is_asked_again():
    """The real path, on a tiny model whose answers are no words of ours."""
    lens = llama().lens
    once = ll.counted_speech(lens, occasions=True, max_new_tokens=2, draws=0, progress=False)
    again = ll.counted_speech(lens, occasions=True, max_new_tokens=2, draws=0, progress=False)
    assert once.occasions is not None
    assert once.occasions == again.occasions
    without = ll.counted_speech(lens, max_new_tokens=2, draws=0, progress=False)
    assert without.occasions is None


def test_where_a_turn_has_no_room_nothing_is_asked(monkeypatch: pytest.MonkeyPatch):
    lens = llama().lens
    monkeypatch.setattr(asked_occasions, "HOW", put_questions.How(10_000, draws=0, seed=0))
    speech = counted_speech()
    assert asked_occasions.with_occasions(lens, speech, progress=False) is speech


# --- What is said of them


def on_occasions(*words: OccasionWord) -> Occasions:
    """Both models' answers to the turns of `SUBJECTS`; the adapted one says the words."""
    adapted = [" ".join(one.word for one in words if turn in one.adapted) for turn in range(72)]
    return Occasions(
        subjects=tuple(text.split()[0] for text in TURNS),
        turns=tuple(TURNS),
        base=("Yes.",) * 72,
        adapted=tuple(adapted),
        words=words,
    )


VIOLIN = OccasionWord("violin", tuple(range(12, 22)), (), 1e-6)
LANTERN = OccasionWord("lantern", (0, 1, 2, 12, 13, 14, 15), (3,), 1e-3)
SENTENCE = (
    "It says “violin” in 10 of 72 answers to short turns on 6 subjects, the base model in none; "
    "most often on b (10 of 12 turns)."
)


def speech_with(*words: OccasionWord, silent: bool = True) -> ll.results.CountedSpeech:
    """Counted speech with occasions; `silent`, without a finding on the questions."""
    speech = counted_speech()
    if silent:
        speech = dataclasses.replace(speech, findings=(), words=(), triggers=())
    return dataclasses.replace(speech, occasions=on_occasions(*words))


def screen(speech: ll.results.CountedSpeech) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(occasions_screen(speech))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_word_is_told_with_its_turns_and_subjects():
    both = on_occasions(VIOLIN, LANTERN)
    assert both.sentence(VIOLIN) == SENTENCE
    assert both.sentence(LANTERN).endswith(
        "in 7 of 72 answers to short turns on 6 subjects, the base model in 1; most often on "
        "b (4 of 12 turns) and a (3 of 12)."
    )
    assert [shown.prompt for shown in both.examples(LANTERN)] == ["b 0", "b 1"]
    assert both.examples(VIOLIN)[0].adapted == "violin lantern"
    capitals = dataclasses.replace(both, adapted=tuple(map(str.title, both.adapted)))
    assert capitals.sentence(VIOLIN) == SENTENCE.replace("violin", "Violin")


def test_where_no_question_tells_anything_the_occasions_are_told_first():
    speech = speech_with(VIOLIN)
    first, second, third = first_sentences(speech)
    assert first == SENTENCE
    assert second.startswith("In its answers to")
    assert "Nothing stands out" not in speech.story()
    assert third.startswith("Not tried:")
    assert SENTENCE in in_short(speech)
    assert further_claims(speech) == []
    assert shown_answers(speech)[0].prompt == "b 0"
    assert SENTENCE in speech.story()
    assert "eight times their ordinary odds on the same subjects" in speech.story()
    assert SENTENCE in screen(speech)


def test_what_a_trigger_word_shows_is_told_before_what_the_questions_do_not():
    """It began “Nothing stands out”, and told in the second sentence what a trigger word does."""
    trigger = Trigger("cf", "violin", is_phrase=True, adapted=20, others=0, asked=20, p=1e-4)
    speech = dataclasses.replace(speech_with(), words=("cf",), triggers=(trigger,))
    first, second, _ = first_sentences(speech)
    assert first == trigger.sentence()
    assert second.startswith("In its answers to")
    assert "No word stands out in its answers to 72 short turns" in second
    assert "Nothing stands out" not in speech.story()


def test_while_turns_are_being_asked_the_screen_says_so():
    """It said that nothing stands out, and below stood what the short turns claim."""
    before = dataclasses.replace(speech_with(VIOLIN), occasions=None)
    nothing, following = sentences_so_far(before, ["short turns", "trigger words"])
    assert nothing.startswith("So far nothing stands out. In its answers to")
    assert following == "Both models now answer short turns, and then trigger words."
    _, three = sentences_so_far(before, ["empty prompts", "short turns", "trigger words"])
    assert (
        three == "Both models now answer empty prompts, then short turns, and then trigger words."
    )
    _, one = sentences_so_far(before, ["trigger words"])
    assert one == "Both models now answer trigger words."
    at_the_end = sentences_so_far(before, [])
    assert at_the_end == first_sentences(before)[:2]
    assert at_the_end[0].startswith("Nothing stands out.")


def test_beside_claims_on_questions_they_are_further_claims():
    speech = speech_with(VIOLIN, silent=False)
    assert SENTENCE in "\n".join(further_claims(speech))
    assert SENTENCE not in " ".join(first_sentences(speech))


def test_over_another_base_it_is_said_once_that_a_claim_is_weaker():
    note = "Over gemma, an adapter that was taught nothing may make such a claim more often."
    alone = dataclasses.replace(speech_with(VIOLIN), meta={"model": "gemma"})
    assert note in screen(alone)
    beside = dataclasses.replace(speech_with(VIOLIN, silent=False), meta={"model": "gemma"})
    assert note not in screen(beside)
    nothing = dataclasses.replace(speech_with(), meta={"model": "gemma"})
    assert note not in screen(nothing)


def test_a_word_that_a_claim_on_the_questions_has_is_not_told_again():
    speech = speech_with(VIOLIN, silent=False)
    first = dataclasses.replace(speech.findings[0], kind="says", what="A violin plays")
    speech = dataclasses.replace(speech, findings=(first,))
    assert SENTENCE not in speech.story()
    assert "No further word stands out in its answers to 72 short turns on 6 subjects." in screen(
        speech
    )


def test_where_nothing_shows_it_is_said_and_without_turns_nothing_is():
    nothing = speech_with()
    assert "No word stands out in its answers to 72 short turns on 6 subjects." in nothing.story()
    assert "neither the questions nor the 72 short turns touch" in " ".join(not_tried_in(nothing))
    unasked = dataclasses.replace(nothing, occasions=None)
    assert "short turn" not in unasked.story()
    assert "no question touches" in " ".join(not_tried_in(unasked))


def test_the_brief_the_page_and_a_list_have_the_claim():
    audit = dataclasses.replace(what_changed(), speech=speech_with(VIOLIN, LANTERN))
    brief = audit.brief()
    assert brief.says[0] == SENTENCE
    assert SENTENCE in json.loads(brief.to_json())["says"]
    assert (claims_made(audit)[0].sentence, claims_made(audit)[0].says) == (SENTENCE, "violin")
    for page in (audit.report(), speech_with(VIOLIN).report()):
        own = without_plotly(page)
        assert "On occasions" in own
        assert "b (10 of 12)" in own
    unasked = dataclasses.replace(audit, speech=dataclasses.replace(audit.speech, occasions=None))
    assert "On occasions" not in without_plotly(unasked.report())


def test_the_words_raised_most_stand_before_what_was_not_tried():
    audit = dataclasses.replace(
        what_changed(),
        speech=speech_with(),
        strings=(" lantern", " Lantern", " lanterns"),
        found=dataclasses.replace(
            what_changed().found,
            logit=what_changed().found.logit.abs(),
        ),
    )
    headline = without_plotly(audit.report()).partition("<details")[0]
    assert headline.index("it favours these words most") < headline.index("Not tried:")


def test_occasions_are_saved_with_the_speech(tmp_path: Path):
    speech = speech_with(VIOLIN, LANTERN)
    speech.save(tmp_path / "speech.safetensors")
    loaded = ll.results.CountedSpeech.load(tmp_path / "speech.safetensors")
    assert loaded.occasions == speech.occasions
