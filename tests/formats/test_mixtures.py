"""a − b and a.mixed(b, w): one adapter, against PEFT's own "cat" of two adapters and its merge."""

from __future__ import annotations

import dataclasses

import models
import pytest
import torch
from differences import largest_difference
from peft import LoraConfig, PeftModel

import lens_lora as ll
from lens_lora.errors import AdapterError, ArgumentError

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(scope="module")
def two():
    """A PeftModel with two adapters of other ranks, scales and targets, and both as ours."""
    with models.lifted():
        base = models.hf_model("llama")
        peft = models.peft_model("llama", base)
    config = LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj", "down_proj"])
    peft.add_adapter("other", config)
    generator = models.seeded(9)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if ".other." in name:
                p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    peft.eval()
    pair = [ll.Adapter.from_peft(peft, name) for name in ("default", "other")]
    return peft, base, *pair


def logits_of(two, adapter: ll.Adapter) -> torch.Tensor:
    lens = ll.LoraLens(next(iter(models.MAKERS.values()))(two[1]), adapter)
    return lens.logits(models.tokens())


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 0.5)])
def test_stacking_is_peft_s_cat(two, weights):
    """PEFT's weighted adapter, of combination type 'cat', at work."""
    peft, _, one, other = two
    peft.add_weighted_adapter(["default", "other"], list(weights), "both", combination_type="cat")
    peft.set_adapter("both")
    with torch.no_grad():
        theirs = peft(models.tokens()).logits
    peft.set_adapter("default")
    peft.delete_adapter("both")
    total = sum(weights)
    ours = one.mixed(other, weights[1] / total).scaled(total)
    assert largest_difference(logits_of(two, ours), theirs) < 1e-9


def test_ends_of_a_mixture_are_the_adapters(two):
    _, _, one, other = two
    for weight, end in ((0, one), (1, other)):
        assert torch.allclose(
            logits_of(two, one.mixed(other, weight)), logits_of(two, end), atol=1e-9
        )
    assert largest_difference(logits_of(two, one.mixed(other)), logits_of(two, one)) > 1e-3


def test_a_difference_is_loaded_by_peft(two, tmp_path):
    """ΔW − ΔW′ of the merged weights, and PEFT's logits from the saved folder."""
    _, base, one, other = two
    gap = one - other
    module = "model.layers.0.self_attn.q_proj"
    expected = one.modules[module].materialise() - other.modules[module].materialise()
    assert torch.allclose(gap.modules[module].materialise(), expected, atol=1e-12)
    gap.save(tmp_path)
    again = ll.load_adapter(tmp_path)
    peft = PeftModel.from_pretrained(models.hf_model("llama"), tmp_path).eval().double()
    with torch.no_grad():
        theirs = peft(models.tokens()).logits
    assert largest_difference(logits_of(two, again), theirs) < 1e-9
    assert largest_difference(logits_of(two, gap), theirs) < 1e-9


def test_an_adapter_minus_itself_does_nothing(two):
    one = two[2]
    gone = one - one
    assert torch.allclose(logits_of(two, gone), logits_of(two, one.scaled(0)), atol=1e-9)
    assert set(gone.modules) == set(one.modules)


def test_modules_of_one_alone_are_weighted(two):
    """v_proj is in the first only; what is of the second only has the other sign."""
    _, _, one, other = two
    assert (one - other).modules["model.layers.1.self_attn.v_proj"].scale == pytest.approx(5 / 3)
    back = other - one
    assert back.modules["model.layers.1.self_attn.v_proj"].scale == pytest.approx(-5 / 3)


def test_changes_of_bias_are_summed():
    A = torch.ones(2, 4).double()
    B = torch.ones(3, 2).double()
    b = torch.arange(3.0).double()
    with_bias = ll.Adapter.from_factors({"m": ll.LoRAFactors(A, B, 0.5, lora_bias=b)}, name="a")
    plain = ll.Adapter.from_factors({"m": ll.LoRAFactors(A, B)}, name="b")
    half = with_bias.mixed(plain, 0.5).modules["m"]
    assert torch.allclose(half.lora_bias, 0.25 * b)
    assert half.rank == 4
    assert half.scale == 1
    twice = (with_bias - with_bias.scaled(3)).modules["m"]
    assert torch.allclose(twice.lora_bias, -b)


def test_sums_are_subtracted_and_mixed_module_by_module(two, tmp_path):
    """Parts of a sum stay apart in it, and are one update of each module here."""
    one = two[2].named("one")
    other = two[3].named("other")
    back = (one + other) - other
    assert set(back.modules) == set(one.modules) | set(other.modules)
    back.save(tmp_path)
    again = logits_of(two, ll.load_adapter(tmp_path))
    assert torch.allclose(again, logits_of(two, one), atol=1e-9)
    half = (one + other).mixed(one, 0.25)
    expected = one + other.scaled(0.75)
    assert torch.allclose(logits_of(two, half), logits_of(two, expected), atol=1e-9)


@pytest.mark.bad_input
def test_what_does_not_add_up_is_refused(two):
    _, _, one, other = two
    path = "model.layers.0.self_attn.q_proj"
    held = one.modules[path]
    odd = {
        "DoRA": dataclasses.replace(held, magnitude=torch.ones(16)),
        "bias": dataclasses.replace(held, trained_bias=torch.ones(16)),
        "whole": ll.results.TrainedModule(torch.ones(16, 16)),
    }
    for word, update in odd.items():
        with pytest.raises(AdapterError, match=rf"{path}.*{word}"):
            one - ll.Adapter.from_factors({path: update})
    dora = ll.Adapter.from_factors({path: odd["DoRA"]}, name="d").named("d")
    apart = dora + other.without_modules(path).named("rest")
    with pytest.raises(AdapterError, match=rf"{path}.*DoRA"):
        apart - one
    wide = ll.LoRAFactors(torch.ones(1, 8), torch.ones(16, 1))
    with pytest.raises(AdapterError, match="8→16"):
        one - ll.Adapter.from_factors({path: wide})
    named = dataclasses.replace(one, base_model="x/y"), dataclasses.replace(other, base_model="z")
    with pytest.raises(AdapterError, match="x/y"):
        named[0] - named[1]
    with pytest.raises(ArgumentError, match="must be ll.Adapter"):
        one - 3
    with pytest.raises(ArgumentError, match="must be ll.Adapter"):
        one.mixed("other")
    with pytest.raises(ArgumentError, match="weight='half'"):
        one.mixed(other, "half")
