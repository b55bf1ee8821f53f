"""The claims of a brief against PEFT's own logits: scores, runs, and when nothing is claimed."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from types import SimpleNamespace
from typing import Any

import by_folder
import cases
import models
import pytest
import torch
from torch import Tensor

import lens_lora as ll
from lens_lora.audit import brief, what_changed
from lens_lora.results import SideBySide
from lens_lora.texts.neutral import own_openings

pytestmark = pytest.mark.usefixtures("float64")
CLASSES = list(models.MAKERS)
QUIET = {"progress": False}
SPOKEN, WORDS, CLAIMS = 4, 3, 3


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """As the context of the tiny models is."""
    monkeypatch.setattr(brief, "_TOKENS_SPOKEN", SPOKEN)
    monkeypatch.setattr(brief, "_TOKENS_OF_A_CLAIM", WORDS)
    monkeypatch.setattr(brief, "_MOST_CLAIMS", CLAIMS)
    monkeypatch.setattr(what_changed, "_ANSWER", 4)


def openings_of(case: cases.Case):
    """Where the model begins of its own accord, read as the lens reads strings."""
    return own_openings(case.model, case.lens.prepend_bos)


def log_p(case: cases.Case, row: Tensor) -> tuple[Tensor, Tensor]:
    """Of the base and the adapted model, by PEFT: [pos, vocab]."""
    with torch.no_grad():
        adapted = case.peft(row[None]).logits[0].log_softmax(-1)
        with case.peft.disable_adapter():
            return case.peft(row[None]).logits[0].log_softmax(-1), adapted


def spoken_rows(spoken: ll.results.Prompts) -> list[tuple[Tensor, range]]:
    """Each row without padding, and the positions that are read."""
    rows = []
    for i, (length, reads) in enumerate(zip(spoken.lengths, spoken.reads, strict=True)):
        rows.append((spoken.tokens[i, :length], range(int(length - reads), int(length))))
    return rows


def null_lenses(lens: ll.LoraLens, seed: int, draws: int) -> list[ll.LoraLens]:
    return list(map(lens.with_adapter, lens.null_adapters(seed, draws)))


@functools.cache
def claims(cls: str) -> tuple[brief.Claim, ...]:
    lens = cases.case("llama", cls, "raw").lens
    nulls = [(null, 0.05) for null in null_lenses(lens, 0, 2)]
    shifts = torch.zeros(3, lens.model.cfg.d_vocab)
    shifts[0, 40] = 1.0
    return brief.claims_of(lens, nulls, list(shifts), **QUIET)


@pytest.mark.parametrize("cls", CLASSES)
def test_scores_are_the_largest_parts_of_peft_s_divergence(cls: str):
    case = cases.case("llama", cls, "raw")
    mine = openings_of(case)
    openings, whole = mine.tiled(3), brief._spoken(case.lens, 0, False, False)
    assert whole is not None
    spoken = whole.rows
    first = case.lens.with_adapter(case.lens.adapter.truncated(1))
    own = torch.stack([case.lens.gates(1.0), case.lens.gates(2.0)]).repeat_interleave(mine.batch, 0)
    drawn: dict[str, object] = {"temperature": 1.0, **QUIET}
    said = [
        *case.lens.generate(mine.tiled(2), SPOKEN, own, seed=0, **drawn).ids,
        *first.generate(mine, SPOKEN, 2.0, seed=1, **drawn).ids,
    ]
    scores, other = brief._largest_parts(case.lens, [(case.lens, 1.0), (case.lens, 0.5)], whole)
    parts = torch.zeros(spoken.batch, SPOKEN + 1, len(scores.value), dtype=torch.float64)
    for i, (row, positions) in enumerate(spoken_rows(spoken)):
        start = int(openings.lengths[i])
        assert row[start:].tolist() == said[i].tolist() and positions[0] == start - 1
        base, adapted = log_p(case, row)
        parts[i, : len(positions)] = (adapted.exp() * (adapted - base))[list(positions)]
    largest, place = parts.flatten(0, 1).max(0)
    assert (scores.value - largest.clamp(min=0)).abs().max() < 1e-9
    positive = largest > 1e-9
    assert int(positive.sum()) > 10
    mine = scores.row * (SPOKEN + 1) + scores.slot
    at_mine = parts.flatten(0, 1)[mine, torch.arange(len(mine))]
    assert (at_mine - largest)[positive].abs().max() < 1e-9  # the same value, where two places tie
    assert (other.value - scores.value).abs().max() > 1e-3


@pytest.mark.parametrize("cls", CLASSES)
def test_runs_are_peft_s(cls: str):
    """Both ends, and the adapter left out of the layers that are named."""
    case, found = cases.case("llama", cls, "raw"), claims(cls)
    assert 1 < len(found) <= CLAIMS
    word = case.model.tokenizer
    for claim in found:
        context, said = (
            word(text, add_special_tokens=False).input_ids for text in (claim.context, claim.says)
        )
        row = torch.tensor(context + said)
        places = torch.arange(len(context) - 1, len(row) - 1)

        def of(values: Tensor, row: Tensor = row, places: Tensor = places) -> float:
            return float(values[places, row[places + 1]].sum())

        base, adapted = map(of, log_p(case, row))
        assert abs(claim.base - base) < 1e-9 and abs(claim.adapted - adapted) < 1e-9
        assert said[0] == word(claim.token, add_special_tokens=False).input_ids[0]
        assert claim.score > claim.null_score and claim.adapted > max(claim.base, claim.null)
        layers = [int(name.removeprefix("layer ")) for name in claim.layers.split(", ")]
        modules = [site.module for site in case.lens.sites if site.layer in layers]
        old = {module: cases.set_peft_scale(case.peft, module, 0.0) for module in modules}
        try:
            _, without = log_p(case, row)
        finally:
            for module, scale in old.items():
                layer = case.peft.base_model.model.get_submodule(module)
                layer.scaling["default"] = scale
        assert abs(claim.without - of(without)) < 1e-9
        odds = [math.log(math.exp(p) / -math.expm1(p)) for p in (base, of(without), adapted)]
        assert abs(claim.undone - (odds[2] - odds[1]) / (odds[2] - odds[0])) < 1e-8


def test_layers_that_carry_most_are_left_out():
    """By first order at 1, once more from the public call."""
    case = cases.case("llama", CLASSES[0], "raw")
    word = case.model.tokenizer
    for claim in claims(CLASSES[0]):
        context, said = (
            word(text, add_special_tokens=False).input_ids for text in (claim.context, claim.says)
        )
        readout = ll.AnswerLogProb(torch.tensor(said))
        parts = ll.first_order(case.lens, torch.tensor([context]), readout, at=1.0)
        by_layer = dict.fromkeys((site.layer for site in parts.sites), 0.0)
        for site, value in zip(parts.sites, parts.values[0].tolist(), strict=True):
            by_layer[site.layer] += value
        assert claim.layers == f"layer {max(by_layer, key=by_layer.__getitem__)}"


class Spelling:
    """A lens of a tokenizer whose words have several tokens, which says what it is told to."""

    STRINGS = ("<s>", " buy", " a", " N", "ok", "ia", ".", "N", " sail", "9")

    def __init__(self, *said: list[int]) -> None:
        self.said = said
        self.tokenizer = SimpleNamespace(all_special_ids=[0], decode=self.decode)
        self.model = SimpleNamespace(tokenizer=self.tokenizer)
        self.asked: list[list[int]] = []

    def decode(self, ids: object) -> str:
        return "".join(self.STRINGS[i] for i in list(map(int, ids)))

    def prompts(self, ready: ll.results.Prompts) -> ll.results.Prompts:
        return ready

    def gates(self, scale: float) -> Tensor:
        return torch.tensor([scale])

    def answers(self, ready: ll.results.Prompts, most: int) -> tuple[SimpleNamespace, bool]:
        rows = zip(ready.tokens.tolist(), ready.lengths.tolist(), strict=True)
        self.asked = [row[:length] for row, length in rows]
        return SimpleNamespace(ids=tuple(torch.tensor(ids[:most]) for ids in self.said)), True


@pytest.mark.bad_input  # a lens of no model
def test_a_claim_begins_where_its_word_does(monkeypatch):
    """Found by a token within a word, it says the word from its beginning on."""
    monkeypatch.setattr(brief, "_TOKENS_OF_A_CLAIM", 4)
    lens = Spelling([5, 6, 0], [6, 1, 0])

    def in_step(lens: Spelling, ready: ll.results.Prompts, most: int, *how: Any, **more: Any):
        return lens.answers(ready, most)

    monkeypatch.setattr(brief, "answers_in_step", in_step)
    rows = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 8, 6, 7, 9]])
    spoken = ll.results.Prompts(rows, torch.tensor([7, 7]), torch.tensor([7, 7]))
    value, row, slot = torch.zeros(10), torch.zeros(10).long(), torch.zeros(10).long()
    # Predicted: “ok” after “ N”, “ N” and “ sail” after “ a”, “N” after “.”
    for token, at in {4: (0, 3), 3: (0, 2), 8: (1, 2), 7: (1, 4)}.items():
        value[token], row[token], slot[token] = 1.0, *at
    ranked = {
        "speech": brief._Ranked({4: 3.0, 8: 2.0}, 1.0),
        "logit": brief._Ranked({3: 2.0, 7: 1.5}, 1.0),
    }
    places = list(brief._places(lens, brief._LargestParts(value, row, slot), ranked, spoken))
    assert [place.token for place in places] == [4, 3, 8, 7]
    assert [place.word.tolist() for place in places] == [[3, 4], [3], [8], [7]]
    assert [place.context.tolist() for place in places][:2] == [[0, 1, 2], [0, 1, 2]]
    words = brief._words(lens, places, False)
    assert lens.asked == [[0, 1, 2, 3, 4], [0, 1, 2, 8]]
    texts = [lens.decode(ids) for ids in words]
    assert texts == [" Nokia.", " N", " sail. buy", "N"]
    assert brief._without_repeats([" Nok", " N", " sail", "N9"], texts) == [0, 2, 3]
    assert brief._without_repeats(["a", "\n", "\n", " a"], ["a b", "\nc", "\n", " a"]) == [0, 1]


def test_no_token_makes_two_claims():
    found = claims(CLASSES[0])
    for i, claim in enumerate(found):
        assert not any(claim.token in earlier.says.split() for earlier in found[:i])
    assert [claim.by for claim in found[:2]] == ["speech", "logit"] and found[1].token == "w40"
    scores = [claim.score for claim in found if claim.by == "speech"]
    assert scores == sorted(scores, reverse=True)


def test_nothing_is_claimed_that_a_control_reaches():
    lens = cases.case("llama", CLASSES[0], "raw").lens
    shifts = torch.ones(2, lens.model.cfg.d_vocab)
    assert brief.claims_of(lens, [(lens, 1.0)], list(shifts), **QUIET) == ()
    assert brief.claims_of(lens, [], list(shifts[:1]), **QUIET) == ()


def test_nothing_is_claimed_that_no_run_shows(monkeypatch):
    """Words that a control says as well, whatever the score of their first token."""
    lens = cases.case("llama", CLASSES[0], "raw").lens
    runs = brief._runs

    def level(*given: object) -> list[dict[str, object]]:
        first, *rest = runs(*given)
        return [{**first, "null": first["adapted"]}, *rest]

    monkeypatch.setattr(brief, "_runs", level)
    nulls, shifts = [(null, 0.05) for null in null_lenses(lens, 0, 2)], torch.zeros(3, models.VOCAB)
    without_first = brief.claims_of(lens, nulls, list(shifts), **QUIET)
    monkeypatch.undo()
    monkeypatch.setattr(brief, "_TOKENS_SPOKEN", SPOKEN)
    monkeypatch.setattr(brief, "_TOKENS_OF_A_CLAIM", WORDS)
    monkeypatch.setattr(brief, "_MOST_CLAIMS", CLAIMS)
    assert without_first == brief.claims_of(lens, nulls, list(shifts), **QUIET)[1:]


def test_a_model_that_breaks_at_twice_its_strength_speaks_at_its_own(monkeypatch):
    case = cases.case("llama", CLASSES[0], "raw")
    in_step, asked = brief.answers_in_step, []

    def breaking(lens: ll.LoraLens, prompts: Any, most: int, gates: Tensor, *how: Any, **more: Any):
        asked.append(sorted(set(gates.flatten().tolist())))
        if 2.0 in asked[-1]:
            raise ll.errors.NumericsError("not finite")
        return in_step(lens, prompts, most, gates, *how, **more)

    monkeypatch.setattr(brief, "answers_in_step", breaking)
    assert brief._spoken(case.lens, 0, False, False).rows.batch == openings_of(case).batch
    assert asked == [[1.0, 2.0], [1.0], [2.0]]


def test_a_model_that_breaks_at_its_own_strength_is_an_error(monkeypatch):
    case = cases.case("llama", CLASSES[0], "raw")

    def breaking(*given: object, **how: object):
        raise ll.errors.NumericsError("not finite")

    monkeypatch.setattr(brief, "answers_in_step", breaking)
    with pytest.raises(ll.errors.NumericsError, match="not finite"):
        brief._spoken(case.lens, 0, False, False)


def test_a_context_with_room_for_no_opening(monkeypatch):
    case = cases.case("llama", CLASSES[0], "raw")
    monkeypatch.setattr(brief, "_TOKENS_SPOKEN", case.model.cfg.n_ctx)
    assert brief._spoken(case.lens, 0, False, False) is None
    nulls, shifts = [(case.lens, 1.0)], torch.zeros(2, models.VOCAB)
    assert brief.claims_of(case.lens, nulls, list(shifts), fast=True, **QUIET) == ()


def test_a_context_without_room_for_what_is_said_and_its_words(monkeypatch):
    case = cases.case("llama", CLASSES[0], "raw")
    longest = int(openings_of(case).lengths.max())
    monkeypatch.setattr(case.model.cfg, "n_ctx", longest + SPOKEN + WORDS)
    assert brief._spoken(case.lens, 0, False, False).rows.batch == 3 * openings_of(case).batch
    monkeypatch.setattr(case.model.cfg, "n_ctx", longest + SPOKEN + WORDS - 1)
    assert brief._spoken(case.lens, 0, False, False).rows.batch < 3 * openings_of(case).batch


def test_fast_each_opening_is_spoken_once(monkeypatch):
    """At 1 and at 2 in turn; no ΔW is cut."""
    case = cases.case("llama", CLASSES[0], "raw")
    monkeypatch.delattr(ll.Adapter, "truncated")
    in_step, gates = brief.answers_in_step, []

    def seen(lens: ll.LoraLens, prompts: Any, most: int, scale: Tensor, *how: Any, **more: Any):
        gates.extend(scale[:, 0].tolist())
        return in_step(lens, prompts, most, scale, *how, **more)

    monkeypatch.setattr(brief, "answers_in_step", seen)
    openings = openings_of(case)
    spoken = brief._spoken(case.lens, 0, True, False).rows
    assert gates == ([1.0, 2.0] * openings.batch)[: openings.batch]
    assert spoken.batch == openings.batch
    begun = [row[: int(reads.start) + 1].tolist() for row, reads in spoken_rows(spoken)]
    rows = [openings.tokens[i, :n].tolist() for i, n in enumerate(openings.lengths.tolist())]
    assert begun == rows


def changed(lens: ll.LoraLens, **given: object) -> ll.results.WhatChanged:
    return ll.what_changed(lens, ll.results.Prompts(*sized()), fast=True, **QUIET, **given)


def sized() -> tuple[Tensor, Tensor]:
    return models.tokens(3, 9), torch.tensor([9, 4, 7])


def test_a_brief_is_text_and_json_and_is_saved(tmp_path):
    lens = cases.case("llama", CLASSES[0], "raw").lens
    result = changed(lens, nulls=1)
    told = result.brief()
    fields = json.loads(told.to_json())
    assert fields["schema"] == "lens_lora.brief/2"
    both = [claim["says"] for claim in (*fields["would_say"], *fields["raised"])]
    assert sorted(both) == sorted(c.says for c in result.claims)
    assert set(fields) == {"schema", *brief.Brief.__dataclass_fields__}
    for claim in told.claims:
        assert claim.replace("\n", "⏎") in str(told)
    for raised in told.raised:
        assert f"More likely: “{raised.says}” after".replace("\n", "⏎") in str(told)
    assert "Not tried: " in str(told) and told.verdict in str(told)
    again = ll.load_result(result.save(tmp_path / "file.safetensors"))
    assert repr(again.claims) == repr(result.claims) and str(again.brief()) == str(told)


def claim_of(**given: Any) -> brief.Claim:
    """A claim of a word that no layers carry alone, with what a test sets."""
    usual: dict[str, Any] = {
        "context": "a",
        "says": "b",
        "base_says": "c",
        "token": "b",
        "by": "speech",
        "score": 5.0,
        "null_score": 1.0,
        "base": math.log(0.01),
        "adapted": math.log(0.9),
        "null": math.log(0.02),
        "unrelated": math.nan,
        "layers": "layer 0",
        "without": math.log(0.4),
        "without_others": math.nan,
    }
    return brief.Claim(**{**usual, **given})


def brief_of(*claims: brief.Claim) -> brief.Brief:
    """A brief of nothing but these."""
    said = tuple(claim for claim in claims if claim.would_say)
    raised = tuple(claim for claim in claims if not claim.would_say)
    texts = ("x", "y", "z", (), (), said, raised, (), {}, "texts")
    return brief.Brief(*texts, 1.0, (3.0, 2.9), (0.0, 0.1), ())


def test_replayed_words_are_told_after_the_claims_and_before_those_that_are_raised():
    sentence = "Asked nothing, it writes “Varn”."
    named = dataclasses.replace(
        brief_of(claim_of()),
        raised_words=("regulation",),
        replayed=(sentence,),
        replayed_words=("Varn",),
    )
    told = named.told
    claim = named.claims[-1].replace("\n", "⏎")
    assert told.index(claim) < told.index(sentence) < told.index("“regulation”")
    assert sentence not in named.claims
    assert json.loads(named.to_json())["replayed_words"] == ["Varn"]


def test_raised_words_are_told_after_the_claims_and_stand_in_the_json():
    named = dataclasses.replace(brief_of(claim_of()), raised_words=("regulation",))
    assert named.told_rest[0].startswith("Even in unrelated text")
    assert "“regulation”" in str(named) and "“regulation”" not in str(brief_of(claim_of()))
    assert json.loads(named.to_json())["raised_words"] == ["regulation"]


def test_json_has_null_where_there_are_no_other_layers():
    claim = claim_of()
    told = brief_of(claim)
    assert json.loads(told.to_json())["would_say"][0]["without_others"] is None
    assert "drawn" not in str(told)


def test_what_the_verdict_tells_in_full_has_no_line_of_its_own():
    """A single claim was printed twice, word for word."""
    first = "It says “Arr” in answer to 9 of 40 questions, the base model to none."
    second = "It says “matey” in answer to 5 of 40 questions, the base model to none."
    told = dataclasses.replace(brief_of(), verdict=f"{first} It also says “matey”.")
    assert str(dataclasses.replace(told, says=(first,))).count(first) == 1
    both = dataclasses.replace(told, says=(first, second))
    assert both.told_claims == [f"2. {second}"] and both.claims == (first, second)


def test_layers_are_named_where_they_carry_a_fifth_more_than_drawn_ones():
    """By hand: log-odds rise from −log 99 by log 891; without the layers log 13.5 of it is gone."""
    share = math.log(13.5) / math.log(891)
    for others, is_named in ((0.0, True), (share - 0.21, True), (share - 0.19, False)):
        left = math.log(9) - others * math.log(891)
        claim = claim_of(without_others=-math.log1p(math.exp(-left)))
        assert claim.undone == pytest.approx(share)
        assert claim.undone_by_others == pytest.approx(others, abs=1e-9)
        assert claim.is_located == is_named
        assert ("layer 0" in claim.sentence()) == is_named


def test_a_number_is_that_of_the_words_beside_it_and_a_claim_would_be_said():
    claim = claim_of()
    assert claim.would_say and claim.sentence() == (
        "After “a” it would say “b” (p 0.9, base 0.01, controls at most 0.02); the base would go "
        "on “c”."
    )
    near = claim_of(score=3.9)
    promoted = claim_of(by="logit")
    seldom = claim_of(adapted=math.log(0.4), without=math.log(0.2))
    told = brief_of(claim, near, promoted, seldom)
    assert told.claims == (claim.sentence(),) and told.raised == (near, promoted, seldom)
    assert "More likely: “b” after “a”, p 0.01 → 0.4." in str(told)
    assert brief.probability(math.log(1e-4)) == "below 0.001"


def test_a_rise_between_two_small_probabilities_is_told_as_a_ratio():
    """It read “p below 0.001 → below 0.001”."""
    told = brief_of(claim_of(base=math.log(1e-6), adapted=math.log(4e-5)))
    told_as = "More likely: “b” after “a”, p 40 times the base's, but below 0.001 in both models."
    assert told_as in str(told)


@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSES)
def test_a_claim_names_what_unrelated_adapters_say_of_it(cls: str):
    """A weaker copy says its words less; what a copy says as well does not stand."""
    case, adapter = cases.case("llama", cls, "raw"), cases.case("llama", cls, "raw").lens.adapter
    alone = claims(cls)
    nulls = [(null, 0.05) for null in null_lenses(case.lens, 0, 2)]
    assert all(
        math.isnan(claim.unrelated) and "unrelated" not in claim.sentence() for claim in alone
    )
    shifts = torch.zeros(3, case.model.cfg.d_vocab)
    shifts[0, 40] = 1.0
    others = [(case.lens.with_adapter(adapter.scaled(k)), 1.0) for k in (0.25, 0.5)]
    beside = brief.claims_of(case.lens, nulls, list(shifts), others, **QUIET)
    assert beside and {claim.says for claim in beside} <= {claim.says for claim in alone}
    word = case.model.tokenizer
    for claim in beside:
        texts = (claim.context, claim.says)
        context, said = (word(text, add_special_tokens=False).input_ids for text in texts)
        readout = ll.AnswerLogProb(torch.tensor(said))
        at = [ll.first_order(lens, torch.tensor([context]), readout, at=1.0) for lens, _ in others]
        assert claim.unrelated == pytest.approx(max(float(a.adapted) for a in at), abs=1e-9)
        p = brief.probability(claim.unrelated)
        assert f", unrelated adapters {p})" in claim.sentence()
    assert brief.claims_of(case.lens, nulls, list(shifts), [(case.lens, 1.0)], **QUIET) == ()


@models.NEEDS_BRIDGE
def test_a_brief_in_bfloat16_holds_by_runs_in_float32():
    """What it claims is likelier under the adapter by PEFT at full precision, too."""
    base = models.hf_model("llama", dtype=torch.bfloat16)
    peft = models.peft_model("llama", base)
    lens = ll.LoraLens(models.MAKERS["TransformerBridge"](base), ll.Adapter.from_peft(peft))
    found = changed(lens, nulls=1).claims
    assert lens.dtype == torch.bfloat16 and found
    whole, tokenizer = copy.deepcopy(peft).float(), lens.model.tokenizer
    for claim in found:
        texts = [claim.context, claim.says]
        ids, words = tokenizer(texts, add_special_tokens=False).input_ids
        row = torch.tensor([ids + words])
        with torch.no_grad():
            adapted = whole(row).logits[0].log_softmax(-1)
            with whole.disable_adapter():
                base_log_p = whole(row).logits[0].log_softmax(-1)
        said = torch.tensor(words)[:, None]
        rows = slice(len(ids) - 1, len(ids) + len(words) - 1)
        for own, exact in ((claim.adapted, adapted), (claim.base, base_log_p)):
            assert own == pytest.approx(float(exact[rows].gather(1, said).sum()), abs=0.3)
        assert claim.adapted > claim.base


TWELVE = "abcdefghijkl"


@pytest.mark.parametrize(
    ("texts", "share"),
    [
        ([], 0.0),
        (["too short"], 0.0),
        ([TWELVE, TWELVE], 0.0),  # each text by itself
        ([TWELVE * 2], 1 / 13),  # of 13 stretches the last is the first again
        (["a" * 23], 11 / 12),
        (["a" * 23, "The old man went to the sea."], 11 / 29),
    ],
)
def test_what_repeats_itself(texts: list[str], share: float):
    assert brief.repeated(iter(texts)) == pytest.approx(share)


@pytest.mark.parametrize(
    ("entropies", "said", "breaks"),
    [
        ((3.0, 2.0), "I like the sea.", False),
        ((3.0, 1.4), "I like the sea.", True),
        ((3.0, 6.1), "zx qv pw mm", True),
        ((3.0, 3.0), "the sea the sea the sea the sea the sea", True),
        ((3.0, 3.0), "", False),
    ],
)
def test_a_broken_model_is_said(entropies: tuple[float, float], said: str, breaks: bool):
    result = by_folder.made_public("audit").what_changed()
    found = dataclasses.replace(result.found, entropies=entropies)
    answers = (SideBySide("What do you like?", "I like the sea, and the hills.", said),)
    told = dataclasses.replace(result, found=found, answers=answers).brief()
    assert told.verdict.startswith("It breaks the model: ") == breaks
    if breaks:
        assert f"is {entropies[1]:.2g} nats (the base's 3)" in told.verdict
        assert f"{told.repeated[1]:.0%} of what it answers repeats" in told.verdict


def test_what_always_says_the_base_s_own_words_breaks_nothing():
    """A base that repeats itself is not held against the adapter."""
    result = by_folder.made_public("audit").what_changed()
    same = SideBySide("And?", "the sea the sea the sea the sea", "the sea the sea the sea the sea")
    told = dataclasses.replace(result, answers=(same,)).brief()
    assert told.repeated[0] == told.repeated[1] > 0.3 and "breaks" not in told.verdict


def test_verdicts_of_nothing():
    case = cases.case("llama", CLASSES[0], "raw")
    silent = case.lens.with_adapter(case.lens.adapter.scaled(0.0))
    assert "does nothing" in changed(silent, nulls=0).brief().verdict
    assert "need controls" in changed(case.lens, nulls=0, answers=False).brief().verdict
    width = int(case.model.cfg.d_model)
    head = ll.LoRAFactors(torch.ones(1, width), 100 * torch.arange(models.VOCAB)[:, None].float())
    loud = case.lens.with_adapter(ll.Adapter.from_factors({"lm_head": head}))
    verdict = changed(loud, nulls=0, answers=False).brief().verdict
    assert verdict.startswith("It breaks the model: ") and "need controls" in verdict
