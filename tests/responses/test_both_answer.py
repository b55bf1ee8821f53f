"""Both models' answers from one padded batch are those of generation that confirms every token."""

from __future__ import annotations

from typing import Any

import cases
import models
import pytest
import torch
from torch import Tensor

import lens_lora as ll
from lens_lora.responses import both_answer as batch
from lens_lora.responses.both_answer import both_answer
from lens_lora.responses.generate import Sampling, end_tokens

pytestmark = pytest.mark.usefixtures("float64")
NEW = 6
LENGTHS = [7, 4, 6, 4, 1]
PAD = 2


def prompts() -> ll.results.Prompts:
    """Of different lengths, and one that holds the tokenizer's pad token as content."""
    tokens = models.tokens(len(LENGTHS))
    tokens[0, 1] = PAD
    return ll.results.Prompts(tokens, torch.tensor(LENGTHS))


def by_peft(case: cases.Case) -> tuple[list[tuple[str]], list[tuple[str]]]:
    """Both models' likeliest tokens after each prompt alone, without a cache, as text."""
    tokenizer = case.lens.model.tokenizer
    ends = end_tokens(case.lens.model, case.lens.hf_model, None)

    def answer(model: Any, ids: Tensor) -> tuple[str]:
        said: list[int] = []
        while len(said) < NEW and not ends.intersection(said):
            with torch.no_grad():
                logits = model(torch.cat([ids, torch.tensor([said]).long()], 1)).logits
            said.append(int(logits[0, -1].argmax()))
        return (tokenizer.decode(said, skip_special_tokens=True),)

    asked = [prompts().row(i).tokens for i in range(len(LENGTHS))]
    adapted = [answer(case.peft, ids) for ids in asked]
    with case.peft.disable_adapter():
        base = [answer(case.peft, ids) for ids in asked]
    return base, adapted


FAMILIES = [
    (family, cls)
    for family in models.FAMILIES
    for cls in models.MAKERS
    if models.is_built_right(family, cls, "raw")
]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("family", "cls"), FAMILIES)
def test_answers_are_peft_s_in_every_family(family: str, cls: str):
    case = cases.case(family, cls, "raw")
    said = both_answer(case.lens, prompts(), NEW, 0, 0, progress=False)
    base, adapted = by_peft(case)
    assert (list(said.base), list(said.adapted)) == (base, adapted)
    assert base != adapted


@pytest.mark.sample(2)
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_draws_are_those_of_generation(family: str, cls: str, monkeypatch: pytest.MonkeyPatch):
    """Greedy answers and two draws, from one cache that has room for two prompts at a time."""
    case = cases.case(family, cls, "raw")
    monkeypatch.setattr(batch, "_CACHED_TOKENS", 160)
    said = both_answer(case.lens, prompts(), NEW, 2, 5, progress=False)
    assert not said.is_confirmed
    for scale, answers in ((0.0, said.base), (1.0, said.adapted)):
        options: list[dict[str, Any]] = [{}]
        options += [{"temperature": 1.0, "seed": seed} for seed in (5, 6)]
        for draw, how in enumerate(options):
            expected = case.lens.generate(prompts(), NEW, scale, progress=False, **how).texts
            assert tuple(answer[draw] for answer in answers) == expected


def test_a_wrong_cache_is_not_used(monkeypatch: pytest.MonkeyPatch):
    """The keys of another row give other tokens, which the confirmed rows show."""
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    right = both_answer(case.lens, prompts(), NEW, 1, 0, progress=False)
    host = type(case.lens.host)
    chosen = host.rows_of_cache

    def swapped(self: Any, cache: Any, rows: Tensor) -> Any:
        return chosen(self, cache, rows.flip(0))

    monkeypatch.setattr(host, "rows_of_cache", swapped)
    said = both_answer(case.lens, prompts(), NEW, 1, 0, progress=False)
    assert said.is_confirmed and not right.is_confirmed
    assert (said.base, said.adapted) == (right.base, right.adapted)


def test_rows_of_both_models_and_of_all_draws_are_confirmed():
    """Prompts of different lengths: every eighth row, by length, would be the base's alone."""
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    tokens = models.tokens(1).repeat(1, 10)[:, :48].repeat(40, 1)
    lengths = torch.arange(1, 41)
    samplings = [Sampling(), Sampling(temperature=1.0)]
    asked = batch._Asked(lens, ll.results.Prompts(tokens, lengths), NEW, samplings)
    confirmed = asked._to_confirm(160)
    assert len(confirmed) == len(set(confirmed)) == 20
    of_each_copy = torch.bincount(torch.tensor(confirmed) // 40, minlength=4)
    assert of_each_copy.min() >= 3, of_each_copy


def test_known_answers_of_the_base_are_confirmed_and_those_of_another_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
):
    """With them the adapted model's rows alone are generated; the answers stay the same."""
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    fresh = both_answer(case.lens, prompts(), NEW, 1, 0, progress=False)
    asked: list[list[int]] = []
    answers_with_a_cache = batch._Asked.answers_with_a_cache

    def noted(self: Any, **options: Any) -> Any:
        asked.append(self._models)
        return answers_with_a_cache(self, **options)

    monkeypatch.setattr(batch._Asked, "answers_with_a_cache", noted)
    known = both_answer(case.lens, prompts(), NEW, 1, 0, known=fresh.base_ids, progress=False)
    assert known == fresh and asked == [[1]]
    other = [[[(token + 1) % 20 for token in ids] for ids in two] for two in fresh.base_ids]
    again = both_answer(case.lens, prompts(), NEW, 1, 0, known=other, progress=False)
    assert again == fresh and asked == [[1], [1], [0, 1]]


def test_rows_that_have_ended_are_run_no_more(monkeypatch: pytest.MonkeyPatch):
    """Every third token ends an answer, so that rows end one after another."""
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    ends = list(range(0, case.lens.model.cfg.d_vocab, 3))
    rows_of_passes: list[int] = []
    host = type(case.lens.host)
    run_cached = host.run_cached

    def noted(self: Any, tokens: Tensor, *given: Any) -> Any:
        rows_of_passes.append(len(tokens))
        return run_cached(self, tokens, *given)

    monkeypatch.setattr(batch, "end_tokens", lambda *_: ends)
    monkeypatch.setattr(host, "run_cached", noted)
    said = both_answer(case.lens, prompts(), NEW, 1, 0, progress=False)
    assert not said.is_confirmed
    prefilled, *later = rows_of_passes
    assert prefilled == 2 * len(LENGTHS)
    assert later == sorted(later, reverse=True) and later[-1] < 4 * len(LENGTHS)
    for scale, answers in ((0.0, said.base), (1.0, said.adapted)):
        for draw, temperature in enumerate((0.0, 1.0)):
            expected = case.lens.generate(
                prompts(), NEW, scale, temperature=temperature, eos_token_id=ends, progress=False
            )
            assert tuple(answer[draw] for answer in answers) == expected.texts
