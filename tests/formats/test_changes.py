"""Several adapters at once, and any weight change as an adapter: against PEFT and merges."""

from __future__ import annotations

import copy
import dataclasses

import cases
import models
import pytest
import torch
from differences import largest_difference
from peft import LoraConfig

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")
EXACT = 1e-9
MARGIN = ll.Margin(5, 9)


@pytest.fixture(params=models.MAKERS)
def cls(request) -> str:
    return request.param


def two_adapters(family: str, base):
    """One PeftModel with two random adapters, both active at once through weighted scales."""
    peft = models.peft_model(family, base)
    with torch.no_grad():
        peft.add_adapter("second", LoraConfig(target_modules=models.LINEARS[family][:2], r=2))
        generator = models.seeded(11)
        for name, p in peft.named_parameters():
            if "second" in name:
                p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3
    return peft


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("flags", ["raw", "processed"])
def test_a_sum_of_adapters_is_both_at_once(family: str, flags: str, cls: str):
    """f(1) of a weighted sum equals PEFT with both adapters active at those weights."""
    base = models.hf_model(family)
    tokens = models.tokens()
    peft = two_adapters(family, base)
    first = ll.Adapter.from_peft(peft, "default").named("first").scaled(0.7)
    second = ll.Adapter.from_peft(peft, "second").scaled(-0.4)
    peft.base_model.set_adapter(["default", "second"])
    for module in peft.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            for name, weight in (("default", 0.7), ("second", -0.4)):
                if name in module.scaling:
                    module.scaling[name] *= weight
    model = models.MAKERS[cls](base, **cases.FLAGS[flags])
    lens = ll.LoraLens(model, first + second, hf_model=base)
    with torch.no_grad():
        expected = cases.centred(peft(tokens).logits)
    assert largest_difference(cases.centred(lens.logits(tokens)), expected) < EXACT


def test_parts_of_a_sum_stay_separate(cls: str):
    """Each part's first order in the sum is its own alone; the joint shift is not their sum."""
    base = models.hf_model("llama")
    tokens = models.tokens()
    peft = two_adapters("llama", base)
    first, second = (ll.Adapter.from_peft(peft, n).named(n) for n in ("default", "second"))
    model = models.MAKERS[cls](base)
    both = ll.first_order(ll.LoraLens(model, first + second), tokens, MARGIN)
    names = [s.name for s in both.sites]
    assert {s.adapter for s in both.sites} == {"default", "second"}
    for part in (first, second):
        alone = ll.first_order(ll.LoraLens(model, part), tokens, MARGIN)
        where = [names.index(f"{s.name}@{part.name}") for s in alone.sites]
        assert largest_difference(both.values[:, where], alone.values) < 1e-10
    lens = ll.LoraLens(model, first + second)
    only_second = lens.logits(tokens, {"*@second": 1.0})
    assert largest_difference(only_second, ll.LoraLens(model, second).logits(tokens)) < EXACT


def test_globs_on_a_sum_and_what_cannot_be_added():
    """Globs see the path and the name; the same name, another base, and DoRA twice are refused."""
    base = models.hf_model("llama")
    a = ll.Adapter.from_peft(models.peft_model("llama", base))
    b = a.named("b")
    both = a.named("a") + b
    assert len(both) == 2 * len(a)
    assert len(both.only("*@b")) == len(a)
    assert len(both.only("*.q_proj")) == 4
    assert len(both.without_modules("*@a")) == len(a)
    with pytest.raises(ll.errors.AdapterError, match="both adapters are called 'default'.*named"):
        _ = a + a
    with pytest.raises(ll.errors.AdapterError, match="names the base 'x'.*'y'"):
        _ = ll.Adapter(a.modules, "a", "x") + ll.Adapter(a.modules, "b", "y")
    with pytest.raises(ll.errors.AdapterError, match="names the base 'owner/x'.*'models/x'"):
        _ = ll.Adapter(a.modules, "a", "owner/x") + ll.Adapter(a.modules, "b", "models/x")
    elsewhere = ll.Adapter(a.modules, "b", "models/x")  # the remedy that the message names:
    both = ll.Adapter(a.modules, "a", "x") + dataclasses.replace(elsewhere, base_model="x")
    assert both.base_model == "x"
    dora = ll.Adapter.from_peft(models.peft_model("llama", base, use_dora=True)).named("dora")
    with pytest.raises(ll.errors.AdapterError, match="_proj is adapted twice, once by DoRA"):
        _ = a + dora


