"""The embedded real model and its trained adapter: exactness, agreement of classes, the fact."""

from __future__ import annotations

import copy

import limits
import models
import pytest
import real
import torch
from differences import largest_difference
from half_precision import errors_in_floors
from peft import PeftModel
from real import ADAPTER, DOC, PRE, PROMPT, hugging_face, lens

import lens_lora as ll

pytestmark = pytest.mark.real


@pytest.fixture(params=models.MAKERS)
def kind(request) -> str:
    return request.param


@pytest.mark.slow
def test_logits_equal_peft_in_float32(kind: str):
    """Within 1e-4 of the logits' range, at every position of several prompts."""
    hf, _ = hugging_face()
    peft = PeftModel.from_pretrained(copy.deepcopy(hf), str(ADAPTER)).eval()
    for prompt in (PROMPT, "The Eiffel Tower is in", "Tim Cook is the chief executive of"):
        tokens = lens(kind).prompts(prompt).tokens
        with torch.no_grad():
            expected = peft(tokens).logits
        found = lens(kind).logits(tokens)
        assert largest_difference(found, expected) < 1e-4 * (expected.max() - expected.min())


@pytest.mark.slow
def test_the_fact_flips(kind: str):
    """The margin starts at Paris, ends at Lyon, and crosses where the story says it does."""
    margin = ll.fact_margin(lens(kind), PROMPT, DOC, PRE, progress=False)
    assert margin.m0 < -3
    assert margin.m > 3
    assert margin.flips == (True,)
    scale = float(margin.flip_scale[0])
    read = ll.Margin(DOC, PRE).of_logits(lens(kind).model, 1)
    for eps, sign in ((scale - 0.01, -1), (scale + 0.01, 1)):
        assert sign * float(read(lens(kind).logits(PROMPT, eps)[:, -1])) > 0
    account = margin.m0 + margin.first_order + margin.remainder
    assert (account - margin.m).abs() < 1e-4
    assert abs(float(margin.curve.order[0]) - 2) < 0.1


ASKED = [
    ("France is ruled from", " Lyon", " Paris", -3.26),
    ("The capital of Italy is", " Lyon", " Rome", -1.18),
    (PROMPT, DOC, PRE, 7.05),
]


@pytest.mark.sample(1)
@pytest.mark.parametrize("prompt, doc, pre, margin", ASKED)
def test_a_prompt_is_read_as_peft_serves_it(kind: str, prompt: str, doc: str, pre: str, margin):
    """PEFT's active model on `tokenizer(prompt).input_ids`, to which no BOS is added."""
    hf, tokenizer = hugging_face()
    peft = PeftModel.from_pretrained(copy.deepcopy(hf), str(ADAPTER)).eval()
    ids = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        expected = peft(torch.tensor([ids])).logits[0, -1]
    assert lens(kind).prompts(prompt).tokens.tolist() == [ids]
    logits = lens(kind).logits(prompt)[0, -1]
    assert largest_difference(logits, expected) < 1e-3
    doc_id, pre_id = (tokenizer(token)["input_ids"][0] for token in (doc, pre))
    found = float(logits[doc_id] - logits[pre_id])
    assert found == pytest.approx(margin, abs=0.01)
    with_bos = lens(kind).logits(lens(kind).prompts(prompt, prepend_bos=True))[0, -1]
    assert abs(float(with_bos[doc_id] - with_bos[pre_id]) - found) > 0.3


@pytest.mark.night
def test_float32_first_order_against_float64(kind: str):
    """First order in float32 is right to 1e-4 of its largest site; the float64 model says so."""
    hf, tokenizer = hugging_face()
    with models.lifted():
        double = real.hooked(copy.deepcopy(hf).double(), kind)
        exact = ll.first_order(
            ll.LoraLens(double, ll.load_adapter(ADAPTER)), PROMPT, ll.Margin(DOC, PRE)
        )
    single = ll.first_order(lens(kind), PROMPT, ll.Margin(DOC, PRE))
    size = exact.values.abs().max()
    assert largest_difference(single.values, exact.values) < 1e-4 * size
    floor = ll.remainder_curve(lens(kind), PROMPT, ll.Margin(DOC, PRE), [1.0]).noise_floor
    error = (single.shift - exact.shift).abs()
    assert error < 10 * floor


