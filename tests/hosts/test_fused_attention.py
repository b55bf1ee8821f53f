"""attn='sdpa': the same function, and no [head, query, key] anywhere."""

from __future__ import annotations

import importlib
from typing import Any

import models
import pytest
import torch
from differences import largest_difference
from every_call import CALLS, same
from saved_tensors import saved
from shared_questions import MARGIN
from torch.utils._python_dispatch import TorchDispatchMode

import lens_lora as ll
from lens_lora.hosts.attention import fuse_attention
from lens_lora.hosts.build import hooked_model

pytestmark = models.NEEDS_BRIDGE
LONG = 23
HEAD = "transformer_lens.model_bridge.generalized_components.unembedding"


def pair(family: str) -> tuple[ll.LoraLens, ll.LoraLens]:
    """The lens over a bridge as it is, and over one with fused attention."""
    base = models.hf_model(family)
    peft = models.peft_model(family, base)
    plain = models.bridge(base)
    fused = models.bridge(base)
    fuse_attention(fused)
    adapter = ll.Adapter.from_peft(peft)
    return ll.LoraLens(plain, adapter), ll.LoraLens(fused, adapter)


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mixtral", "phi", "opt", "gptj"])
def test_the_same_numbers(family: str):
    """Grouped heads, norms of q and k, sliding windows, partial rotations, learned positions."""
    tokens = models.tokens(pos=11)
    with models.lifted():
        plain, fused = pair(family)
        for name in ("logits", "first_order", "forward", "coupling", "patch_sites", "generate"):
            found = CALLS[name](fused, tokens)
            expected = CALLS[name](plain, tokens)
            if name == "patch_sites":  # their noise floors are drawn
                found = found.values
                expected = expected.values
            assert same(found, expected, 1e-12), name


class Largest(TorchDispatchMode):
    """The largest tensor with two axes of the prompt's length, in heads."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-2:] == (LONG, LONG):
                self.heads = max(self.heads, tensor[..., 0, 0].numel())
        return out


def test_no_patterns_are_made():
    made = []
    for lens in pair("llama"):
        with Largest() as largest:
            ll.first_order(lens, models.tokens(1, LONG), MARGIN)
        made.append(largest.heads)
    assert made[0] == 4
    assert made[1] <= 1


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("family", "why"), [("gpt2", "one module"), ("gemma2", "capped"), ("gpt_neo", "has none")]
)
def test_families_that_cannot(family: str, why: str):
    with pytest.raises(ll.errors.ModelStateError, match=rf"{why}.*lens\.within"):
        fuse_attention(models.bridge(models.hf_model(family)))


@pytest.mark.bad_input
def test_what_needs_patterns_is_refused():
    _, fused = pair("llama")
    rules = ll.results.FrozenRules(attention_patterns=True)
    with pytest.raises(ll.errors.ModelStateError, match=r"hook_pattern.*never.*eager"):
        ll.first_order(fused, models.tokens(), MARGIN, rules=rules)
    name = "blocks.0.attn.hook_pattern"
    with pytest.warns(UserWarning), pytest.raises(ll.errors.ModelStateError, match=r"sdpa.*eager"):
        ll.patch_activations(fused, models.tokens(), MARGIN, name, positions=None, progress=False)
    with pytest.raises(ll.errors.ModelStateError, match=r"q_norm.*eager"):
        pair("qwen3")[1].plan.host.norm_ports(0, "q_norm")


@pytest.mark.sample(2)
@pytest.mark.parametrize("point", ["hook_pattern", "hook_attn_scores", "hook_rot_q"])
@pytest.mark.parametrize("way", ["applied", "list"])
def test_a_hook_that_cannot_fire_is_warned_of(point: str, way: str, recwarn):
    """A user's own hook: with patterns it acts, by a fused kernel there is a word of it."""
    plain, fused = pair("llama")
    tokens = models.tokens()
    hook = (f"blocks.1.attn.{point}", lambda x, hook: x * 0)

    def run(lens: ll.LoraLens) -> torch.Tensor:
        if way == "list":
            return lens.model.run_with_hooks(tokens, fwd_hooks=[*lens.fwd_hooks(), hook])
        with lens.applied():
            return lens.model.run_with_hooks(tokens, fwd_hooks=[hook])

    recwarn.clear()
    assert not torch.allclose(run(plain), plain.logits(tokens))
    assert torch.allclose(fused.logits(tokens), plain.logits(tokens), atol=1e-5)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=rf"{point}.*never fire.*eager"):
        run(fused)


