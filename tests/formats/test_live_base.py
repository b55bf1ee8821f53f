"""`ll.load(peft_model)`: the base within a PeftModel, and what no base can be taken out of."""

from __future__ import annotations

import warnings

import models
import peft
import pytest
import torch
from differences import largest_difference
from transformers import LlamaConfig, LlamaForCausalLM

import lens_lora as ll
from lens_lora.formats.live_layers import base_within

TOKENS = torch.tensor([[5, 6, 7, 1, 2, 3]])
CAN_TIE = hasattr(peft.LoraConfig(), "ensure_weight_tying")
pytestmark = pytest.mark.skipif(not CAN_TIE, reason="this PEFT ties no adapters")


def tied_base() -> LlamaForCausalLM:
    """A base in float64 whose head is its embedding, the same each time."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**{**models._ROTARY, "tie_word_embeddings": True}))
    base.config.architectures = ["LlamaForCausalLM"]
    return base.double().eval()


CONFIGS = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "copies": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
}


@pytest.mark.sample(4)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_a_tied_embedding_is_exact_live_and_from_its_folder(fields, tied, tmp_path):
    """PEFT's active adapter in float64. `ensure_weight_tying` gave torch's error of deep copies."""
    fields = {name: list(value) for name, value in fields.items()}
    config = peft.LoraConfig(
        **fields, r=2, init_lora_weights=False, ensure_weight_tying=tied, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tied_base(), config).double().eval()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.1 * noise.to(parameter)
        model.save_pretrained(tmp_path)
        expected = model(TOKENS).logits.detach()
        before = {name: (id(p), p._version) for name, p in model.named_parameters()}
        live = ll.load(model, tokenizer=models.tokenizer())
        saved = ll.load(tied_base(), tmp_path, tokenizer=models.tokenizer())
    assert largest_difference(expected, tied_base()(TOKENS).logits) > 1e-2, "control"
    for lens in (live, saved):
        torch.testing.assert_close(lens.logits(TOKENS), expected, rtol=0, atol=1e-12)
        base = tied_base()(TOKENS).logits.detach()
        torch.testing.assert_close(lens.logits(TOKENS, scale=0.0), base, rtol=0, atol=1e-12)
    assert before == {name: (id(p), p._version) for name, p in model.named_parameters()}
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=0)


def test_the_base_within_shares_its_tensors_and_no_module():
    """No weight is copied, and no hook or change of PEFT's modules reaches the base."""
    model = models.peft_model("llama", models.hf_model("llama"))
    live = model.get_base_model()
    base = base_within(model)
    assert not any("lora" in name for name, _ in base.named_modules())
    assert not {id(m) for m in base.modules()} & {id(m) for m in live.modules()}
    held = {id(p) for p in live.parameters()}
    assert all(id(p) in held for p in base.parameters())


def test_a_model_on_the_meta_device_is_refused():
    """Torch's own error came through: 'Cannot copy out of meta tensor; no data!'."""
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**models._ROTARY))
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=2))
    for call in (ll.Adapter.from_peft, ll.load):
        with pytest.raises(ll.errors.AdapterError, match="q_proj.* on the device 'meta'.*folder"):
            call(model)


def test_a_model_of_another_method_on_the_meta_device_is_refused():
    """An update of VeRA is measured, for which its weights have to be in memory."""
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**models._ROTARY))
        model = peft.get_peft_model(base, peft.VeraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ll.errors.AdapterError, match="on the device 'meta'|not in memory"):
        ll.Adapter.from_peft(model)
