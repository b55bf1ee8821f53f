"""A cap of attention scores in Gemma 3's configuration: a bridge computes it, its base does not."""

from __future__ import annotations

import functools

import models
import pytest
import torch
import transformers as hf

import lens_lora as ll
from lens_lora.hosts import unusable
from lens_lora.hosts.build import hooked_model

pytestmark = [models.NEEDS_BRIDGE, pytest.mark.usefixtures("float64")]
MODELS = {
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig),
}


def with_a_cap(family: str) -> hf.PreTrainedModel:
    model, config = MODELS[family]
    return model(config(**models._GEMMA, attn_logit_softcapping=0.5))


@pytest.fixture(autouse=True)
def capped(monkeypatch: pytest.MonkeyPatch):
    """Both families with a cap that many scores reach."""
    for family in MODELS:
        monkeypatch.setitem(models.FAMILIES, family, functools.partial(with_a_cap, family))


@pytest.mark.parametrize("family", MODELS)
def test_logits_are_peft_s(family: str):
    """Of a bridge that is built here: Gemma 2's cap stays, Gemma 3's goes."""
    base = models.hf_model(family)
    peft = models.peft_model(family, base)
    model, _ = hooked_model(base, models.tokenizer(), kind="TransformerBridge")
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    tokens = models.tokens()
    with torch.no_grad():
        assert torch.allclose(lens.logits(tokens), peft(tokens).logits, rtol=0, atol=1e-9)


@pytest.mark.bad_input
def test_a_bridge_of_another_function_is_refused(monkeypatch: pytest.MonkeyPatch):
    """In every dtype, without a forward pass; and without the check logits are off (control)."""
    base = models.hf_model("gemma3")
    peft = models.peft_model("gemma3", base)
    model = models.bridge(base)
    adapter = ll.Adapter.from_peft(peft)
    tokens = models.tokens()
    with pytest.raises(ll.errors.ModelStateError, match=r"attn_logit_softcapping = 0\.5.*None"):
        ll.LoraLens(model, adapter)
    monkeypatch.setattr(unusable, "refuse_unused_caps", lambda modules: None)
    off = ll.LoraLens(model, adapter).logits(tokens) - peft(tokens).logits
    assert off.abs().max() > 1e-2