def fine_tuned(base):
    """Every linear weight and bias moved at full rank, as a fine-tune does; norms left alone."""
    tuned = copy.deepcopy(base)
    generator = models.seeded(5)
    with torch.no_grad():
        for module in tuned.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.nn.Parameter) and weight.ndim == 2:
                for p in (weight, getattr(module, "bias", None)):
                    if p is not None:
                        p += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return tuned


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", ["gpt2", "neox", "qwen2"])
@pytest.mark.parametrize("flags", ["raw", "processed"])
def test_a_full_fine_tune_is_an_adapter(family: str, flags: str, cls: str):
    """f(1) of Adapter.between is the tuned model, and everything else works on it."""
    base = models.hf_model(family)
    tokens = models.tokens()
    tuned = fine_tuned(base)
    adapter = ll.Adapter.between(base, tuned, progress=False)
    model = models.MAKERS[cls](base, **cases.FLAGS[flags])
    lens = ll.LoraLens(model, adapter, hf_model=base)
    with torch.no_grad():
        expected, plain = (cases.centred(m(tokens).logits) for m in (tuned, base))
    assert largest_difference(cases.centred(lens.logits(tokens)), expected) < EXACT
    assert largest_difference(expected, plain) > 0.1
    reverse = ll.first_order(lens, tokens, MARGIN)
    forward = ll.first_order(lens, tokens, MARGIN, mode="forward", progress=False)
    assert largest_difference(reverse.values, forward.values) < 1e-10 * reverse.values.abs().max()


def test_tied_embeddings_change_at_both_ends(cls: str):
    """GPT-2's tied matrix is the embedding and the head: both are sites, and f(1) is exact."""
    base = models.hf_model("gpt2")
    tokens = models.tokens()
    tuned = copy.deepcopy(base)
    weight = tuned.transformer.wte.weight
    assert tuned.lm_head.weight is weight
    with torch.no_grad():
        weight += 0.05 * torch.randn(weight.shape, generator=models.seeded(5), dtype=weight.dtype)
    adapter = ll.Adapter.between(base, tuned, progress=False)
    assert set(adapter.modules) == {"transformer.wte", "lm_head"}
    lens = ll.LoraLens(models.MAKERS[cls](base), adapter)
    with torch.no_grad():
        expected = tuned(tokens).logits
    assert largest_difference(lens.logits(tokens), expected) < EXACT
    for end in adapter.modules:
        alone = lens.with_adapter(adapter.only(end)).logits(tokens)
        assert largest_difference(alone, expected) > 0.01


def test_truncation_states_its_error():
    """‖ΔW − ΔW_r‖ / ‖ΔW‖ as stated; nothing is lost at full rank, nor for a merged LoRA at its."""
    base = models.hf_model("llama")
    tuned = fine_tuned(base)
    exact = ll.Adapter.between(base, tuned, progress=False)
    cut = ll.Adapter.between(base, tuned, rank=3, progress=False)
    for path, factors in cut.modules.items():
        whole = exact.modules[path].materialise()
        error = (factors.materialise() - whole).norm() / whole.norm()
        assert float(error) == pytest.approx(cut.truncation_error[path], rel=1e-9)
        assert factors.rank == 3
        assert error > 0.1
        sizes = torch.linalg.svdvals(whole)
        assert float(error) == pytest.approx(float(sizes[3:].norm() / sizes.norm()), rel=1e-9)
        assert torch.allclose(factors.B.norm(dim=0), sizes[:3], rtol=1e-9)
    merged = copy.deepcopy(models.peft_model("llama", base)).merge_and_unload()
    again = ll.Adapter.between(base, merged, rank=3, progress=False)
    assert len(again) == 14
    assert again.truncation_error.keys() == again.modules.keys()
    # `max` would pass over a NaN.
    assert all(error < 1e-12 for error in again.truncation_error.values())


def test_pissa_against_the_true_base(cls: str):
    """An initialisation that changes the base is read right from the two models."""
    base = models.hf_model("llama")
    tokens = models.tokens()
    peft = models.peft_model("llama", base, init_lora_weights="pissa")
    with pytest.raises(ll.errors.UnsupportedAdapterError, match="pissa"):
        ll.Adapter.from_peft(peft)
    with torch.no_grad():
        expected = peft(tokens).logits
    merged = copy.deepcopy(peft).merge_and_unload()
    lens = ll.LoraLens(models.MAKERS[cls](base), ll.Adapter.between(base, merged, progress=False))
    assert largest_difference(lens.logits(tokens), expected) < EXACT