@models.NEEDS_HOOKED_TRANSFORMER
@pytest.mark.bad_input
def test_a_hooked_transformer_always_has_patterns():
    base = models.hf_model("llama", dtype=torch.float32)
    with pytest.raises(ll.errors.ModelStateError, match="attn='sdpa'.*TransformerBridge"):
        hooked_model(base, None, kind="HookedTransformer", attn="sdpa")


def test_no_patterns_are_held_for_a_divergence():
    """Those of tangents are let go block by block. Control: the bridge as it is holds its own."""
    found = []
    held = []
    for lens in pair("llama"):
        with models.lifted(), saved() as graph:
            shares = ll.kl_shares(lens, models.tokens(pos=LONG), progress=False)
        found.append(shares.attribution.values)
        held.append(sum(tensor.shape[-2:] == (LONG, LONG) for tensor in graph))
    plain, fused = held
    assert fused == 0 < plain
    assert same(found[1], found[0], 1e-10)


# --- An attention with a forward of its own


def _halve(attention: Any) -> None:
    """It writes half of what its family's formula says."""
    forward = attention.forward

    def half(*args: Any, **kwargs: Any) -> Any:
        out, *rest = forward(*args, **kwargs)
        return 0.5 * out, *rest

    attention.forward = half


def half_attention(loaded_with: str = "eager") -> Any:
    base = models.hf_model("llama", dtype=torch.float32)
    base.set_attn_implementation(loaded_with)
    _halve(base.model.layers[1].self_attn)
    return base


def half_peft() -> tuple[Any, ll.Adapter]:
    """PEFT over a model with the same attention, and its adapter."""
    peft = models.peft_model("llama", models.hf_model("llama", dtype=torch.float32))
    _halve(peft.base_model.model.model.layers[1].self_attn)
    return peft, ll.Adapter.from_peft(peft)


def _require_peft_s(lens: ll.LoraLens, peft: Any) -> None:
    with torch.no_grad():
        expected = peft(models.tokens()).logits
    torch.testing.assert_close(lens.logits(models.tokens()), expected, rtol=0, atol=2e-5)


def test_an_attention_of_its_own_is_refused_with_what_helps():
    base = half_attention()
    _, adapter = half_peft()
    with pytest.raises(ll.errors.ModelStateError) as refused:
        ll.load(base, adapter, tokenizer=models.tokenizer())
    said = str(refused.value)
    assert "attn='sdpa'" in said
    assert "TransformerBridge computes for its family" in said
    assert "Another version" not in said


def test_what_helps_does():
    """The same model beside attn='sdpa', which a loaded model may have."""
    peft, adapter = half_peft()
    lens = ll.load(half_attention(), adapter, attn="sdpa", tokenizer=models.tokenizer())
    _require_peft_s(lens, peft)


def test_a_model_that_was_loaded_with_it_is_taken_as_it_is():
    peft, adapter = half_peft()
    with pytest.warns(UserWarning, match="loaded with 'sdpa'"):
        lens = ll.load(half_attention(loaded_with="sdpa"), adapter, tokenizer=models.tokenizer())
    assert not lens.plan.host.keeps_patterns
    _require_peft_s(lens, peft)


def test_in_half_precision_too():
    """Where logits are not compared, as rounding moves them as far."""
    _, adapter = half_peft()
    with pytest.raises(ll.errors.ModelStateError, match="attn='sdpa'"):
        ll.load(half_attention().bfloat16(), adapter, tokenizer=models.tokenizer())
    options = {"attn": "sdpa", "tokenizer": models.tokenizer()}
    own = ll.load(half_attention().bfloat16(), adapter, **options).logits(models.tokens())
    base = models.hf_model("llama", dtype=torch.bfloat16)
    usual = ll.load(base, adapter, **options).logits(models.tokens())
    assert largest_difference(own, usual) > 0.5


def test_where_it_does_not_help_it_is_not_said(monkeypatch: pytest.MonkeyPatch):
    """Another error than that of attention: a bridge whose head is not the model's."""
    head = importlib.import_module(HEAD).UnembeddingBridge
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda *args, **kwargs: forward(*args, **kwargs).flip(-1))
    base = models.hf_model("llama", dtype=torch.float32)
    _, adapter = half_peft()
    with pytest.raises(ll.errors.ModelStateError, match="Another version") as refused:
        ll.load(base, adapter, tokenizer=models.tokenizer())
    assert "sdpa" not in str(refused.value)
    assert "its TransformerBridge" not in str(refused.value)
