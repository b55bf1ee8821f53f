"""A response explained: parts that are the functions' own, interventions that are PEFT's."""

from __future__ import annotations

import dataclasses
import html
from typing import Any

import by_folder
import cases
import limits
import models
import pytest
import reference
import torch
from differences import largest_difference
from results_by_hand import without_plotly

import lens_lora as ll

response_explanation = by_folder.made_public("explanations").response_explanation

CLASSES = list(models.MAKERS)
PROMPT = "w13 w14 w15"
RESPONSE = torch.tensor([9, 26, 5, 9])


@pytest.fixture(scope="module", params=CLASSES)
def explained(request):
    with models.lifted():
        case = cases.case("llama", request.param, "raw")
        return case, ll.explain(case.lens, PROMPT, response=RESPONSE, progress=False)


@pytest.fixture
def tiny(explained, float64):
    return explained


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_parts_are_the_functions_own(tiny):
    case, found = tiny
    lens = case.lens
    kl = ll.KL(RESPONSE)
    same(found.shifts.kl, ll.token_shifts(lens, PROMPT, RESPONSE).kl)
    same(found.modules.values, ll.first_order(lens, PROMPT, kl, at=1.0).values)
    path = ll.path_attribution(lens, PROMPT, kl, tol=1e-2, max_nodes=17, progress=False)
    same(found.path.values, path.values)
    log_p = ll.AnswerLogProb(RESPONSE)
    every = ll.first_order(lens, PROMPT, log_p, at=1.0, by="token", progress=False).values[0]
    same(found.moved, every.T[list(found.moved_tokens)])
    order = found.shifts.kl[0, 0].argsort(descending=True).tolist()
    assert list(found.moved_tokens) == order
    assert not found.is_generated


def test_layers_alone_and_left_out_are_peft_s(tiny):
    """log p of every token with one layer's modules at PEFT, or with all but those."""
    case, found = tiny
    row = torch.cat([case.lens.prompts(PROMPT).tokens[0], RESPONSE])[None]
    start = row.shape[1] - len(RESPONSE) - 1

    def log_p(factors: dict[str, float]) -> torch.Tensor:
        with torch.no_grad(), reference.peft_scales(case.peft, factors):
            logits = case.peft(row).logits[0, start:-1].log_softmax(-1)
        return logits.gather(1, RESPONSE[:, None])[:, 0]

    every = list(case.lens.adapter.modules)
    base, adapted = (log_p(dict.fromkeys(every, s)) for s in (0.0, 1.0))
    assert found.groups == ("layer 0", "layer 1")
    for layer in range(2):
        own = {m: float(f".{layer}." in m) for m in every}
        others = {m: 1 - on for m, on in own.items()}
        same(found.add_one[layer], log_p(own) - base)
        same(found.leave_one_out[layer], adapted - log_p(others))
    assert largest_difference(found.add_one, found.leave_one_out) > 1e-3


def test_their_sums_are_the_effects_of_the_response(tiny):
    case, found = tiny
    log_p = ll.AnswerLogProb(RESPONSE)
    for how in ("add_one", "leave_one_out"):
        effects = ll.patch_sites(case.lens, PROMPT, log_p, how, group="layer", progress=False)
        same(getattr(found, how).sum(1), effects.values[0])


def test_branches_and_rows_give_the_same(tiny, monkeypatch):
    case, found = tiny
    asked = limits.no_branch_pays(monkeypatch)
    again = ll.explain(case.lens, PROMPT, response=RESPONSE, progress=False)
    same(again.add_one, found.add_one)
    assert asked


