"""Architectures that are known from their own code alone, as a contributor would meet them.

One is a Llama whose attention doubles what it writes, another has a gain for each feature that o
reads. A bridge computes attention from the formula of Llama, and so leaves factor and gains out: it
is refused at first, and exact once a quirk is taught. Two others need nothing: a Llama whose blocks
double what attention writes, and one whose norms and MLPs have formulas of their own.
The oracle is PEFT's active adapter on the model.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import models
import pytest
import reference
import torch
import transformers as hf
from differences import largest_difference
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

import lens_lora as ll
from lens_lora.hosts import quirks

pytestmark = [models.NEEDS_BRIDGE, pytest.mark.usefixtures("float64")]
FACTOR = 2.0
MARGIN = ll.Margin(5, 9)
TARGETS = ["q_proj", "o_proj", "down_proj"]


class DoublingAttention(LlamaAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        written, weights = super().forward(*args, **kwargs)
        return FACTOR * written, weights


class DoublingForCausalLM(hf.LlamaForCausalLM):
    def __init__(self, config: hf.LlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = DoublingAttention(config, index)
        self.post_init()


class GainedAttention(LlamaAttention):
    """Each feature of z has a gain before o reads it."""

    def __init__(self, config: hf.LlamaConfig, index: int) -> None:
        super().__init__(config, index)
        width = config.num_attention_heads * self.head_dim
        self.gain = torch.nn.Parameter(torch.linspace(0.5, 2.0, width))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        k = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        z, weights = eager_attention_forward(self, q, k, v, attention_mask, scaling=self.scaling)
        return self.o_proj(self.gain * z.flatten(-2)), weights


class GainedForCausalLM(hf.LlamaForCausalLM):
    def __init__(self, config: hf.LlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = GainedAttention(config, index)
        self.post_init()


class ScaledResidualLayer(LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attention, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + FACTOR * attention
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ScaledResidualForCausalLM(hf.LlamaForCausalLM):
    def __init__(self, config: hf.LlamaConfig) -> None:
        super().__init__(config)
        for index in range(config.num_hidden_layers):
            self.model.layers[index] = ScaledResidualLayer(config, index)
        self.post_init()


def attention_is_doubled(hf_model: hf.PreTrainedModel) -> quirks.Mend | None:
    """The attention of a DoublingForCausalLM doubles what it writes, and a bridge's does not.

    Without the mend every logit is off. The factor acts on the output of o, behind `o.hook_out`.
    """
    if type(hf_model).__name__ != "DoublingForCausalLM":
        return None

    def mend(bridge: Any) -> None:
        for block in bridge.blocks:
            block.attn.o.register_forward_hook(lambda module, args, written: FACTOR * written)

    return mend


def features_have_gains(hf_model: hf.PreTrainedModel) -> quirks.Mend | None:
    """A GainedForCausalLM multiplies z by a gain before o reads it, and a bridge does not.

    The gain acts on what o reads, before `o.hook_in`, so that the site of o reads it as well.
    """
    if type(hf_model).__name__ != "GainedForCausalLM":
        return None

    def mend(bridge: Any) -> None:
        for block, layer in zip(bridge.blocks, hf_model.model.layers, strict=True):
            block.attn.o.register_forward_pre_hook(functools.partial(_gained, layer.self_attn.gain))

    return mend


def _gained(gain: torch.Tensor, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (gain * args[0], *args[1:])


def factor_in_the_weights(hf_model: hf.PreTrainedModel) -> quirks.Mend | None:
    """A mend that is right for the base model and wrong for every adapter of o."""

    def mend(bridge: Any) -> None:
        for layer in bridge.original_model.model.layers:
            with torch.no_grad():
                layer.self_attn.o_proj.weight.mul_(FACTOR)

    return mend


@pytest.fixture
def teach(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """The decorator `@quirk`, whose list is as it was after the test."""
    monkeypatch.setattr(quirks, "_QUIRKS", list(quirks._QUIRKS))
    return quirks.quirk


class OneMoreNorm(LlamaRMSNorm):
    """Its gain is 1 + γ."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        square = hidden_states.pow(2).mean(-1, keepdim=True)
        return (1 + self.weight) * hidden_states * torch.rsqrt(square + self.variance_epsilon)


class TanhMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.gate_proj(x)) * self.up_proj(x)
        return FACTOR * self.down_proj(hidden + 0.5)


class OwnFormulasForCausalLM(hf.LlamaForCausalLM):
    def __init__(self, config: hf.LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.input_layernorm = OneMoreNorm(config.hidden_size, config.rms_norm_eps)
            layer.mlp = TanhMLP(config)
        self.post_init()


QUIRKS = {
    DoublingForCausalLM: attention_is_doubled,
    GainedForCausalLM: features_have_gains,
}


def peft_of(base: hf.PreTrainedModel) -> PeftModel:
    """PEFT's adapter over a copy of the model, with random factors."""
    lora = LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS)
    peft = get_peft_model(copy.deepcopy(base), lora).eval()
    return models.with_random_factors(peft, base)


