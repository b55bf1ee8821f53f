"""f(ε) equals PEFT's active adapter on the Hugging Face model, in float64, processed or not."""

from __future__ import annotations

import copy
import math
import warnings

import cases
import models
import pytest
import reference
import torch
from differences import largest_difference
from peft import PeftModel
from safetensors.torch import load_file, save_file

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")
EXACT = 1e-9

EVERY_FLAG = [
    (family, cls, flags) for family in models.CORE for cls in models.MAKERS for flags in cases.FLAGS
]


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return largest_difference(cases.centred(a), cases.centred(b))


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((cases.centred(a) - cases.centred(b)).square().mean().sqrt())


@pytest.mark.sample(15)
@pytest.mark.parametrize(("family", "cls", "flags"), EVERY_FLAG)
def test_adapted_logits_equal_peft(family: str, cls: str, flags: str):
    """f(1) is PEFT's model on every linear module, f(0) the base, and they are far apart."""
    case = cases.case(family, cls, flags)
    tokens = models.tokens()
    with torch.no_grad():
        base = case.base(tokens).logits
        adapted = case.peft(tokens).logits
    assert worst(case.lens.logits(tokens, 0.0), base) < EXACT
    assert worst(case.lens.logits(tokens, 1.0), adapted) < EXACT
    assert worst(base, adapted) > 0.1


# The modules that PEFT adapts where it is told none.
PEFT_DEFAULTS = {
    "gpt2": ["c_attn"],
    "neox": ["query_key_value"],
    "llama": ["q_proj", "v_proj"],
    "mistral": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj"],
}


@pytest.mark.parametrize(("family", "cls", "flags"), cases.CASES)
def test_default_targets_equal_peft(family: str, cls: str, flags: str):
    """The modules that PEFT adapts by default, alone."""
    case = cases.case(family, cls, flags, tuple(PEFT_DEFAULTS[family]))
    tokens = models.tokens()
    with torch.no_grad():
        assert worst(case.lens.logits(tokens), case.peft(tokens).logits) < EXACT


@pytest.mark.sample(5)
@pytest.mark.parametrize(("family", "cls", "flags"), cases.CASES)
def test_one_module_at_a_time_equals_peft(family: str, cls: str, flags: str):
    """Each module's gate alone, at a scale that is neither 0 nor 1: no error can hide in a sum."""
    case = cases.case(family, cls, flags)
    tokens = models.tokens(batch=1)
    every = list(case.lens.adapter.modules)
    for module in every:
        sites = {s.name: 0.7 for s in case.lens.sites if s.module == module}
        factors = {m: 0.7 if m == module else 0.0 for m in every}
        with torch.no_grad(), reference.peft_scales(case.peft, factors):
            oracle = case.peft(tokens).logits
        assert worst(case.lens.logits(tokens, sites), oracle) < EXACT, module


@pytest.mark.parametrize("config", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 5}}])
def test_scales_equal_peft(config: dict):
    """rsLoRA and rank patterns reach the logits."""
    base = models.hf_model("llama")
    peft = models.peft_model("llama", base, alpha_pattern={"v_proj": 11}, **config)
    (cls, *_) = models.MAKERS
    lens = ll.LoraLens(models.MAKERS[cls](base), ll.Adapter.from_peft(peft))
    tokens = models.tokens()
    with torch.no_grad():
        assert worst(lens.logits(tokens), peft(tokens).logits) < EXACT


@pytest.mark.parametrize("cls", models.MAKERS)
def test_both_classes_read_the_file_alike(cls: str, tmp_path):
    """From disk as from the live PeftModel: factors stored in float64 lose nothing."""
    base = models.hf_model("gpt2")
    peft = models.peft_model("gpt2", base)
    peft.save_pretrained(tmp_path)
    lens = ll.LoraLens(models.MAKERS[cls](base), ll.load_adapter(tmp_path))
    tokens = models.tokens()
    with torch.no_grad():
        assert worst(lens.logits(tokens), peft(tokens).logits) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_dora_is_computed_in_the_base_s_dtype(dtype: torch.dtype, tmp_path):
    """The file's factors are rounded; the base's weight, of which DoRA takes norms, is not."""
    base = models.hf_model("llama")
    tokens = models.tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models.peft_model("llama", base, use_dora=True).save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
        peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    lens = ll.LoraLens(next(iter(models.MAKERS.values()))(base), ll.load_adapter(tmp_path))
    with torch.no_grad():
        assert worst(lens.logits(tokens), peft(tokens).logits) < EXACT


@pytest.mark.bad_input
@pytest.mark.parametrize("scale", [math.nan, math.inf, 10**400, {"*.q": math.nan}, "tensor"])
def test_a_gate_that_is_not_finite_is_refused(scale):
    """A HookedTransformer would take NaN scores for a pattern of zeros, and go on."""
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    if scale == "tensor":
        scale = torch.ones(len(lens.sites)).index_fill(0, torch.tensor([0]), math.nan)
    with pytest.raises(ll.errors.LensLoraError, match="NaN or infinite|finite number"):
        lens.logits(models.tokens(), scale)


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_its_rounding(cls: str, dtype: torch.dtype):
    """Off from float64 by as much as Hugging Face's own model in this precision, and no more.

    Measured: 2.6 to 4.8 units of rounding, root mean square; Hugging Face and PEFT 2.6 to 5.1.
    """
    base = models.hf_model("llama")
    tokens = models.tokens(batch=8)
    peft = models.peft_model("llama", base)
    low = models.MAKERS[cls](models.hf_model("llama").to(dtype))
    lens = ll.LoraLens(low, ll.Adapter.from_peft(peft))
    for scale, oracle in ((0.0, base), (1.0, peft)):
        with torch.no_grad():
            exact = oracle(tokens).logits
            theirs = copy.deepcopy(oracle).to(dtype)(tokens).logits
        ours = lens.logits(tokens, scale)
        assert 0 < rms(ours.double(), exact) < 1.25 * rms(theirs.double(), exact)


@models.NEEDS_BRIDGE
@pytest.mark.parametrize("family", models.CORE)
def test_a_bridge_in_compatibility_mode_without_processing(family: str):
    """no_processing gives HookedTransformer's names and leaves the weights: no base is needed."""
    base = models.hf_model(family)
    tokens = models.tokens()
    peft = models.peft_model(family, base)
    model = models.bridge(base)
    model.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    with torch.no_grad():
        assert worst(lens.logits(tokens), peft(tokens).logits) < EXACT
        out = model.run_with_hooks(tokens, fwd_hooks=lens.fwd_hooks())
    assert worst(out, lens.logits(tokens)) < EXACT
