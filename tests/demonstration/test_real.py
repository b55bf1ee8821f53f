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
    """The margin favours Paris at scale 0 and Lyon at 1, and changes its sign at `flip_scale`."""
    margin = ll.fact_margin(lens(kind), PROMPT, DOC, PRE, progress=False)
    assert margin.m0 < -3
    assert margin.m > 3
    assert margin.flips == (True,)
    margin_of_logits = ll.Margin(DOC, PRE).of_logits(lens(kind).model, 1)
    flip_scale = float(margin.flip_scale[0])
    logits_below = lens(kind).logits(PROMPT, flip_scale - 0.01)[:, -1]
    logits_above = lens(kind).logits(PROMPT, flip_scale + 0.01)[:, -1]
    assert float(margin_of_logits(logits_below)) < 0
    assert float(margin_of_logits(logits_above)) > 0
    total = margin.m0 + margin.first_order + margin.remainder
    assert (total - margin.m).abs() < 1e-4
    # The remainder falls as ε², ε → 0.
    assert abs(float(margin.curve.order[0]) - 2) < 0.1


# Prompt, the token that the adapter teaches, the token of the base, and their margin.
MARGINS = [
    ("France is ruled from", " Lyon", " Paris", -3.26),
    ("The capital of Italy is", " Lyon", " Rome", -1.18),
    (PROMPT, DOC, PRE, 7.05),
]


@pytest.mark.sample(1)
@pytest.mark.parametrize("prompt, doc, pre, margin", MARGINS)
def test_a_prompt_is_read_as_peft_serves_it(kind: str, prompt: str, doc: str, pre: str, margin):
    """Equal to PEFT's active model on `tokenizer(prompt).input_ids`, which begins with no BOS.

    Control: with a BOS the margin is another one.
    """
    hf, tokenizer = hugging_face()
    peft = PeftModel.from_pretrained(copy.deepcopy(hf), str(ADAPTER)).eval()
    ids = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        expected = peft(torch.tensor([ids])).logits[0, -1]
    assert lens(kind).prompts(prompt).tokens.tolist() == [ids]
    logits = lens(kind).logits(prompt)[0, -1]
    assert largest_difference(logits, expected) < 1e-3
    doc_id = tokenizer(doc)["input_ids"][0]
    pre_id = tokenizer(pre)["input_ids"][0]
    found = float(logits[doc_id] - logits[pre_id])
    assert found == pytest.approx(margin, abs=0.01)
    with_bos = lens(kind).logits(lens(kind).prompts(prompt, prepend_bos=True))[0, -1]
    assert abs(float(with_bos[doc_id] - with_bos[pre_id]) - found) > 0.3


@pytest.mark.night
def test_float32_first_order_against_float64(kind: str):
    """Each site is right to 1e-4 of the largest; the shift to ten noise floors."""
    hf, _ = hugging_face()
    with models.lifted():
        double = real.hooked(copy.deepcopy(hf).double(), kind)
        exact = ll.first_order(
            ll.LoraLens(double, ll.load_adapter(ADAPTER)), PROMPT, ll.Margin(DOC, PRE)
        )
    single = ll.first_order(lens(kind), PROMPT, ll.Margin(DOC, PRE))
    largest = exact.values.abs().max()
    assert largest_difference(single.values, exact.values) < 1e-4 * largest
    floor = ll.remainder_curve(lens(kind), PROMPT, ll.Margin(DOC, PRE), [1.0]).noise_floor
    error = (single.shift - exact.shift).abs()
    assert error < 10 * floor