def lens_of(base: hf.PreTrainedModel, peft: PeftModel) -> ll.LoraLens:
    adapter = ll.Adapter.from_peft(peft)
    return ll.load(base, adapter, kind="TransformerBridge", tokenizer=models.tokenizer())


def loaded(
    architecture: type[hf.LlamaForCausalLM] = DoublingForCausalLM,
) -> tuple[PeftModel, ll.LoraLens]:
    config = hf.LlamaConfig(**models._ROTARY)
    base = models.randomised(architecture(config), 0, torch.float64)
    peft = peft_of(base)
    return peft, lens_of(base, peft)


@pytest.mark.bad_input
def test_what_is_no_function_is_no_quirk(teach: Callable[[Any], Any]):
    """It was taken, and failed at the next model."""
    with pytest.raises(ll.errors.ArgumentError, match="is no function of a Hugging Face model"):
        teach("DoublingForCausalLM")


def test_it_is_refused_before_it_is_taught():
    with pytest.raises(ll.errors.ModelStateError, match="the attention of this Doubling") as error:
        loaded()
    assert "attn='sdpa'" in str(error.value)


@pytest.mark.parametrize("architecture", QUIRKS, ids=lambda cls: cls.__name__)
def test_the_refusal_names_the_place_where_a_quirk_is_taught(
    architecture: type[hf.LlamaForCausalLM],
):
    """It named another version of TransformerLens, which cannot know a model's own code."""
    with pytest.raises(ll.errors.ModelStateError, match=r"@quirk \(lens_lora\.hosts\.quirks\)"):
        loaded(architecture)


@pytest.mark.parametrize("architecture", QUIRKS, ids=lambda cls: cls.__name__)
def test_logits_and_slopes_are_peft_s_once_it_is_taught(
    teach: Callable[[Any], Any], architecture: type[hf.LlamaForCausalLM]
):
    teach(QUIRKS[architecture])
    peft, lens = loaded(architecture)
    tokens = models.tokens()
    with torch.no_grad():
        expected = peft(tokens).logits
    torch.testing.assert_close(lens.logits(tokens), expected, rtol=0, atol=1e-11)

    def read(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 5] - logits[:, 9]

    for at in (0.0, 1.0):
        ours = ll.first_order(lens, tokens, MARGIN, at=at).values
        theirs = reference.peft_first_order(peft, tokens, read, list(lens.adapter.modules), at)
        expected = torch.stack([theirs[site.module] for site in lens.sites], 1)
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-9)


def test_its_patterns_have_hook_points(teach: Callable[[Any], Any]):
    """The other remedy, attn='sdpa', is exact as well, and has none."""
    teach(attention_is_doubled)
    _, lens = loaded()
    with torch.no_grad(), lens.applied() as model:
        _, cache = model.run_with_cache(models.tokens())
    assert "blocks.1.attn.hook_pattern" in cache
    written = FACTOR * cache["blocks.1.attn.o.hook_out"]
    torch.testing.assert_close(cache["blocks.1.hook_attn_out"], written, rtol=0, atol=1e-12)


def test_a_factor_that_passes_the_update_by_is_refused(teach: Callable[[Any], Any]):
    """Negative control: the base model's logits are right then, and an adapter's of o are not."""
    teach(factor_in_the_weights)
    with pytest.raises(ll.errors.ModelStateError, match="with random updates of the adapter's"):
        loaded()


def test_a_scaled_residual_needs_no_quirk():
    """A block's own forward is run by a bridge, so what it does between its modules is there."""
    config = hf.LlamaConfig(**models._ROTARY)
    base = models.randomised(ScaledResidualForCausalLM(config), 0, torch.float64)
    plain = hf.LlamaForCausalLM(config)
    plain.load_state_dict(base.state_dict())
    peft = peft_of(base)
    lens = lens_of(base, peft)
    with torch.no_grad():
        expected = peft(models.tokens()).logits
        of_plain = plain.eval()(models.tokens()).logits
        of_base = base(models.tokens()).logits
    torch.testing.assert_close(lens.logits(models.tokens()), expected, rtol=0, atol=1e-11)
    assert largest_difference(of_plain, of_base) > 1e-3


def test_norms_and_mlps_of_their_own_formula_need_nothing():
    """A bridge calls the model's own, also where the adapter has trained such a norm."""
    peft, lens = loaded(OwnFormulasForCausalLM)
    with torch.no_grad():
        expected = peft(models.tokens()).logits
    torch.testing.assert_close(lens.logits(models.tokens()), expected, rtol=0, atol=1e-11)

    gain = torch.linspace(-1.0, 2.0, models._ROTARY["hidden_size"])
    path = "model.layers.0.input_layernorm"
    adapter = ll.Adapter.from_factors({path: ll.results.TrainedModule(weight=gain)})
    tuned = copy.deepcopy(peft).unload()
    tuned.get_submodule(path).weight.data.copy_(gain)
    with torch.no_grad():
        expected = tuned(models.tokens()).logits
    found = lens.with_adapter(adapter).logits(models.tokens())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