def test_without_a_response_the_adapted_model_s_own_is_explained(tiny):
    case, _ = tiny
    prompts = torch.tensor([[5, 6, 7]])
    with pytest.raises(ll.errors.PromptError, match="max_new_tokens=64 more do not fit"):
        ll.explain(case.lens, prompts, progress=False)
    said = case.lens.generate(prompts, 6, eos_token_id=(), progress=False)
    found = ll.explain(case.lens, prompts, response=said, fast=True, progress=False)
    assert found.is_generated
    assert found.is_fast
    assert found.path is None
    assert found.response == tuple(case.lens.decode(said.ids[0].tolist()))
    assert (found.shifts.rank[1] == 0).all()
    assert "the adapted model says, in" in found.story()
    assert "run it without `fast`" in found.story()


@pytest.mark.slow
def test_a_conversation_s_response(tiny):
    """Its ids follow the chat template's own."""
    case, _ = tiny
    chat = [{"role": "user", "content": "w5 w6"}]
    template = "{% for m in messages %}<bos> {{ m.content }} {% endfor %}w7"
    tokenizer = case.lens.model.tokenizer
    before = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        said = case.lens.generate(chat, 5, eos_token_id=(), progress=False)
        ids = torch.tensor([[0, 5, 6, 7]])
        assert said.prompts.tokens.tolist() == ids.tolist()
        own = case.peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                                 max_new_tokens=5, do_sample=False, eos_token_id=None)  # fmt: skip
        assert said.ids[0].tolist() == own[0, 4:].tolist()
        found = ll.explain(case.lens, chat, response=said, fast=True, progress=False)
        assert found.prompt == tuple(case.lens.decode([0, 5, 6, 7]))
        margin = ll.explain(case.lens, chat, "w9", "w26", fast=True, progress=False)
        assert found.prompt.said == margin.prompt.said == "w5 w6"
        assert "After “w5 w6” the adapted model says, in 5 tokens" in found.story()
        assert margin.story().startswith("On the prompt “w5 w6” the base model")
    finally:
        tokenizer.chat_template = before


# --- what both models answer


def spoken(case: cases.Case, prompts: ll.results.Prompts, tokens: int) -> list[str]:
    """What Hugging Face's greedy search says, with PEFT's adapter off and on."""
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
    ids = prompts.tokens
    texts = list[str]()

    def say() -> None:
        new = case.peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        said = case.lens.model.tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
        texts.append(f"{said} …")

    with case.peft.disable_adapter():
        say()
    say()
    return texts


def test_answers_are_peft_s(tiny, tmp_path, monkeypatch):
    """Of a margin and of a response that was given; saved with the result, and loaded again."""
    case, _ = tiny
    limits.no_token_ends_an_answer(monkeypatch)
    prompts = case.lens.prompts(PROMPT)
    base, adapted = spoken(case, prompts, 12)
    pair = ll.results.SideBySide(PROMPT, base, adapted)
    margin = ll.explain(case.lens, PROMPT, "w9", "w26", fast=True, progress=False)
    given = ll.explain(case.lens, PROMPT, response=RESPONSE, fast=True, progress=False)
    assert margin.answers == given.answers == pair
    assert base != adapted
    for result in (margin, given):
        assert ll.load_result(result.save(tmp_path / "file.safetensors")).answers == pair


def test_a_generated_response_is_the_adapted_model_s_answer(tiny, monkeypatch):
    """And the base says at most as many tokens."""
    case, _ = tiny
    limits.no_token_ends_an_answer(monkeypatch)
    said = case.lens.generate(PROMPT, 7, progress=False)
    e = ll.explain(case.lens, said.prompts, response=said, fast=True, progress=False)
    base, adapted = spoken(case, said.prompts, 7)
    assert (e.answers.base, e.answers.adapted) == (base, adapted)


