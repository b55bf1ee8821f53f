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
from lens_lora.responses import rows_in_step
from lens_lora.responses.both_answer import answers_in_step, both_answer
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


def alike() -> ll.results.Prompts:
    """Six prompts that begin alike, four of them for longer, and one that does not."""
    ids = models.tokens(8)[:, :3]
    first = [5, 9, 2, 7]
    rows = [[*first, 3, 4, *ids[i].tolist()] for i in range(4)]
    rows += [[*first, *ids[i].tolist()] for i in (4, 5)]
    rows.append([8, *ids[6].tolist()])
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return ll.results.Prompts(tokens, lengths)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The rows and tokens of each pass with a cache, on the class of the first maker."""
    seen: list[tuple[int, int]] = []
    host = type(cases.case("llama", next(iter(models.MAKERS)), "raw").lens.host)
    run_cached = host.run_cached

    def noted(self: Any, tokens: Tensor, *given: Any) -> Any:
        seen.append(tuple(tokens.shape))
        return run_cached(self, tokens, *given)

    monkeypatch.setattr(host, "run_cached", noted)
    return seen


def by_peft(
    case: cases.Case, given: ll.results.Prompts | None = None
) -> tuple[list[tuple[str]], list[tuple[str]]]:
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

    given = given or prompts()
    asked = [given.row(i).tokens for i in range(given.batch)]
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


@pytest.mark.sample(3)
@pytest.mark.parametrize(("family", "cls"), FAMILIES)
def test_answers_are_peft_s_where_prompts_begin_alike(family: str, cls: str):
    case = cases.case(family, cls, "raw")
    said = both_answer(case.lens, alike(), NEW, 0, 0, progress=False)
    base, adapted = by_peft(case, alike())
    assert (list(said.base), list(said.adapted)) == (base, adapted)
    assert not said.is_confirmed


def test_what_prompts_begin_with_is_run_once(passes: list[tuple[int, int]]):
    """Of prompts of 9, 7 and 4 tokens: 3 openings of 6 tokens for each model, then 3 of each row.

    Without sharing it were 7 rows of 9 tokens for each. Beside known answers of the base, the same
    of the adapted model alone.
    """
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    said = both_answer(case.lens, alike(), NEW, 0, 0, progress=False)
    assert passes[:2] == [(2 * 3, 6), (2 * 7, 3)]
    assert not said.is_confirmed
    del passes[:]
    again = both_answer(case.lens, alike(), NEW, 0, 0, known=said.base_ids, progress=False)
    assert passes[:2] == [(3, 6), (7, 3)]
    assert again == said


def test_nothing_is_shared_under_a_hook(passes: list[tuple[int, int]]):
    """A hook may ask which prompt a token belongs to, as the removal of a direction does."""
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    place = "blocks.0.hook_resid_post"
    with case.lens.model.hooks(fwd_hooks=[(place, lambda tensor, hook: tensor + 0)]):
        said = both_answer(case.lens, alike(), NEW, 0, 0, progress=False)
    assert passes[0] == (2 * 7, 9)
    assert not said.is_confirmed
    assert said == both_answer(case.lens, alike(), NEW, 0, 0, progress=False)


@pytest.mark.sample(2)
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_draws_are_those_of_generation(family: str, cls: str, monkeypatch: pytest.MonkeyPatch):
    """Greedy answers and two draws, from one cache that has room for two prompts at a time."""
    case = cases.case(family, cls, "raw")
    monkeypatch.setattr(rows_in_step, "_CACHED_TOKENS", 160)
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
    assert said.is_confirmed
    assert not right.is_confirmed
    assert (said.base, said.adapted) == (right.base, right.adapted)


def test_rows_of_both_models_and_of_all_draws_are_confirmed():
    """Prompts of different lengths: every sixteenth row, by length, would be the base's alone."""
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    tokens = models.tokens(1).repeat(1, 10)[:, :48].repeat(40, 1)
    lengths = torch.arange(1, 41)
    samplings = [Sampling(), Sampling(temperature=1.0)]
    asked = batch._BothModels(lens, ll.results.Prompts(tokens, lengths), NEW, samplings)
    confirmed = asked._to_confirm(160)
    assert len(confirmed) == len(set(confirmed)) == 10
    of_each_copy = torch.bincount(torch.tensor(confirmed) // 40, minlength=4)
    assert of_each_copy.min() >= 1, of_each_copy
    # Of few rows eight are confirmed, and of fewer than those all.
    assert len(asked._to_confirm(64)) == 8
    assert len(asked._to_confirm(5)) == 5


def test_known_answers_of_the_base_are_confirmed_and_those_of_another_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
):
    """With them the adapted model's rows alone are generated; the answers stay the same."""
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    fresh = both_answer(case.lens, prompts(), NEW, 1, 0, progress=False)
    asked: list[list[int]] = []
    answers_with_a_cache = batch._BothModels.answers_with_a_cache

    def noted(self: Any, **options: Any) -> Any:
        asked.append(self._models)
        return answers_with_a_cache(self, **options)

    monkeypatch.setattr(batch._BothModels, "answers_with_a_cache", noted)
    known = both_answer(case.lens, prompts(), NEW, 1, 0, known=fresh.base_ids, progress=False)
    assert known == fresh
    assert asked == [[1]]
    other = [[[(token + 1) % 20 for token in ids] for ids in two] for two in fresh.base_ids]
    again = both_answer(case.lens, prompts(), NEW, 1, 0, known=other, progress=False)
    assert again == fresh
    assert asked == [[1], [1], [0, 1]]