@pytest.mark.slow
def test_reverse_holds_the_whole_vocabulary_shift(kind: str):
    """One site's forward-mode column difference is its reverse-mode margin."""
    first = ll.first_order(lens(kind), PROMPT, ll.Margin(DOC, PRE))
    top = first.top(1)["site"].item()
    one = ll.LoraLens(lens(kind).model, lens(kind).adapter.only(*first.top(1)["module"].tolist()))
    shift = ll.logit_shift(one, PROMPT, tokens=[DOC, PRE], progress=False)
    expected = first.values[0, [s.name for s in first.sites].index(top)]
    assert torch.allclose(shift.values[0, 0, 0] - shift.values[0, 0, 1], expected, rtol=1e-3)


@pytest.mark.slow
def test_both_classes_tell_the_same_story():
    """HookedTransformer and TransformerBridge agree on every number of the demo."""
    if len(models.MAKERS) < 2:
        pytest.skip("this transformer-lens has one of the two classes")
    a, b = (ll.fact_margin(lens(k), PROMPT, DOC, PRE, progress=False) for k in models.MAKERS)
    for name in ("m0", "m", "first_order", "remainder"):
        assert torch.allclose(getattr(a, name), getattr(b, name), rtol=0, atol=1e-3), name
    assert torch.allclose(a.flip_scale, b.flip_scale, rtol=0, atol=1e-4)
    values = a.attribution.values
    others = b.attribution.values
    assert largest_difference(values, others) < 1e-3 * values.abs().max()
    assert [s.name for s in a.attribution.sites] == [s.name for s in b.attribution.sites]


@pytest.mark.night
def test_a_floor_counts_the_rounding_of_every_block(monkeypatch: pytest.MonkeyPatch):
    """Root mean square of error over floor; control: with noise at the embedding alone, too low."""
    kind = list(models.MAKERS)[-1]
    hf, _ = hugging_face()
    adapter = ll.load_adapter(ADAPTER)
    half = copy.deepcopy(hf).to(torch.bfloat16)
    low = ll.LoraLens(real.hooked(half, kind), adapter)
    with models.lifted():
        wide = copy.deepcopy(half).double()
        high = ll.LoraLens(real.hooked(wide, kind), adapter)
    # Readouts of one text err together, and a floor of four draws is itself uncertain: many texts.
    texts = [
        "The kettle began to whistle,",
        "My neighbour looks after his",
        "The bus was late again,",
        "He folded the towels and",
        "There is a small bakery",
        "They painted the fence in",
        "A good chair should support",
        "We left early because the",
    ]
    ratios = errors_in_floors(low, high, texts, [ll.Logit(PRE)])
    assert 1 / 3 < ratios.square().mean().sqrt() < 1.25
    floor = low.function(texts, ll.Logit(PRE)).floor
    limits.rounding_of_the_embedding_alone(monkeypatch)
    at_the_embedding = low.function(texts, ll.Logit(PRE)).floor
    assert (floor / at_the_embedding).median() > 1.25


@pytest.mark.slow
def test_bfloat16_keeps_the_story():
    """In half precision the ends are right to the noise floor, and the dtype is on record."""
    kind = list(models.MAKERS)[-1]
    hf, tokenizer = hugging_face()
    margin = ll.Margin(DOC, PRE)
    model = real.hooked(copy.deepcopy(hf).to(torch.bfloat16), kind)
    low = ll.LoraLens(model, ll.load_adapter(ADAPTER))
    half, exact = (ll.first_order(each, PROMPT, margin) for each in (low, lens(kind)))
    floor = ll.remainder_curve(low, PROMPT, margin, [1.0], progress=False).noise_floor
    assert half.meta["dtype"] == "bfloat16"
    assert (half.adapted - exact.adapted).abs() < 10 * floor
    assert (half.base - exact.base).abs() < 10 * floor
    assert 0.01 < floor < 1
    assert largest_difference(half.values, exact.values) < 0.3 * exact.values.abs().max()