def test_what_between_refuses():
    """Two models with equal weights, two architectures, and a rank of zero."""
    base = models.hf_model("llama")
    with pytest.raises(ll.errors.AdapterError, match="same weights"):
        ll.Adapter.between(base, copy.deepcopy(base), progress=False)
    with pytest.raises(ll.errors.AdapterError, match="same architecture|does not"):
        ll.Adapter.between(base, models.hf_model("gpt2"), progress=False)
    tuned = fine_tuned(base)
    with torch.no_grad():
        tuned.model.norm.weight.add_(0.1)
    left_out = ll.Adapter.between(base, tuned, ignore=("*norm*",), progress=False)
    assert "model.norm" not in left_out.modules
    with pytest.raises(ll.errors.AdapterError, match="rank=0"):
        ll.Adapter.between(base, tuned, rank=0, progress=False)


def test_between_names_a_model_that_a_bridge_took_over(cls: str):
    """A bridge changes the model that it is given, in place."""
    base = models.hf_model("llama")
    tuned = fine_tuned(models.hf_model("llama"))
    hooked = models.MAKERS[cls](base)
    taken = getattr(hooked, "original_model", hooked)
    for pair in ((taken, tuned), (tuned, taken)):
        with pytest.raises(ll.errors.AdapterError, match="a TransformerBridge changes"):
            ll.Adapter.between(*pair, progress=False)


def test_between_refuses_experts_in_one_parameter():
    base = models.hf_model("mixtral")
    tuned = models.hf_model("mixtral")
    experts = [p for name, p in tuned.named_parameters() if "experts" in name]
    if all(p.ndim == 2 for p in experts):
        pytest.skip("before transformers 5 each expert is a linear module")
    with torch.no_grad():
        for p in experts:
            p.add_(0.1)
    with pytest.raises(ll.errors.AdapterError, match="no linear module.*experts.*ignore"):
        ll.Adapter.between(base, tuned, progress=False)


@pytest.mark.parametrize("config", [{"bias": "lora_only"}, {"use_dora": True}, {"lora_bias": True}])
def test_a_scaled_adapter_is_a_gate(config: dict, cls: str):
    """adapter.scaled(c) is the gate c, also where biases or magnitudes were trained."""
    base = models.hf_model("gpt2")
    tokens = models.tokens()
    peft = models.peft_model("gpt2", base, **config)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "base_layer.bias" in name or "magnitude" in name:
                p.mul_(1.3)
    adapter = ll.Adapter.from_peft(peft)
    model = models.MAKERS[cls](base)
    whole = ll.LoraLens(model, adapter, hf_model=base)
    half = ll.LoraLens(model, adapter.scaled(0.5), hf_model=base)
    assert largest_difference(half.logits(tokens), whole.logits(tokens, 0.5)) < EXACT
    assert largest_difference(half.logits(tokens), whole.logits(tokens)) > 0.1


OTHER_FUNCTIONS = {
    "rope_theta": ("llama", {"rope_theta": 5e5}, "rope_theta is 10000.0 and 500000.0"),
    "rms_norm_eps": ("llama", {"rms_norm_eps": 0.3}, "rms_norm_eps is 1e-06 and 0.3"),
    "hidden_act": ("llama", {"hidden_act": "gelu"}, "hidden_act is 'silu' and 'gelu'"),
    "LayerNorm's eps": ("gpt2", {"layer_norm_epsilon": 0.3}, "layer_norm_epsilon is 1e-05 and 0.3"),
    "attention's scale": ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is True"),
    "soft cap": ("gemma2", {"final_logit_softcapping": 5.0}, "final_logit_softcapping is 30.0"),
    "query's scale": ("gemma2", {"query_pre_attn_scalar": 9}, "query_pre_attn_scalar is 4 and 9"),
    "window": ("mistral", {"sliding_window": 4}, "sliding_window is None and 4"),
    "parallel blocks": ("neox", {"use_parallel_residual": False}, "use_parallel_residual is True"),
}


def rebuilt(family: str, fields: dict) -> torch.nn.Module:
    """The family's tiny model with other fields in its config, and a fine-tune's weights."""
    base = models.hf_model(family)
    fields = dict(fields)
    theta = fields.pop("rope_theta", None)
    config = type(base.config)(**{**base.config.to_dict(), **fields})
    if theta is not None and getattr(config, "rope_parameters", None):
        config.rope_parameters = {**config.rope_parameters, "rope_theta": theta}
    elif theta is not None:
        config.rope_theta = theta
    config._attn_implementation = "eager"
    tuned = type(base)(config).eval().to(torch.float64)
    tuned.load_state_dict(fine_tuned(base).state_dict())
    return tuned