def test_rows_that_have_ended_are_run_no_more(
    monkeypatch: pytest.MonkeyPatch, passes: list[tuple[int, int]]
):
    """Every third token ends an answer, so that rows end one after another."""
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    ends = list(range(0, case.lens.model.cfg.d_vocab, 3))
    monkeypatch.setattr(batch, "end_tokens", lambda *_: ends)
    said = both_answer(case.lens, prompts(), NEW, 1, 0, progress=False)
    assert not said.is_confirmed
    # The first tokens of the two longest prompts are run beside one row of padding.
    opened, prefilled, *later = [rows for rows, _ in passes]
    assert opened == 2 * 3
    assert prefilled == 2 * len(LENGTHS)
    assert later == sorted(later, reverse=True)
    assert later[-1] < 4 * len(LENGTHS)
    for scale, answers in ((0.0, said.base), (1.0, said.adapted)):
        for draw, temperature in enumerate((0.0, 1.0)):
            expected = case.lens.generate(
                prompts(), NEW, scale, temperature=temperature, eos_token_id=ends, progress=False
            )
            assert tuple(answer[draw] for answer in answers) == expected.texts


# --- One answer to each prompt, at gates of its own


@pytest.mark.sample(3)
@pytest.mark.parametrize(("family", "cls"), FAMILIES)
def test_an_answer_at_gates_of_each_prompt_is_that_of_generation(family: str, cls: str):
    lens = cases.case(family, cls, "raw").lens
    given = prompts().tiled(2)
    gates = torch.stack([lens.gates(scale) for scale in (1.0, 0.0, 2.0, 1.0, 0.5)]).repeat(2, 1)
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=4)):
        said, has_cache = answers_in_step(lens, given, NEW, gates, sampling, (), progress=False)
        drawn = {"temperature": sampling.temperature, "seed": sampling.seed}
        expected = lens.generate(given, NEW, gates, eos_token_id=(), progress=False, **drawn)
        assert has_cache
        assert said.texts == expected.texts
        assert said.ended == expected.ended
        for ids, expected_ids in zip(said.ids, expected.ids, strict=True):
            assert torch.equal(ids, expected_ids)


def test_a_prompt_that_is_asked_several_times_is_run_once(passes: list[tuple[int, int]]):
    """Four copies of a prompt, two at each of two strengths, differ by their noise alone."""
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    given = prompts().chosen([0, 0, 0, 0])
    gates = torch.stack([lens.gates(scale) for scale in (1.0, 2.0, 1.0, 2.0)])
    sampling = Sampling(temperature=1.0)
    said, _ = answers_in_step(lens, given, NEW, gates, sampling, (), progress=False)
    assert passes == [(2, LENGTHS[0]), *[(4, 1)] * (NEW - 1)]
    assert len(set(said.texts)) > 1


def test_a_wrong_cache_of_one_answer_each_is_not_used(monkeypatch: pytest.MonkeyPatch):
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    gates = lens.gates(1.0).expand(len(LENGTHS), -1)
    right, has_cache = answers_in_step(lens, prompts(), NEW, gates, Sampling(), progress=False)
    assert has_cache
    host = type(lens.host)
    chosen = host.rows_of_cache
    monkeypatch.setattr(
        host, "rows_of_cache", lambda self, cache, rows: chosen(self, cache, rows.flip(0))
    )
    said, has_cache = answers_in_step(lens, prompts(), NEW, gates, Sampling(), progress=False)
    assert not has_cache
    assert said.texts == right.texts
