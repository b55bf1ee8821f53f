"""What is generated equals PEFT's own generation on a base that no hooked model wraps.

Hugging Face's cached generation of a wrapped model is wrong, so the oracle is PEFT's copy.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cases
import chats
import models
import pytest
import reference
import torch
from differences import largest_difference
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

import lens_lora as ll
from lens_lora.responses import generate
from lens_lora.responses.generate import Generation, Sampling, end_tokens

pytestmark = pytest.mark.usefixtures("float64")
NEW = 14
LENGTHS = [7, 4, 6, 4]
PAD = 2
QUIET: dict[str, Any] = {"eos_token_id": (), "progress": False}
BOTH = list(models.MAKERS)


def prompts() -> ll.results.Prompts:
    """Of different lengths, and one that holds the tokenizer's pad token as content."""
    tokens = models.tokens(len(LENGTHS))
    tokens[0, 1] = PAD
    return ll.results.Prompts(tokens, torch.tensor(LENGTHS))


def by_peft(case: cases.Case, *, base: bool = False, **options: Any) -> list[list[int]]:
    """Hugging Face's own greedy search, prompt by prompt."""
    options = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": PAD, **options}
    found = []
    ready = prompts()
    for i, length in enumerate(LENGTHS):
        model = case.base if base else case.peft
        ids = ready.row(i).tokens
        said = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **options
        )
        found.append(said[0, length:].tolist())
    return found


def lists(said: ll.results.Generated) -> list[list[int]]:
    return [ids.tolist() for ids in said.ids]


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """The tokens of every pass without a cache."""
    seen: list[int] = []
    run = ll.LoraLens.run

    def counted(lens: ll.LoraLens, ready: ll.results.Prompts) -> Tensor:
        seen.append(ready.tokens.numel())
        return run(lens, ready)

    monkeypatch.setattr(ll.LoraLens, "run", counted)
    return seen


@pytest.mark.sample(2)
@pytest.mark.parametrize(("family", "cls", "flags"), cases.CASES)
def test_greedy_equals_peft(family: str, cls: str, flags: str, passes: list[int]):
    """Token by token, base and adapted, prompts of different lengths together; the cache is right.

    One pass without a cache for each length: none of the drafts had to be mended.
    """
    case = cases.case(family, cls, flags)
    passes.clear()
    said = case.lens.generate(prompts(), NEW, **QUIET)
    assert lists(said) == by_peft(case)
    assert len(passes) == len(set(LENGTHS))
    assert lists(case.lens.generate(prompts(), NEW, 0.0, **QUIET)) == by_peft(case, base=True)
    assert lists(said) != by_peft(case, base=True)
    assert not any(said.ended)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("family", "cls"),
    [
        (family, cls)
        for family in models.FAMILIES
        for cls in models.MAKERS
        if family not in models.CORE and models.is_built_right(family, cls, "raw")
    ],
)
def test_the_cache_is_right_in_every_family(family: str, cls: str, passes: list[int]):
    """Sliding windows, soft-caps, experts and position biases included."""
    case = cases.case(family, cls, "raw")
    passes.clear()
    assert lists(case.lens.generate(prompts(), NEW, **QUIET)) == by_peft(case)
    assert len(passes) == len(set(LENGTHS))


@pytest.mark.sample(2)
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("family", models.CORE)
def test_draws_are_those_of_peft_s_distribution(family: str, cls: str):
    """With the same noise, PEFT's logits give the same tokens; they differ from the greedy ones."""
    case = cases.case(family, cls, "raw")
    sampling = Sampling(1.5, 0.9, seed=4)
    said = case.lens.generate(prompts(), NEW, temperature=1.5, top_p=0.9, seed=4, **QUIET)
    noise = sampling.noise(len(LENGTHS), NEW)
    for i, ids in enumerate(said.ids):
        row = torch.cat([prompts().row(i).tokens[0], ids])[None]
        with torch.no_grad():
            logits = case.peft(row).logits[0, LENGTHS[i] - 1 : -1]
        assert sampling.choose(logits, noise[i]).tolist() == ids.tolist()
    assert lists(said) != by_peft(case)
    again = case.lens.generate(prompts(), NEW, temperature=1.5, top_p=0.9, seed=5, **QUIET)
    assert lists(again) != lists(said)


