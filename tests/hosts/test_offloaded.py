"""Weights that accelerate keeps on the CPU and brings in for each call: the same numbers."""

from __future__ import annotations

import copy

import accelerate
import limits
import models
import pytest
import torch
from every_call import CALLS, numbers

import lens_lora as ll
from lens_lora.compat import brought_in, home_of

pytestmark = [models.NEEDS_BRIDGE, pytest.mark.usefixtures("float64")]
NAMES = (
    *("logits", "first_order", "forward", "by token", "kl_shares", "generate", "components"),
    *("second_order", "path_attribution", "patch_sites", "patch_activations", "sweep"),
)
TARGETS = {"linear": None, "head": ["q_proj", "down_proj", "lm_head", "embed_tokens"]}


def offloaded(base):
    hf = copy.deepcopy(base)
    accelerate.cpu_offload(hf, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in hf.parameters())
    return hf


def made(hf, adapter: ll.Adapter) -> ll.LoraLens:
    return ll.load(hf, adapter, kind="TransformerBridge", tokenizer=models.tokenizer())


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("targets", TARGETS)
def test_the_numbers_of_the_model_that_is_at_hand(family: str, targets: str):
    base = models.hf_model(family)
    peft = models.peft_model(family, base, targets=TARGETS[targets])
    adapter = ll.Adapter.from_peft(peft)
    tokens = models.tokens()
    plain = made(copy.deepcopy(base), adapter)
    lens = made(offloaded(base), adapter)
    assert all(p.is_meta for p in lens.model.parameters())
    assert lens.device.type == "cpu"
    with torch.no_grad():
        assert torch.allclose(lens.logits(tokens), peft(tokens).logits, rtol=0, atol=1e-9)
    for name in NAMES if family == "llama" else NAMES[:3]:
        found = numbers(CALLS[name](lens, tokens))
        expected = numbers(CALLS[name](plain, tokens))
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-12, equal_nan=True), name
    assert all(p.is_meta for p in lens.model.parameters())  # and gone again


def test_dora_reads_the_base():
    base = models.hf_model("llama")
    peft = models.peft_model("llama", base, use_dora=True)
    tokens = models.tokens()
    lens = made(offloaded(base), ll.Adapter.from_peft(peft))
    with torch.no_grad():
        assert torch.allclose(lens.logits(tokens), peft(tokens).logits, rtol=0, atol=1e-9)


def test_blocks_that_run_again_bring_their_weights_in_again(monkeypatch: pytest.MonkeyPatch):
    base = models.hf_model("llama")
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base))
    tokens = models.tokens(1)
    lens = made(offloaded(base), adapter)
    readout = ll.Margin(5, 9)
    expected = ll.first_order(lens, tokens, readout).values
    limits.every_block_runs_again(monkeypatch)
    found = ll.first_order(lens.within(1e9), tokens, readout).values
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.bad_input
def test_what_cannot_be_exact_is_refused():
    base = models.hf_model("llama")
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base))
    lens = made(offloaded(base), adapter)
    tokens = models.tokens()
    rules = ll.results.FrozenRules(norm_scales=True)
    with pytest.raises(ll.errors.ModelStateError, match="offloaded.*Do not offload norms"):
        ll.first_order(lens, tokens, ll.Margin(5, 9), rules=rules)
    bridge = by_hand(offloaded(base))
    head = dict(bridge.unembed.original_component.named_parameters())
    if "bias" in head:  # transformer-lens 3 adds it, where accelerate does not know of it
        with pytest.raises(ll.errors.ModelStateError, match=r"unembed.*bias was added.*ll\.load"):
            ll.LoraLens(bridge, adapter)
    nowhere = copy.deepcopy(base)
    nowhere.lm_head.to("meta")
    with pytest.raises(ll.errors.ModelStateError, match=r"lm_head\.weight.*'meta'.*load_in_4bit"):
        made(nowhere, adapter)


def by_hand(hf):
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        "tiny/model", hf_model=hf, tokenizer=models.tokenizer(), device="cpu", dtype=hf.dtype
    ).eval()


@models.NEEDS_HOOKED_TRANSFORMER
@pytest.mark.bad_input
def test_a_hooked_transformer_copies_its_weights():
    base = models.hf_model("llama")
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base))
    with pytest.raises(
        ll.errors.ModelStateError, match="HookedTransformer copies.*TransformerBridge"
    ):
        ll.load(offloaded(base), adapter, kind="HookedTransformer", tokenizer=models.tokenizer())


def test_brought_in_and_away_again():
    hf = offloaded(models.hf_model("llama"))
    assert home_of(hf) == torch.device("cpu")
    with brought_in(hf.lm_head):
        assert not hf.lm_head.weight.is_meta
    assert hf.lm_head.weight.is_meta
