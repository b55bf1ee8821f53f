"""A lens on a family that no entry lists is compared with the Hugging Face model."""

from __future__ import annotations

import copy
import json

import architectures
import models
import pytest
import torch
import transformers as hf
from differences import largest_difference
from passes import passes
from peft import LoraConfig, get_peft_model

import lens_lora as ll
from lens_lora.errors import AdapterError, ModelStateError, SiteError
from lens_lora.hosts import bridged

pytestmark = models.NEEDS_NEWEST


def parts(name: str, dtype: torch.dtype = torch.float32):
    """(base, a bridge of a copy of it, an adapter)."""
    base = architectures.hf_model(name, dtype=dtype)
    adapter = ll.Adapter.from_peft(architectures.peft_model(name, base))
    return base, models.bridge(base), adapter


def bypass_hooks(component) -> None:
    """Make the component compute past its hook points.

    An assignment would not do: a component of a bridge passes it on to the module that it wraps.
    """
    vars(component)["forward"] = component.original_component.forward


@pytest.mark.parametrize("name", ["Granite", "GLM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sound_bridge_passes_with_its_base(name: str, dtype: torch.dtype):
    base, model, adapter = parts(name, dtype)
    assert ll.LoraLens(model, adapter, hf_model=base).sites


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sound_bridge_without_fused_projections_passes_alone(dtype: torch.dtype):
    _, model, adapter = parts("Granite", dtype)
    assert ll.LoraLens(model, adapter).sites


def test_a_permuted_layout_of_a_fused_projection_is_caught(monkeypatch: pytest.MonkeyPatch):
    base, model, adapter = parts("Falcon, interleaved")
    original = bridged._parts_of

    def one_row_off(*args):
        return [(part, rows.roll(1)) for part, rows in original(*args)]

    monkeypatch.setattr(bridged, "_parts_of", one_row_off)
    with pytest.raises(ModelStateError, match="turns hf_model's weight into"):
        ll.LoraLens(model, adapter, hf_model=base)
    with pytest.raises(ModelStateError, match=r"with random updates.* writes up to"):
        ll.load(base, adapter, tokenizer=models.tokenizer())


@pytest.mark.parametrize("with_base", [True, False])
def test_a_dead_hook_is_caught(with_base: bool):
    base, model, adapter = parts("OLMo 2")
    bypass_hooks(model.blocks[1].mlp.gate)
    with pytest.raises(ModelStateError, match=r"blocks\.1\.mlp\.gate .*writes 0 times"):
        ll.LoraLens(model, adapter, hf_model=base if with_base else None)
    # Without the check, the dead hook goes unnoticed.
    assert ll.LoraLens(model, adapter, check=False).sites


def test_a_module_in_two_places_is_caught():
    """PEFT would adapt the module in one of the two places only."""
    base = architectures.hf_model("OLMo 2", dtype=torch.float32)
    adapter = ll.Adapter.from_peft(architectures.peft_model("OLMo 2", base))
    layers = base.model.layers
    layers[1].mlp.down_proj = layers[0].mlp.down_proj
    with pytest.raises(
        ModelStateError, match=r"0\.mlp\.down_proj and .*1\.mlp\.down_proj are one module"
    ):
        ll.LoraLens(models.bridge(base), adapter)


def test_a_fused_projection_needs_the_base():
    base, model, adapter = parts("GLM")
    with pytest.raises(ModelStateError, match="only the base can tell.*hf_model="):
        ll.LoraLens(model, adapter)
    loaded = ll.load(copy.deepcopy(base), adapter, tokenizer=models.tokenizer())
    tokens = models.tokens()
    ours = ll.LoraLens(model, adapter, hf_model=base).logits(tokens)
    assert torch.equal(loaded.logits(tokens), ours)


def test_an_adapter_of_modules_that_were_probed_before_costs_no_pass():
    _, model, adapter = parts("OLMo 2")
    lens = ll.LoraLens(model, adapter.only("*.q_proj"))
    with passes(lens) as seen:
        lens.with_adapter(adapter.only("*.q_proj").scaled(0.5))
    assert seen == []
    # Control: the same count sees the probe of other modules.
    with passes(lens) as seen:
        lens.with_adapter(adapter.only("*.v_proj"))
    assert seen != []


def test_an_adapter_of_other_modules_is_probed_too():
    _, model, adapter = parts("OLMo 2")
    lens = ll.LoraLens(model, adapter.only("*.q_proj"))
    bypass_hooks(model.blocks[0].mlp.gate)
    with pytest.raises(ModelStateError, match="writes 0 times"):
        lens.with_adapter(adapter)


def test_processed_weights_need_an_entry():
    base, model, adapter = parts("OLMo 2")
    model.enable_compatibility_mode()
    with pytest.raises(ModelStateError, match=r"Olmo2.*before enable_compatibility_mode"):
        ll.LoraLens(model, adapter, hf_model=base)


@pytest.mark.parametrize("name", ["OLMo 2", "Cohere", "VaultGemma"])
def test_a_trained_norm_is_a_site(name: str):
    """Whatever formula the norm has, and whether it stores γ or γ − 1."""
    base = architectures.hf_model(name, dtype=torch.float64)
    trained = copy.deepcopy(base)
    generator = models.seeded(5)
    changes: dict[str, ll.results.TrainedModule] = {}
    for path, module in trained.named_modules():
        is_a_norm = path.endswith(("layernorm", "model.norm"))
        weight = getattr(module, "weight", None)
        if is_a_norm and weight is not None:
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator).double()
            changes[path] = ll.results.TrainedModule(weight.detach().clone())
    assert changes
    lens = ll.LoraLens(models.bridge(base), ll.Adapter.from_factors(changes), hf_model=base)
    tokens = models.tokens()
    with torch.no_grad():
        expected = trained(tokens).logits
    # These norms compute in float32, whatever the model's dtype.
    assert largest_difference(lens.logits(tokens), expected) < 1e-5
    assert largest_difference(lens.logits(tokens, 0.0), expected) > 0.1


def test_a_split_by_head_is_refused_where_heads_are_not_known():
    lens = architectures.case("Qwen3-Next").lens
    with pytest.raises(ModelStateError, match=r"attn.* cannot be split by head"):
        ll.first_order(lens, models.tokens(), ll.Margin(5, 9), by="head")


# --- bad input


def adapter_of(model: torch.nn.Module, targets: list[str]) -> ll.Adapter:
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=targets))
    return ll.Adapter.from_peft(peft)


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 61}
NO_DECODERS = {
    "encoder": lambda: hf.BertForMaskedLM(hf.BertConfig(**TINY, intermediate_size=24)),
    "encoder-decoder": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2, vocab_size=61)
    ),
    "no head": lambda: hf.LlamaModel(hf.LlamaConfig(**TINY, intermediate_size=24)),
}