@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.25])
def test_a_draw_has_hugging_face_s_probabilities(top_p: float):
    """Over an even grid of noise each token is drawn as often as its probability says."""
    logits = torch.randn(1, 9, generator=models.seeded(0)) * 2
    warped = TemperatureLogitsWarper(1.3)(None, logits)
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    drawn = Sampling(1.3, top_p).choose(logits.expand(len(grid), -1), grid)
    found = torch.bincount(drawn, minlength=9) / len(grid)
    assert largest_difference(found, warped.softmax(-1)[0]) < 3e-5


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2])
@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0], ids=["flat", "usual", "peaked"])
def test_a_draw_sorts_few_tokens_and_is_that_of_all_of_them(top_p: float, spread: float):
    """The token at which the sorted probabilities that are kept pass u; most draws sort few."""
    logits = spread * torch.randn(60, 5000, generator=models.seeded(0))
    u = torch.rand(60, generator=models.seeded(1), dtype=torch.float64)
    expected: list[int] = []
    for row, share in zip(logits.double().softmax(-1), u, strict=True):
        order = row.argsort(descending=True)
        sums = row[order].cumsum(0)
        kept = int((sums < top_p - 1e-12).sum()) + 1
        drawn = int((sums[:kept] <= share * sums[:kept][-1]).sum())
        expected.append(int(order[min(drawn, kept - 1)]))
    sorts: list[int] = []
    plain = torch.Tensor.sort

    def counted(values: torch.Tensor, *args: Any, **options: Any) -> Any:
        sorts.append(len(values))
        return plain(values, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "sort", counted)
        drawn = Sampling(1.0, top_p).choose(logits, u)
    assert drawn.tolist() == expected
    if spread > 1:
        assert sum(sorts) <= 6


@pytest.mark.slow
@pytest.mark.parametrize("cls", models.MAKERS)
def test_gates_of_any_form(cls: str):
    """A number, one per site, by name, and each prompt's own."""
    case = cases.case("llama", cls, "raw")
    lens = case.lens
    with reference.peft_scales(case.peft, dict.fromkeys(lens.adapter.modules, 0.5)):
        half = by_peft(case)
    for scale in (0.5, torch.full((len(lens.sites),), 0.5), {"*": 0.5}):
        assert lists(lens.generate(prompts(), NEW, scale, **QUIET)) == half
    own = torch.tensor([0.0, 0.5, 1.0, 0.5])[:, None].expand(-1, len(lens.sites))
    each = (by_peft(case, base=True), half, by_peft(case), half)
    found = lists(lens.generate(prompts(), NEW, own, **QUIET))
    assert found == [said[i] for i, said in enumerate(each)]
    assert half not in (by_peft(case), by_peft(case, base=True))


@pytest.mark.parametrize("cls", models.MAKERS)
def test_it_ends_where_peft_ends(cls: str):
    """At any of several tokens, which is the response's last; rows go on without one another."""
    case = cases.case("llama", cls, "raw")
    whole = by_peft(case)
    ends = [whole[0][3], whole[1][6]]
    expected = by_peft(case, eos_token_id=ends)
    said = case.lens.generate(prompts(), NEW, eos_token_id=ends, progress=False)
    assert lists(said) == expected
    assert said.ended == tuple(ids[-1] in ends for ids in expected)
    assert any(said.ended)
    assert len({len(ids) for ids in expected}) > 1
    one = case.lens.generate(prompts(), NEW, eos_token_id=whole[0][0], progress=False)
    assert lists(one)[0] == whole[0][:1]
    assert one.ended[0]


def test_the_model_s_own_end_is_the_default():
    """generation_config, then config, then the tokenizer; each may hold several ids."""
    cfg = SimpleNamespace(d_vocab=models.VOCAB)
    base = SimpleNamespace()
    model = SimpleNamespace(tokenizer=models.tokenizer(), cfg=cfg)
    assert end_tokens(model, base, None) == {1}
    base.config = SimpleNamespace(eos_token_id=8)
    assert end_tokens(model, base, None) == {8}
    base.generation_config = SimpleNamespace(eos_token_id=[9, 10])
    assert end_tokens(model, base, None) == {9, 10}
    assert end_tokens(model, base, 3) == {3}
    assert end_tokens(model, base, ()) == set()
    assert end_tokens(SimpleNamespace(), None, None) == set()
    lens = cases.case("llama", BOTH[-1], "raw").lens
    known = getattr(lens.model, "original_model", lens.model.tokenizer)
    expected = getattr(known, "generation_config", known).eos_token_id
    assert end_tokens(lens.model, None, None) == {expected}


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_wrong_cache_decides_nothing(cls: str, monkeypatch, passes: list[int]):
    """Negative control: a cache that forgets drafts other tokens, and PEFT's are said."""
    case = cases.case("llama", cls, "raw")
    host = type(case.lens.plan.host)
    drafts = []
    run = host.run_cached
    draft = Generation._drafts
    monkeypatch.setattr(host, "run_cached", lambda self, tokens, cache: run(self, tokens, None))
    monkeypatch.setattr(
        Generation, "_drafts", lambda self, rows: drafts.append(draft(self, rows)) or drafts[-1]
    )
    assert lists(case.lens.generate(prompts(), NEW, **QUIET)) == by_peft(case)
    assert drafts[0] != [ids[:-1] for ids in by_peft(case)]
    assert len(passes) > len(LENGTHS)
    assert len(drafts) < NEW