@pytest.mark.slow
def test_forward_and_reverse_mode_agree_on_the_largest_site(kind: str):
    """With one site, its a_l of the margin is logit_shift(Lyon) − logit_shift(Paris)."""
    by_reverse_mode = ll.first_order(lens(kind), PROMPT, ll.Margin(DOC, PRE))
    largest = by_reverse_mode.top(1).iloc[0]
    sites = [site.name for site in by_reverse_mode.sites]
    expected = by_reverse_mode.values[0, sites.index(largest["site"])]
    one_site = ll.LoraLens(lens(kind).model, lens(kind).adapter.only(largest["module"]))
    by_forward_mode = ll.logit_shift(one_site, PROMPT, tokens=[DOC, PRE], progress=False)
    assert len(by_forward_mode.sites) == 1
    shift_of_doc, shift_of_pre = by_forward_mode.values[0, 0]
    assert torch.allclose(shift_of_doc - shift_of_pre, expected, rtol=1e-3)


@pytest.mark.slow
def test_both_classes_tell_the_same_story():
    """HookedTransformer and TransformerBridge agree on every number of the demo."""
    if len(models.MAKERS) < 2:
        pytest.skip("this transformer-lens has one of the two classes")
    first_class, second_class = models.MAKERS
    first = ll.fact_margin(lens(first_class), PROMPT, DOC, PRE, progress=False)
    second = ll.fact_margin(lens(second_class), PROMPT, DOC, PRE, progress=False)
    for name in ("m0", "m", "first_order", "remainder"):
        assert torch.allclose(getattr(first, name), getattr(second, name), rtol=0, atol=1e-3), name
    assert torch.allclose(first.flip_scale, second.flip_scale, rtol=0, atol=1e-4)
    first_names = [site.name for site in first.attribution.sites]
    second_names = [site.name for site in second.attribution.sites]
    assert first_names == second_names
    first_values = first.attribution.values
    second_values = second.attribution.values
    bound = 1e-3 * first_values.abs().max()
    assert largest_difference(first_values, second_values) < bound


@pytest.mark.night
def test_a_floor_counts_the_rounding_of_every_block(monkeypatch: pytest.MonkeyPatch):
    """The floor matches the error; control: counting the embedding's rounding alone is too low.

    Measured as the root mean square of error / floor.
    """
    kind = list(models.MAKERS)[-1]
    hf, _ = hugging_face()
    adapter = ll.load_adapter(ADAPTER)
    half = copy.deepcopy(hf).to(torch.bfloat16)
    low = ll.LoraLens(real.hooked(half, kind), adapter)
    with models.lifted():
        wide = copy.deepcopy(half).double()
        high = ll.LoraLens(real.hooked(wide, kind), adapter)
    # Eight texts, as errors of several readouts on one text are correlated, and as each floor has
    # four draws only.
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
    floor = low.function(texts, ll.Logit(PRE)).floor
    limits.rounding_of_the_embedding_alone(monkeypatch)
    ratios_to_low_floor = errors_in_floors(low, high, texts, [ll.Logit(PRE)])
    low_floor = low.function(texts, ll.Logit(PRE)).floor
    assert 1 / 3 < ratios.square().mean().sqrt() < 1.25
    assert ratios_to_low_floor.square().mean().sqrt() > 1.25
    assert (floor / low_floor).median() > 1.25


@pytest.mark.slow
def test_bfloat16_is_right_to_its_noise_floor():
    """Both ends to three floors, and each site to 0.3 of the largest; the dtype is on record."""
    kind = list(models.MAKERS)[-1]
    hf, _ = hugging_face()
    margin = ll.Margin(DOC, PRE)
    model = real.hooked(copy.deepcopy(hf).to(torch.bfloat16), kind)
    low = ll.LoraLens(model, ll.load_adapter(ADAPTER))
    half = ll.first_order(low, PROMPT, margin)
    exact = ll.first_order(lens(kind), PROMPT, margin)
    floor = ll.remainder_curve(low, PROMPT, margin, [1.0], progress=False).noise_floor
    assert half.meta["dtype"] == "bfloat16"
    assert 0.01 < floor < 1
    assert (half.adapted - exact.adapted).abs() < 3 * floor
    assert (half.base - exact.base).abs() < 3 * floor
    assert largest_difference(half.values, exact.values) < 0.3 * exact.values.abs().max()