@pytest.mark.parametrize("name", NO_DECODERS)
def test_what_is_no_decoder_is_refused(name: str):
    base = NO_DECODERS[name]().eval()
    adapter = adapter_of(base, ["q", "query", "q_proj"])
    with pytest.raises(ModelStateError, match="Pass a decoder"):
        ll.load(base, adapter, tokenizer=models.tokenizer())


def test_a_convolution_is_refused():
    """A state-space layer's convolution is no linear module."""
    config = hf.MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=61)
    base = hf.MambaForCausalLM(config).eval()
    factors = ll.LoRAFactors(torch.ones(2, 4), torch.ones(32, 2))
    adapter = ll.Adapter.from_factors({"backbone.layers.0.mixer.conv1d": factors})
    with pytest.raises(SiteError, match=r"conv1d.*no such linear module"):
        ll.load(base, adapter, tokenizer=models.tokenizer())


def test_another_size_of_the_family_is_refused():
    base, model, _ = parts("OLMo 2")
    factors = ll.LoRAFactors(torch.ones(2, 32), torch.ones(32, 2))
    adapter = ll.Adapter.from_factors({"model.layers.0.self_attn.q_proj": factors})
    with pytest.raises(AdapterError, match="the adapter maps 32→32, the model 16→16"):
        ll.LoraLens(model, adapter, hf_model=base)


def test_remote_code_is_not_started(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Nor is the user asked whether to run it, as transformers does at a terminal."""
    questions: list[str] = []

    def allow(question: str = "") -> str:
        questions.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", allow)
    config = {
        "model_type": "nobody",
        "auto_map": {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "x.py").write_text("raise SystemExit('started')\n")
    factors = ll.LoRAFactors(torch.ones(2, 32), torch.ones(32, 2))
    with pytest.raises(ModelStateError, match="runs code of its own"):
        ll.load(tmp_path, ll.Adapter.from_factors({"a": factors}))
    assert questions == []


def test_a_bridge_that_differs_from_its_base_is_refused():
    """The error says by how much the logits differ, and their range."""
    base, model, adapter = parts("OLMo 2")
    with torch.no_grad():
        model.blocks[0].ln1_post.original_component.weight.mul_(1.5)
    with pytest.raises(ModelStateError, match=r"other logits than hf_model: .* off, of a range"):
        ll.LoraLens(model, adapter, hf_model=base)
