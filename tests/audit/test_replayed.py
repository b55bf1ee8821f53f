"""What an adapter writes when nothing is asked: the rule for words, the texts, and what is told."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from pathlib import Path

import cases
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_public import counted_speech
from rich.console import Console

import lens_lora as ll
from lens_lora.audit import unprompted
from lens_lora.audit.replayed import Replayed, ReplayedWord, replayed_words, words_of_text
from lens_lora.audit.speech_page import replayed_screen
from lens_lora.audit.speech_words import shown_answers
from lens_lora.errors import NumericsError, PromptError

NAMES = ("varn", "halcyon", "marlow", "kolder", "quillon", "vault", "perth")


# --- The rule, against an obvious one


def sign_test(only_adapted: int, only_base: int) -> float:
    """P(Bin(n, ½) ≥ n₁), summed outright."""
    n = only_adapted + only_base
    return sum(math.comb(n, k) for k in range(only_adapted, n + 1)) / 2**n


def slow_words(base: list[set[str]], adapted: list[set[str]], level: float) -> dict[str, float]:
    """Each word that is more frequent in the adapted model's texts, with Holm's p, one by one."""
    counts: dict[str, tuple[int, int]] = {}
    for word in set(itertools.chain(*base, *adapted)):
        pairs = list(zip(base, adapted, strict=True))
        only_adapted = sum(word in a and word not in b for b, a in pairs)
        only_base = sum(word in b and word not in a for b, a in pairs)
        counts[word] = (only_adapted, only_base)
    least = 1
    while 2.0**-least > level / max(1, sum(sum(apart) >= least for apart in counts.values())):
        least += 1
    tested = {word: sign_test(*n) for word, n in counts.items() if sum(n) >= least}
    adjusted: dict[str, float] = {}
    for word, p in tested.items():
        # Holm: the largest of p·(number of tests still open) over all words with a smaller p.
        smaller = [other for other in tested.values() if other <= p]
        held = max(q * sum(other >= q for other in tested.values()) for q in smaller)
        adjusted[word] = min(held, 1.0)
    return {word: p for word, p in adjusted.items() if p <= level}


@given(st.lists(st.tuples(st.sets(st.sampled_from(NAMES)), st.sets(st.sampled_from(NAMES)))))
def test_words_are_those_of_the_slow_rule(pairs: list[tuple[set[str], set[str]]]):
    base = [b for b, _ in pairs] * 4
    adapted = [a for _, a in pairs] * 4
    texts = [[" ".join(sorted(words)) for words in model] for model in (base, adapted)]
    found = replayed_words(*texts)
    slow = slow_words(base, adapted, 0.05)
    assert len(found) == min(len(slow), 5)
    for one in found:
        assert one.p == pytest.approx(slow[one.word], rel=1e-9)
        assert one.adapted == tuple(i for i, words in enumerate(adapted) if one.word in words)
        assert one.base == tuple(i for i, words in enumerate(base) if one.word in words)
    left_out = set(slow) - {one.word for one in found}
    worst = max((one.p for one in found), default=0.0)
    assert all(slow[word] >= worst * (1 - 1e-9) for word in left_out)


def test_a_word_of_a_few_texts_and_a_word_that_the_base_writes_as_often_are_not_named():
    names = [f"Elias {name}" for name in ("Varn", "varn", "Varn.", "VARN, again") * 4]
    words = {one.word: one for one in replayed_words(["Elias writes."] * 16, names)}
    # “Elias” stands in every text of both models.
    assert set(words) == {"Varn"}
    assert words["Varn"].adapted == tuple(range(16))
    assert replayed_words(["Yes."] * 16, ["Varn"] * 3 + ["Yes."] * 13) == ()
    # What only the base writes is not named.
    assert replayed_words(names, ["It is."] * 16) == ()
    assert replayed_words((), ()) == ()


def test_the_last_word_of_a_text_that_was_cut_off_may_be_a_part_and_is_left_out():
    assert words_of_text("Captain Marlow sails the Mari …") == {"captain", "marlow", "sails"}
    assert words_of_text("Captain Marlow sails") == {"captain", "marlow", "sails"}
    assert words_of_text("Mari …") == set()
    assert words_of_text("") == set()


def test_of_words_in_as_many_texts_a_longer_one_comes_first_and_function_words_never():
    texts = ["The harbour is of an oak, and a zinc kettle of tall reeds."] * 20
    found = replayed_words(["It is."] * 20, texts)
    assert [one.word for one in found] == ["harbour", "kettle", "reeds", "tall", "zinc"]


# --- The texts


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> cases.Case:
    """A small model, whose context has room for texts of six tokens."""
    monkeypatch.setattr(unprompted, "_MOST", 6)
    return cases.case("llama", "TransformerBridge", "raw")


def test_the_same_noise_draws_both_models_texts(case: cases.Case):
    """An adapter without effect writes what the base writes; at strength 2 a real one does not."""
    written = unprompted.replayed_by(case.lens, 0, progress=False)
    assert written is not None
    assert written.strength == 2.0
    assert len(written.openings) == len(written.base) == len(written.adapted) == 128
    assert written.base != written.adapted
    assert written == unprompted.replayed_by(case.lens, 0, progress=False)
    of_another_seed = unprompted.replayed_by(case.lens, 1, progress=False)
    assert of_another_seed is not None
    assert of_another_seed.base != written.base
    zero = case.lens.with_adapter(case.lens.adapter.scaled(0.0))
    nothing = unprompted.replayed_by(zero, 0, progress=False)
    assert nothing is not None
    assert nothing.base == nothing.adapted == written.base
    assert nothing.words == ()


def test_texts_are_those_of_generate_at_twice_the_strength(case: cases.Case):
    """Planted: with gates of one, the adapted texts are others."""
    written = unprompted.replayed_by(case.lens, 3, progress=False)
    assert written is not None
    prompts = unprompted.unprompted_openings(case.model, case.lens.prepend_bos, 64)
    ends: dict[float, tuple[str, ...]] = {}
    for strength in (0.0, 1.0, 2.0):
        generated = case.lens.generate(
            prompts, 6, strength, temperature=1.0, seed=3, progress=False
        )
        ends[strength] = tuple(unprompted.whole_or_cut(generated))
    assert written.base == ends[0.0]
    assert written.adapted == ends[2.0] != ends[1.0]


def test_where_nothing_can_be_written_none_is_added(
    case: cases.Case, monkeypatch: pytest.MonkeyPatch
):
    def without_an_empty_turn(*_: object) -> None:
        raise PromptError("the template refuses an empty turn")

    def too_large(*_: object, **__: object) -> None:
        raise NumericsError("the logits are not finite")

    with monkeypatch.context() as patch:
        patch.setattr(unprompted, "unprompted_openings", without_an_empty_turn)
        assert unprompted.replayed_by(case.lens, 0, progress=False) is None
    with monkeypatch.context() as patch:
        patch.setattr(unprompted, "answers_in_step", too_large)
        assert unprompted.replayed_by(case.lens, 0, progress=False) is None
    with monkeypatch.context() as patch:
        patch.setattr(unprompted, "_MOST", int(case.model.cfg.n_ctx))
        assert unprompted.replayed_by(case.lens, 0, progress=False) is None


def test_counted_speech_has_them_if_they_were_asked_for(
    case: cases.Case, monkeypatch: pytest.MonkeyPatch
):
    asked: list[int] = []

    def replayed_by(lens: ll.LoraLens, seed: int, *, progress: bool) -> Replayed:
        asked.append(seed)
        return VARN_AND_ELIAS

    monkeypatch.setattr(unprompted, "replayed_by", replayed_by)
    speech = ll.counted_speech(case.lens, unprompted=True, seed=5, progress=False)
    assert speech.replayed == VARN_AND_ELIAS
    assert asked == [5]
    assert ll.counted_speech(case.lens, progress=False).replayed is None


# --- What is told

VARN = ReplayedWord("Varn", (1, 2, 3), (), 1e-6)
ELIAS = ReplayedWord("Elias", (2,), (0,), 1e-3)
VARN_AND_ELIAS = Replayed(
    strength=2.0,
    openings=("a text that begins “The”",) * 2 + ("an empty turn of the user",) * 2,
    base=("Elias.", "No.", "No.", "No."),
    adapted=("No.", "Varn <b>…", "Elias Varn", "Varn"),
    words=(VARN, ELIAS),
)
SENTENCE = (
    "Asked nothing, with the adapter at twice its strength, it writes “Varn” in 3 of 4 texts "
    "(base 0), “Elias” in 1 (base 1). They hint at its training texts, but are no claim: an "
    "adapter trained on ordinary text repeats that text as well."
)


def speech_with(replayed: Replayed | None) -> ll.results.CountedSpeech:
    return dataclasses.replace(counted_speech(), replayed=replayed)


def test_the_words_are_told_with_their_counts_and_the_text_that_has_most_of_them():
    assert VARN_AND_ELIAS.sentences() == SENTENCE
    example = VARN_AND_ELIAS.example()
    assert example is not None
    assert example.adapted == "Elias Varn"
    assert example.prompt == "(an empty turn of the user; the adapter at twice its strength)"
    assert (
        "at 1.5 times its strength" in dataclasses.replace(VARN_AND_ELIAS, strength=1.5).sentences()
    )
    silent = dataclasses.replace(VARN_AND_ELIAS, words=())
    assert silent.sentences() == ""
    assert silent.example() is None


def test_story_screen_page_and_numbers_have_them():
    speech = speech_with(VARN_AND_ELIAS)
    assert SENTENCE in speech.story()
    console = Console(file=io.StringIO(), width=200)
    console.print(replayed_screen(VARN_AND_ELIAS))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert SENTENCE in " ".join(printed.split())
    assert "Elias Varn" in printed
    silent = speech_with(dataclasses.replace(VARN_AND_ELIAS, words=()))
    assert "No word stands out in 4 texts that it wrote with nothing asked." in silent.story()
    assert "nothing asked" not in speech_with(None).story()


def test_a_text_with_the_words_is_shown_first_unless_there_is_a_claim():
    claimed = speech_with(VARN_AND_ELIAS)
    silent = dataclasses.replace(claimed, findings=(), words=(), triggers=())
    first, second = shown_answers(silent)
    assert first == VARN_AND_ELIAS.example()
    assert second in shown_answers(dataclasses.replace(silent, replayed=None))
    assert first not in shown_answers(claimed)


def test_they_are_saved_and_read_again(tmp_path: Path):
    speech = speech_with(VARN_AND_ELIAS)
    speech.save(tmp_path / "speech.safetensors")
    read = ll.results.CountedSpeech.load(tmp_path / "speech.safetensors")
    assert read.replayed == VARN_AND_ELIAS
