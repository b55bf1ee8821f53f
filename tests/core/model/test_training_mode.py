"""A model in training that draws random numbers is refused; one that draws none is not."""

from __future__ import annotations

import models
import pytest
import torch
import transformers
from differences import largest_difference

import lens_lora as ll
from lens_lora.core.model.check import refuse_random_numbers
from lens_lora.core.model.modules import modules_of
from lens_lora.errors import ModelStateError

_EXPERTS = {
    "vocab_size": models.VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
}


def _dbrx(jitter: float) -> transformers.PreTrainedModel:
    # transformers 5 has the width of the experts' input in their own configuration.
    width = {"hidden_size": 16} if models.major_version("transformers") >= 5 else {}
    experts = {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}
    config = transformers.DbrxConfig(
        d_model=16,
        n_heads=4,
        n_layers=1,
        vocab_size=models.VOCAB,
        max_seq_len=32,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={**experts, "moe_jitter_eps": jitter, **width},
    )
    return transformers.DbrxForCausalLM(config)


def _mixtral(jitter: float) -> transformers.PreTrainedModel:
    config = transformers.MixtralConfig(**_EXPERTS, router_jitter_noise=jitter)
    return transformers.MixtralForCausalLM(config)


def _minimax(jitter: float) -> transformers.PreTrainedModel:
    config = transformers.MiniMaxConfig(**_EXPERTS, head_dim=4, router_jitter_noise=jitter)
    return transformers.MiniMaxForCausalLM(config)


def _phimoe(jitter: float) -> transformers.PreTrainedModel:
    config = transformers.PhimoeConfig(
        **_EXPERTS, router_jitter_noise=0.0, input_jitter_noise=jitter
    )
    return transformers.PhimoeForCausalLM(config)


def _llama(rate: float) -> transformers.PreTrainedModel:
    """Its attention has a rate of its own, of which the configuration knows nothing."""
    model = models.hf_model("llama", dtype=torch.float32)
    model.model.layers[0].self_attn.attention_dropout = rate
    return model


def _opt(rate: float) -> transformers.PreTrainedModel:
    """Whole layers are left out."""
    config = transformers.OPTConfig(
        vocab_size=models.VOCAB,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        dropout=0.0,
        layerdrop=rate,
    )
    return transformers.OPTForCausalLM(config)


def _with_module(module: torch.nn.Module) -> transformers.PreTrainedModel:
    model = models.hf_model("llama", dtype=torch.float32)
    model.model.layers[0].mlp.act_fn = module
    return model


RANDOM = {
    "Mixtral": (_mixtral, 0.1, "jitter_noise=0.1"),
    "DBRX": (_dbrx, 0.1, "moe_jitter_eps=0.1"),
    "MiniMax": (_minimax, 0.1, "jitter_noise=0.1"),
    "Phi-3.5-MoE": (_phimoe, 0.1, "choice of experts by chance"),
    "an attention's own rate": (_llama, 0.5, "layers.0.self_attn: attention_dropout=0.5"),
    "layers left out": (_opt, 0.5, "layerdrop=0.5"),
    "another dropout": (lambda p: _with_module(torch.nn.AlphaDropout(p)), 0.5, "dropout 0.5"),
    "a whole number": (lambda p: _with_module(torch.nn.Dropout(int(2 * p))), 0.5, "dropout 1"),
}


@pytest.mark.parametrize("make, rate, words", RANDOM.values(), ids=RANDOM)
def test_random_numbers_in_training(make, rate: float, words: str):
    """The oracle is the model itself, of which two runs do not agree."""

    def difference(model: transformers.PreTrainedModel) -> float:
        torch.manual_seed(0)
        tokens = models.tokens()
        with torch.no_grad():
            runs = [model(tokens).logits for _ in range(6)]
        return max(largest_difference(run, runs[0]) for run in runs)

    model = make(rate).train()
    if words != "dropout 1":  # which leaves nothing to chance, and nothing of the activation
        assert difference(model) > 1e-6
    with pytest.raises(ModelStateError, match=words) as error:
        refuse_random_numbers(model, modules_of(model))
    assert "call model.eval()" in str(error.value)
    refuse_random_numbers(model.eval(), modules_of(model))
    assert difference(model) == 0
    if make is not _phimoe:
        without = make(0.0).train()
        refuse_random_numbers(without, modules_of(without))
        assert difference(without) == 0, "the control: training without random numbers"


@models.NEEDS_BRIDGE
def test_a_router_s_noise_is_refused_by_every_call():
    hf_model = models.hf_model("mixtral", dtype=torch.float32)
    for block in hf_model.model.layers:
        mixture = block.mlp if hasattr(block, "mlp") else block.block_sparse_moe
        mixture.jitter_noise = 0.1
    own_adapter = ll.Adapter.from_peft(models.peft_model("mixtral", hf_model))
    model = models.bridge(hf_model)
    lens = ll.LoraLens(model, own_adapter)
    expected = lens.logits(models.tokens())
    model.original_model.train()
    for call in (
        lambda: lens.logits(models.tokens()),
        lambda: ll.first_order(lens, models.tokens(), ll.Margin(5, 9)),
        lambda: ll.LoraLens(model, own_adapter),
    ):
        with pytest.raises(ModelStateError, match=r"jitter_noise=0\.1 is active"):
            call()
    model.eval()
    assert torch.equal(lens.logits(models.tokens()), expected)