def test_as_many_rows_are_confirmed_together_as_their_logits_allow(monkeypatch, passes: list[int]):
    """A pass for each row where the logits of one row fill what may be held; the same tokens."""
    case = cases.case("llama", BOTH[0], "raw")
    for held, count in ((NEW, len(LENGTHS)), (2 * NEW, len(set(LENGTHS)))):
        monkeypatch.setattr(generate, "_CONFIRMED_TOKENS", held)
        passes.clear()
        assert lists(case.lens.generate(prompts(), NEW, **QUIET)) == by_peft(case)
        assert len(passes) == count


@pytest.mark.parametrize("cls", models.MAKERS)
def test_far_longer_prompts_have_a_cache_of_their_own(cls: str, monkeypatch):
    """They are not fed token by token to the cache of the short ones; the same tokens."""
    case = cases.case("llama", cls, "raw")
    fed = list[tuple[int, ...]]()
    host = type(case.lens.plan.host)
    cached = host.run_cached

    def counted(self: Any, tokens: Tensor, cache: Any) -> Any:
        fed.append(tuple(tokens.shape))
        return cached(self, tokens, cache)

    monkeypatch.setattr(host, "run_cached", counted)
    apart = max(LENGTHS) - min(LENGTHS)
    for new, is_shared in ((apart - 1, False), (apart, True)):
        fed.clear()
        ready = prompts().chosen([LENGTHS.index(min(LENGTHS)), LENGTHS.index(max(LENGTHS))])
        said = lists(case.lens.generate(ready, new, **QUIET))
        singly = [case.lens.generate(ready.row(i), new, **QUIET) for i in range(2)]
        assert said == [ids for one in singly for ids in lists(one)]
        assert any(rows == 2 for rows, _ in fed) == is_shared


@pytest.mark.parametrize("cls", models.MAKERS)
def test_gates_that_are_dropped_after_the_first_token_show(cls: str, monkeypatch):
    """Negative control: in the draft they cost a pass, in the confirming pass the answer."""
    case = cases.case("llama", cls, "raw")
    gated = Generation._gated
    asked: list[int] = []

    def dropped(self: Generation, rows):
        asked.append(len(rows))
        return gated(self, rows) if len(asked) == 1 else self.lens.applied(0.0)

    monkeypatch.setattr(Generation, "_gated", dropped)
    assert lists(case.lens.generate(prompts(), NEW, **QUIET)) != by_peft(case)


@pytest.mark.parametrize("cls", models.MAKERS)
def test_hooks_that_count_positions(cls: str):
    """A user's own hook at position 5 sees it in every pass; a cache alone would not show it."""
    lens = cases.case("llama", cls, "raw").lens
    name = lens.plan.host.block_input(1)

    def cut(residual: Tensor, hook: Any) -> Tensor:
        del hook
        if residual.shape[1] > 5:
            residual = residual.clone()
            residual[:, 5] = 3.0
        return residual

    plain = lists(lens.generate(prompts(), NEW, **QUIET))
    lens.model.add_hook(name, cut)
    try:
        said = lens.generate(prompts(), NEW, **QUIET)
        for i, ids in enumerate(said.ids):
            row = torch.cat([prompts().row(i).tokens[0], ids])[None]
            chosen = lens.logits(row)[0, LENGTHS[i] - 1 : -1].argmax(-1)
            # What is said before position 5 is chosen by shorter passes, which the hook leaves.
            late = max(0, 6 - LENGTHS[i])
            assert chosen[late:].tolist() == ids[late:].tolist()
    finally:
        lens.model.reset_hooks()
    assert lists(said) != plain


@pytest.mark.parametrize("cls", models.MAKERS)
def test_it_goes_on_as_a_response(cls: str):
    """Its ids, after its own prompts: the likeliest token has rank 0 in the adapted model."""
    lens = cases.case("llama", cls, "raw").lens
    said = lens.generate("w5 w6 w7", NEW, **QUIET)
    shifts = ll.token_shifts(lens, said.prompts, said)
    assert (shifts.rank[1] == 0).all()
    assert (shifts.rank[0] > 0).any()
    assert shifts.response[0] == tuple(lens.decode(said.ids[0].tolist()))
    whole = ll.first_order(lens, said.prompts, ll.AnswerLogProb(said)).shift
    assert largest_difference(shifts.total, whole) < 1e-11
    assert repr(said).startswith("Generated('w")
    assert "14 tokens, cut off" in repr(said)
    assert ll.AnswerLogProb(said).label == f"log p({said.texts[0]!r})"


