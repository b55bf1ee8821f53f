"""Bases in 4 and 8 bit: PEFT's numbers, and derivatives of the dequantised model."""

from __future__ import annotations

import copy
import dataclasses

import models
import pytest
import quantised
import torch
from differences import largest_difference
from peft import PeftModel
from quantised import lens_of, of_4bit, saved
from torch import nn

import lens_lora as ll
from lens_lora.compat import computing_attribute
from lens_lora.hosts.build import hooked_model
from lens_lora.hosts.quantised import dequantised, quantised_linears

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = models.NEEDS_BRIDGE
FAMILIES = tuple(quantised.BASES)
ASKED = ll.Margin(5, 9)
EXACT = 2e-4  # float32, logits of size 10


def peft_logits(base, family: str) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(base, saved(family)).eval()(models.tokens()).logits


@pytest.mark.sample(2)
@pytest.mark.parametrize("bits", quantised.BITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_pefts_on_the_same_quantised_model(family: str, bits: str):
    expected = peft_logits(quantised.load(family, bits), family)
    base = quantised.load(family, bits)
    with torch.no_grad():
        without = base(models.tokens()).logits
    assert largest_difference(expected, peft_logits(quantised.dense(base, family), family)) < 0.3
    lens = lens_of(base, family)
    assert largest_difference(lens.logits(models.tokens()), expected) < EXACT
    assert largest_difference(lens.logits(models.tokens(), 0.0), without) < EXACT
    assert largest_difference(expected, without) > 0.1


def test_scales_that_are_quantised_too():
    expected = peft_logits(quantised.load("llama", "4 bit", nested=True), "llama")
    lens = lens_of(quantised.load("llama", "4 bit", nested=True), "llama")
    assert largest_difference(lens.logits(models.tokens()), expected) < EXACT


ANALYSES = {
    "reverse": lambda lens, t: ll.first_order(lens, t, ASKED, mode="reverse").values,
    "forward": lambda lens, t: ll.first_order(lens, t, ASKED, mode="forward").values,
    "split": lambda lens, t: ll.first_order(lens, t, ASKED, by=("position", "rank")).values,
    "at 1": lambda lens, t: ll.first_order(lens, t, ASKED, at=1.0).values,
    "logit shift": lambda lens, t: ll.logit_shift(lens, t).values,
    "path": lambda lens, t: ll.path_attribution(lens, t, ASKED, progress=False).values,
    "second order": lambda lens, t: ll.second_order(lens, t, ASKED).half_row_sums,
    "coupling": lambda lens, t: ll.coupling(lens, t, ASKED, group="layer").matrix,
    "interventions": lambda lens, t: ll.patch_sites(lens, t, ASKED, progress=False).values,
    "answers": lambda lens, t: ll.first_order(lens, t, ll.LogProb(5), by=("head",)).values,
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", ANALYSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_analyses_in_4_bit_are_those_of_the_dequantised_model(family: str, name: str):
    own, plain = of_4bit(family)
    tokens = models.tokens()
    found = ANALYSES[name](own, tokens).double()
    expected = ANALYSES[name](plain, tokens).double()
    size = expected.nan_to_num().abs().max()
    assert size > 1e-3
    assert torch.allclose(found, expected, rtol=0, atol=2e-4 * float(size), equal_nan=True)


@pytest.mark.slow
def test_derivatives_in_8_bit_are_straight_through():
    """At the kernel's values: on one row, both modes; and the path adds up to its rounding."""
    base = quantised.load("llama", "8 bit")
    tokens = models.tokens(batch=1)
    plain = lens_of(quantised.dense(base, "llama"), "llama")
    lens = lens_of(base, "llama")
    modes = [
        ll.first_order(lens, tokens, ASKED, mode=mode).values for mode in ("reverse", "forward")
    ]
    smooth = ll.first_order(plain, tokens, ASKED).values
    size = smooth.abs().max()
    assert largest_difference(modes[0], modes[1]) < 0.02 * size
    assert largest_difference(modes[0], smooth) < 0.1 * size
    ll.second_order(lens, tokens, ASKED)
    gaps = []
    floors = []
    for row in models.tokens(batch=6).split(1):
        path = ll.path_attribution(lens, row, ASKED, progress=False)
        gaps.append(path.values.sum(1) - path.shift)
        floors.append(ll.remainder(lens, row, ASKED).noise_floor)
    assert torch.cat(gaps).norm() < 3 * torch.cat(floors).norm()


def test_the_noise_floor_in_8_bit_covers_what_the_kernel_rounds():
    """Within a factor of 3 of how far shifts lie from those of the dequantised model."""
    base = quantised.load("llama", "8 bit")
    plain = lens_of(quantised.dense(base, "llama"), "llama")
    lens = lens_of(base, "llama")
    tokens = models.tokens(batch=12, pos=6)
    found = ll.remainder(lens, tokens, ASKED)
    away = (found.shift - ll.remainder(plain, tokens, ASKED).shift).square().mean().sqrt()
    floor = found.noise_floor.square().mean().sqrt()
    assert away / 3 < floor < 3 * away


# --- the kernel without a derivative


@pytest.fixture(params=[False, True], ids=["", "nested"])
def fast_cpu(request):
    if not bnb.nn.modules.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16")
    model = quantised.load("llama", "4 bit", nested=request.param)
    plain = quantised.dense(model, "llama")
    quantised.take_bfloat16_kernel(model, True)
    return model, ll.LoraLens(
        models.MAKERS["TransformerBridge"](plain), ll.load_adapter(saved("llama"))
    )


@pytest.mark.sample(1)
def test_the_kernel_of_avx512_is_gone_around(fast_cpu):
    model, plain = fast_cpu
    lens = lens_of(model, "llama")
    for name in ("reverse", "forward", "second order"):
        found, expected = (ANALYSES[name](some, models.tokens()) for some in (lens, plain))
        assert largest_difference(found, expected) < 2e-4 * expected.abs().max()
    assert not any(is_packed(module) for module in quantised_linears(lens.model.modules()))


def test_weights_that_this_kernel_repacked_are_read_right(fast_cpu):
    """A forward pass of the user's own rounds the scales of blocks to bfloat16, for good."""
    model, plain = fast_cpu
    with torch.no_grad():
        model(models.tokens())
    assert all(is_packed(module) for module in quantised_linears(model.modules()))
    found = ANALYSES["reverse"](lens_of(model, "llama"), models.tokens())
    expected = ANALYSES["reverse"](plain, models.tokens())
    assert largest_difference(found, expected) < 0.05 * expected.abs().max()


def slope(lens: ll.LoraLens) -> torch.Tensor:
    """∂g/∂ε by a user's own backward pass."""
    gates = torch.full((len(lens.sites),), 0.5, requires_grad=True)
    with lens.applied(gates) as adapted:
        logits = adapted(models.tokens(), return_type="logits")[:, -1]
        (logits[:, 5] - logits[:, 9]).sum().backward()
    assert gates.grad is not None
    return gates.grad


def test_within_applied_a_users_own_derivative_is_right_too(fast_cpu):
    model, plain = fast_cpu
    found = slope(lens_of(model, "llama"))
    expected = slope(plain)
    assert largest_difference(found, expected) < 2e-4 * expected.abs().max()


def is_packed(module) -> bool:
    return bool(getattr(module.weight.quant_state, "packing_format_for_cpu", False))


# --- nothing left behind, nothing guessed


@pytest.mark.parametrize("bits", quantised.BITS)
def test_modules_have_their_own_forward_again(bits: str):
    lens = lens_of(quantised.load("llama", bits), "llama")
    linears = quantised_linears(lens.model.modules())
    before = [(dict(vars(m)), m.weight.data.clone()) for m in linears]
    ll.first_order(lens, models.tokens(), ASKED, mode="forward")
    with pytest.raises(ZeroDivisionError), lens.applied():
        1 / 0  # noqa: B018
    for module, (held, weight) in zip(linears, before, strict=True):
        assert vars(module).keys() == held.keys()
        assert "forward" not in vars(module)
        assert torch.equal(module.weight.data, weight)


@pytest.mark.parametrize("bits", quantised.BITS)
def test_the_dequantised_weight_is_near_the_weight(bits: str):
    model = quantised.load("qwen2", bits)
    base = hf_base("qwen2")
    for path, module in model.named_modules():
        if module in quantised_linears(model.modules()):
            weight = base.get_submodule(path).weight
            error = (dequantised(module) - weight).square().mean().sqrt()
            assert error < {"4 bit": 0.12, "8 bit": 0.012}[bits] * weight.square().mean().sqrt()
            assert dequantised(module, torch.float64).dtype == torch.float64


def hf_base(family: str):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(quantised.folder(family))


def test_what_needs_the_base_s_own_weight_is_refused(tmp_path):
    base = quantised.BASES["llama"]().eval()
    models.peft_model("llama", base, use_dora=True).save_pretrained(tmp_path / "dora")
    model = quantised.bridge(quantised.load("llama", "4 bit"))
    with pytest.raises(ll.errors.ModelStateError, match="DoRA's ΔW depends .* quantised"):
        ll.LoraLens(model, ll.load_adapter(tmp_path / "dora"))
    with pytest.raises(ll.errors.AdapterError, match="LlamaForCausalLM is quantised"):
        ll.Adapter.between(base, quantised.load("llama", "4 bit"), progress=False)


def test_other_quantisation_is_refused_by_its_name():
    model = models.MAKERS["TransformerBridge"](models.hf_model("llama"))
    model.original_model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    adapter = ll.Adapter.from_peft(models.peft_model("llama", models.hf_model("llama")))
    with pytest.raises(ll.errors.ModelStateError, match="quantised by gptq"):
        ll.LoraLens(model, adapter)


def test_tensors_of_torchao_are_refused_where_no_configuration_says_so():
    of_torchao = type("AffineTensor", (torch.Tensor,), {"__module__": "torchao.dtypes"})
    model = models.MAKERS["TransformerBridge"](models.hf_model("llama"))
    mlp = model.original_model.model.layers[0].mlp
    odd = torch.zeros(3).as_subclass(of_torchao)
    mlp.register_parameter("odd", nn.Parameter(odd, requires_grad=False))
    adapter = ll.Adapter.from_peft(models.peft_model("llama", models.hf_model("llama")))
    with pytest.raises(ll.errors.ModelStateError, match="odd is quantised by torchao"):
        ll.LoraLens(model, adapter)


def test_integer_weights_of_another_make_are_refused():
    model = models.MAKERS["TransformerBridge"](models.hf_model("llama"))
    module = model.original_model.model.layers[0].mlp
    odd = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    module.register_parameter("odd", odd)
    adapter = ll.Adapter.from_peft(models.peft_model("llama", models.hf_model("llama")))
    with pytest.raises(ll.errors.ModelStateError, match=r"odd is torch.int8"):
        ll.LoraLens(model, adapter)


def test_a_hooked_transformer_of_quantised_weights_is_refused():
    with pytest.raises(ll.errors.ModelStateError, match="TransformerBridge"):
        hooked_model(quantised.load("llama", "4 bit"), None, kind="HookedTransformer")


def without_our_products(lens: ll.LoraLens) -> ll.LoraLens:
    bare = copy.copy(lens)
    bare._plan = dataclasses.replace(lens.plan, quantised=())
    return bare


def test_the_kernel_of_8_bit_has_no_forward_mode():
    """The control."""
    bare = without_our_products(lens_of(quantised.load("llama", "8 bit"), "llama"))
    with pytest.raises(ll.errors.ModelStateError, match="forward-mode derivative"):
        ANALYSES["forward"](bare, models.tokens())


def test_the_kernel_of_avx512_is_wrong_without_an_error(fast_cpu):
    """The control: it has no backward pass, and the rest of the model has."""
    model, plain = fast_cpu
    with torch.no_grad():
        model(models.tokens())
    bare = without_our_products(lens_of(model, "llama"))
    found = slope(bare)
    expected = slope(plain)
    assert largest_difference(found, expected) > 0.1 * expected.abs().max()


def test_a_fused_projection_is_refused_in_one_line():
    """TransformerLens splits its weight, and cannot read it."""
    base = models.hf_model("gpt2", dtype=torch.float32)
    path = quantised.folder("llama").parent / "gpt2"
    base.save_pretrained(path)
    model = quantised.load_from(path, "8 bit")
    with pytest.raises(
        ll.errors.ModelStateError, match="cannot make a TransformerBridge of this model"
    ):
        hooked_model(model, models.tokenizer(), kind="TransformerBridge")


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("bits", quantised.BITS)
def test_blocks_end_in_any_order(bits: str, first: int):
    """The block that is left goes on with products that have derivatives; then the kernel's own."""
    model = quantised.load(FAMILIES[0], bits)
    lens = lens_of(model, FAMILIES[0])
    half = lens.with_adapter(lens.adapter.scaled(0.5))
    places = [(m, computing_attribute(m)) for m in quantised_linears(lens.model.modules())]
    before = [vars(module).get(name) for module, name in places]
    left = (lens, half)[1 - first].logits(models.tokens())
    blocks = lens.applied(), half.applied()
    for block in blocks:
        block.__enter__()
    products = [vars(module).get(name) for module, name in places]
    blocks[first].__exit__(None, None, None)
    assert [vars(module).get(name) for module, name in places] == products != before
    assert torch.equal(lens.model(models.tokens()), left)
    blocks[1 - first].__exit__(None, None, None)
    assert [vars(module).get(name) for module, name in places] == before