def test_there_is_no_answer_where_the_context_has_no_room(tiny, explained):
    """48 tokens do not fit, nor do 12 after a longer prompt, and the other prompt has its own."""
    case, full = tiny
    assert full.answers is None
    long = " ".join(["w5"] * (models.CONTEXT - 9))
    both = ll.explain(case.lens, [PROMPT, long], "w9", "w26", fast=True, progress=False)
    assert both[0].answers is not None
    assert both[1].answers is None
    assert both[0].answers.prompt == PROMPT


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "one answer": ({"doc": "w9"}, ll.errors.ArgumentError, "doc without pre"),
    "both": (
        {"doc": "w9", "pre": "w5", "response": "w4"},
        ll.errors.ArgumentError,
        "or a response",
    ),
    "one and a response": (
        {"pre": "w5", "response": "w4"},
        ll.errors.ArgumentError,
        "pre without doc",
    ),
    "null": ({"response": "w9", "null": 2}, ll.errors.ArgumentError, "compared on a margin"),
    "empty": ({"response": ""}, ll.errors.TokenError, "no token"),
    "special only": ({"response": torch.tensor([1, 1])}, ll.errors.TokenError, "says nothing"),
    "too long": ({"response": torch.full((40,), 5)}, ll.errors.PromptError, "with its answer has"),
    "two prompts": (
        {"prompts": ["w5", "w6"], "response": "w9"},
        ll.errors.PromptError,
        "one prompt",
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize(("given", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_before_a_pass(given, error, words, monkeypatch):
    lens = cases.case("llama", CLASSES[0], "raw").lens
    monkeypatch.setattr(ll.LoraLens, "run", lambda *args: pytest.fail("a pass was run"))
    with pytest.raises(error, match=words):
        ll.explain(lens, **{"prompts": PROMPT, "progress": False, **given})


# --- what is shown of it


def test_story_says_the_numbers():
    e = response_explanation()
    story = e.story()
    assert "the response that was given has 2 tokens: “ a b”" in story
    assert "gives it a log-probability of −3.00 nats, the adapted model −1.50" in story
    assert "67% of it at “·b” (token 2)" in story
    assert "1 of 2 tokens holds half of it" in story
    assert "layer 2 changes log p of the response by +0.90 nats, most at “·b” (token 2)" in story
    assert "adding gives +1.20 and leaving out +0.30, of a shift of +1.50" in story
    assert "holds half" in story
    assert "`fast`" not in story


def test_story_of_a_path_that_is_not_complete():
    """Where experts switch along the path its nodes miss a part of the KL, which is said."""
    e = response_explanation()
    of = "The path integral splits KL"
    assert f"{of} completely among the 4 modules" in e.story()
    taken = ll.results.Quadrature(8, 0.01, 0.2, 0.1, False, "hardly falls")
    missed = dataclasses.replace(e, path=dataclasses.replace(e.path, quadrature=taken))
    assert f"{of}, but not completely, among the 4 modules" in missed.story()


def test_story_of_one_module_in_one_layer():
    e = response_explanation()
    one = {"sites": e.modules.sites[:1], "values": torch.tensor([[3.0]]), "heads": (0,)}
    modules, path = (dataclasses.replace(split, **one) for split in (e.modules, e.path))
    alone = {name: getattr(e, name)[:1] for name in ("add_one", "leave_one_out")}
    alone |= {"moved": e.moved[:, :1], "groups": ("layer 0",)}
    story = dataclasses.replace(e, modules=modules, path=path, **alone).story()
    assert "among the 1 module:" in story
    assert "and 1 module holds half of it" in story
    assert "Summed over all 1 layer, adding" in story


def test_page_holds_every_part_and_escapes_what_is_said():
    e = response_explanation(tokens=("<script>alert(1)</script>", "a\nb"))
    page = without_plotly(e.report())
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;</span>" in page
    assert ">a⏎&#10;b</span>" in page
    for heading in ("Which tokens changed", "Which module moved which token", "Layer by layer"):
        assert heading in page
    assert html.escape("layer 2") not in e.figures()
    assert set(e.figures()) == {*("text", "tokens", "add_one", "leave_one_out")}
    fast = response_explanation(fast=True)
    assert "Layer by layer" not in fast.report()
    assert set(fast.figures()) == {"text", "tokens"}