def test_nothing_is_left_on_the_model():
    lens = cases.case("llama", BOTH[-1], "raw").lens

    def held() -> list[tuple[int, ...]]:
        return [
            (
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
                len(m._forward_pre_hooks_with_kwargs),
            )
            for m in lens.model.modules()
        ]

    before = held()
    lens.generate(prompts(), 3, **QUIET)
    assert held() == before


REFUSED = {
    "no tokens": ({"max_new_tokens": 0}, ll.errors.ArgumentError, "max_new_tokens=0"),
    "half a token": ({"max_new_tokens": 2.5}, ll.errors.ArgumentError, "whole number"),
    "no room": ({"max_new_tokens": 27}, ll.errors.PromptError, "prompt 0 of 4 .* at most 26 do"),
    "cold": ({"temperature": -1.0}, ll.errors.ArgumentError, "temperature=-1"),
    "no mass": ({"temperature": 1.0, "top_p": 0.0}, ll.errors.ArgumentError, "top_p=0"),
    "greedy top_p": ({"top_p": 0.5}, ll.errors.ArgumentError, "pass a temperature"),
    "a seed of words": ({"temperature": 1.0, "seed": "x"}, ll.errors.ArgumentError, "seed"),
    "a word for an id": ({"eos_token_id": "<eos>"}, ll.errors.ArgumentError, "eos_token_id"),
    "gates of others": ({"scale": torch.ones(3, 14)}, ll.errors.SiteError, "gates of 3 prompts"),
}


@pytest.mark.sample(4)
@pytest.mark.bad_input
@pytest.mark.parametrize(("options", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_bad_input(options: dict[str, Any], error: type[Exception], words: str):
    lens = cases.case("llama", BOTH[0], "raw").lens
    with pytest.raises(error, match=words):
        lens.generate(prompts(), **{"max_new_tokens": 5, "progress": False, **options})
    assert len(lens.generate(prompts(), 26, **QUIET).ids[0]) == 26


def test_an_answer_stands_beside_its_own_prompt_where_another_has_no_room(monkeypatch):
    """The first prompt does not fit with so long an answer; the second keeps its own."""
    (cls, *_) = models.MAKERS
    lens = cases.case("llama", cls, "raw").lens
    texts = lens.prompts(["w5 w7 w8 w9 w10 w11 w12", "w9 w10"])
    adapted = lens.generate(texts, 3, progress=False)
    both = generate.side_by_side(lens, texts, 3, adapted, progress=False)
    most = max(map(len, adapted.ids))
    monkeypatch.setattr(lens.model.cfg, "n_ctx", int(texts.lengths[1]) + most)
    found = generate.side_by_side(lens, texts, 3, adapted, progress=False)
    assert found == [None, both[1]]
    assert both[1] is not None


CHAT = chats.ASK


@pytest.mark.parametrize(
    "prompts, is_single",
    [
        ("w5 w6", True),
        (CHAT, True),
        (torch.tensor([5, 6]), True),
        (torch.tensor([[5, 6]]), True),
        (["w5 w6"], False),
        ([CHAT], False),
        (["w5 w6", "w7"], False),
        (torch.tensor([[5, 6], [7, 8]]), False),
    ],
)
def test_text_is_a_string_for_a_single_prompt(prompts, is_single: bool, monkeypatch):
    """A list has a tuple of texts, also a list of one; `texts` is a tuple always."""
    lens = cases.case("llama", BOTH[-1], "raw").lens
    chats.with_template(lens.model, monkeypatch)
    said = lens.generate(prompts, 3, progress=False)
    assert isinstance(said.texts, tuple)
    assert len(said.texts) == said.prompts.batch
    assert said.text == (said.texts[0] if is_single else said.texts)


def test_what_was_said_is_a_table_and_a_file(tmp_path):
    """The file gives the same ids back, and they go on as a response as those did."""
    lens = cases.case("llama", BOTH[-1], "raw").lens
    said = lens.generate(["w5 w6", "w7"], 3, progress=False)
    frame = said.to_frame()
    assert frame["prompt"].tolist() == [0, 1]
    assert frame["asked"].tolist() == ["w5 w6", "w7"]
    assert frame["response"].tolist() == list(said.texts)
    assert frame["tokens"].tolist() == [len(ids) for ids in said.ids]
    read = ll.load_result(said.save(tmp_path / "said.safetensors"))
    assert isinstance(read, ll.results.Generated)
    assert repr(read) == repr(said)
    assert all(torch.equal(one, other) for one, other in zip(read.ids, said.ids, strict=True))
    assert torch.equal(read.prompts.tokens, said.prompts.tokens)
    assert read.prompts.sources == said.prompts.sources
    assert read.ended == said.ended
    shifts = ll.token_shifts(lens, said.prompts, said)
    again = ll.token_shifts(lens, read.prompts, read)
    torch.testing.assert_close(again.shift, shifts.shift, rtol=0, atol=0, equal_nan=True)