@pytest.mark.parametrize("family, fields, said", OTHER_FUNCTIONS.values(), ids=OTHER_FUNCTIONS)
def test_models_that_are_other_functions(family: str, fields: dict, said: str):
    """The base with ΔW is not the tuned model (seen in Hugging Face); the field is named."""
    base = models.hf_model(family)
    tuned = rebuilt(family, fields)
    tokens = models.tokens()
    with torch.no_grad():
        expected = tuned(tokens).logits
        moved = copy.deepcopy(base)
        moved.load_state_dict(tuned.state_dict())
        assert largest_difference(moved(tokens).logits, expected) > 1e-4
    with pytest.raises(ll.errors.AdapterError, match=f"different functions.*{said}"):
        ll.Adapter.between(base, tuned, progress=False)


def _other_activation(model):
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()


def _other_rotation(model):
    model.model.rotary_emb.inv_freq *= 0.5


def _a_hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: 2 * out)


@pytest.mark.parametrize("change", [_other_activation, _other_rotation, _a_hook])
def test_other_functions_of_the_same_configuration(change):
    """What no config tells, the logits do."""
    base = models.hf_model("llama")
    tuned = fine_tuned(base)
    assert len(ll.Adapter.between(base, tuned, progress=False)) == 16
    change(tuned)
    with pytest.raises(
        ll.errors.AdapterError, match="does not compute the tuned model's logits: they differ"
    ):
        ll.Adapter.between(base, tuned, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_decides_no_logits_may_differ(dtype):
    """Names, versions, dropout, how far positions go; half precision; train mode."""
    base = models.hf_model("llama", dtype=dtype)
    tuned = fine_tuned(base).train()
    for field, value in {
        "_name_or_path": "lab/tuned",
        "max_position_embeddings": 64,
        "attention_dropout": 0.5,
        "use_cache": False,
        "eos_token_id": 7,
    }.items():
        setattr(tuned.config, field, value)
    assert len(ll.Adapter.between(base, tuned, progress=False)) == 16
    assert tuned.training
    assert tuned.model.layers[0].self_attn.training
    assert not base.training


@pytest.mark.bad_input
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "bloom"])
def test_a_full_fine_tune_with_its_norms(family: str, cls: str, tmp_path):
    """Every parameter moved: the tuned model itself, exact and at half strength."""
    base = models.hf_model(family)
    tuned = models.hf_model(family)
    generator = models.seeded(13)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if (family, cls) != ("bloom", "HookedTransformer") or "embeddings.weight" not in name:
                p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    half = copy.deepcopy(tuned)
    with torch.no_grad():
        for p, old in zip(half.parameters(), base.parameters(), strict=True):
            p.copy_((p + old) / 2)
    adapter = ll.Adapter.between(base, tuned, progress=False)
    lens = ll.LoraLens(models.MAKERS[cls](base), adapter)
    tokens = models.tokens()
    limit = 1e-8 if family == "bloom" else EXACT
    for gate, model in ((1.0, tuned), (0.5, half)):
        with torch.no_grad():
            expected = cases.centred(model(tokens).logits)
        assert largest_difference(cases.centred(lens.logits(tokens, gate)), expected) < limit
    cut = ll.Adapter.between(base, tuned, rank=2, progress=False)
    norms = [
        path for path, update in cut.modules.items() if isinstance(update, ll.results.TrainedModule)
    ]
    assert norms
    assert all(cut.truncation_error[path] == 0 for path in norms)


@pytest.mark.bad_input
def test_ignore_is_one_glob_or_several():
    """A string is one glob, not letters; the change of the norms then does not count."""
    base = models.hf_model("llama")
    tuned = fine_tuned(base)
    with torch.no_grad():
        tuned.model.norm.weight.add_(0.1)
    one = ll.Adapter.between(base, tuned, ignore="*norm*", progress=False)
    several = ll.Adapter.between(base, tuned, ignore=["*norm*"], progress=False)
    assert list(one.modules) == list(several.modules)
    assert len(one) == 16
    for wrong in (3, [3], None):
        with pytest.raises(ll.errors.ArgumentError, match="ignore=.*glob"):
            ll.Adapter.between(base, tuned, ignore=wrong, progress=False)
    with pytest.raises(ll.errors.ArgumentError, match="two Hugging Face models, and one is a str"):
        ll.Adapter.between(base, "lab/tuned")
    with pytest.raises(ll.errors.AdapterError, match="rank='3'"):
        ll.Adapter.between(base, tuned, rank="3")
