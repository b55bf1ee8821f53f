"""`Adapter.from_peft`: every module that the live layers adapt, of every kind of model."""

from __future__ import annotations

import warnings

import models
import peft
import pytest
import torch
from adapter_files import assert_is, deltas, peft_of, saved

import lens_lora as ll

NAMES = ["mlp", "self_attn", "model", "layers", "0", "q_proj"]


def two(name: str) -> peft.PeftModel:
    """A model with the adapter 'default' on everything and another one of this name."""
    model = peft_of()
    model.add_adapter(name, peft.LoraConfig(target_modules=["up_proj"], r=2))
    return model


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_named_like_a_module_costs_none(name):
    """PEFT's own state dictionary is not the adapter's there; the layers have it all."""
    model = two(name)
    expected = deltas(model)
    cut = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert len(expected) == 14
    assert len(cut) != 28
    assert_is(ll.Adapter.from_peft(model), expected)
    other = {path: f.A for path, f in ll.Adapter.from_peft(model, name).modules.items()}
    for path, A in other.items():
        assert torch.equal(A, model.get_base_model().get_submodule(path).lora_A[name].weight)
    assert len(other) == 2


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"}])
def test_what_stands_beside_the_factors_is_read_from_the_layers_too(config, tmp_path):
    """As from the file that PEFT saves where no other adapter's name is in the way."""
    model = peft_of("qwen2", targets=["q_proj", "v_proj"], **config)
    saved_one = ll.load_adapter(saved(model, tmp_path))
    model.add_adapter("self_attn", peft.LoraConfig(target_modules=["up_proj"], r=2))
    live = ll.Adapter.from_peft(model)
    assert list(live.modules) == list(saved_one.modules)
    for path, factors in live.modules.items():
        for field in ("A", "B", "lora_bias", "trained_bias", "magnitude"):
            one = getattr(factors, field)
            other = getattr(saved_one.modules[path], field)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("name", ["mlp", "self_attn", "0"])
def test_a_folder_that_peft_cut_is_warned_of(name, tmp_path):
    """Known by the other adapter's folder, which PEFT writes inside."""
    saved(two(name), tmp_path)
    with pytest.warns(UserWarning, match=f"may be missing.*called '{name}'.*from_peft"):
        adapter = ll.load_adapter(tmp_path)
    assert len(adapter) < 14


def test_a_folder_that_peft_cut_is_warned_of_by_its_config(tmp_path):
    """Without the other's folder: the config targets what the file does not hold."""
    model = two("mlp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path, selected_adapters=["default"])
    with pytest.warns(UserWarning, match="targets down_proj, gate_proj, up_proj, and the file"):
        assert len(ll.load_adapter(tmp_path)) == 8


def test_a_whole_folder_is_not_warned_of(tmp_path):
    """Several adapters with harmless names, read from their folders."""
    saved(two("second"), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ll.load_adapter(tmp_path)) == 14
        assert len(ll.load_adapter(tmp_path / "second")) == 2


def test_a_transformers_model_with_adapters_of_its_own():
    """Where transformers injects the layers there is no PeftModel around them."""
    config = peft.LoraConfig(target_modules=["q_proj"], r=3, init_lora_weights=False)
    base = peft.inject_adapter_in_model(config, models.hf_model("llama")).to(torch.float64)
    base.peft_config = {"default": config}
    assert_is(ll.Adapter.from_peft(base), deltas(base))


@pytest.mark.bad_input
def test_models_without_a_peft_adapter_are_refused():
    """By name, with what to call instead."""
    base = models.hf_model("llama")
    with pytest.raises(
        ll.errors.ArgumentError, match="LlamaForCausalLM without an adapter.*between"
    ):
        ll.Adapter.from_peft(base)
    with pytest.raises(ll.errors.ArgumentError, match="a str without an adapter.*load_adapter"):
        ll.Adapter.from_peft("folder")
    mixed = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]), mixed=True)
    with pytest.raises(ll.errors.UnsupportedAdapterError, match="PeftMixedModel.*between"):
        ll.Adapter.from_peft(mixed)
    for name in (3, None, ["default"]):
        with pytest.raises(ll.errors.AdapterError, match="no adapter"):
            ll.Adapter.from_peft(peft_of(targets=["q_proj"]), name)


WRONG = {
    "only a number": lambda a: a.only(3),
    "only None": lambda a: a.only(None),
    "without a number": lambda a: a.without_modules(3),
    "scaled by text": lambda a: a.scaled("x"),
    "scaled by a number in text": lambda a: a.scaled("0.5"),
    "scaled by NaN": lambda a: a.scaled(float("nan")),
    "scaled by infinity": lambda a: a.scaled(float("inf")),
    "scaled by True": lambda a: a.scaled(True),
    "scaled by None": lambda a: a.scaled(None),
    "scaled by many": lambda a: a.scaled(torch.ones(2)),
    "named by a number": lambda a: a.named(3),
    "plus a number": lambda a: a + 3,
    "modules that are no factors": lambda a: ll.Adapter.from_factors({"q": torch.ones(2)}),
    "modules by number": lambda a: ll.Adapter.from_factors({3: next(iter(a.modules.values()))}),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_gates_and_names_of_wrong_types(call):
    """An ArgumentError of ours, whatever was passed."""
    factors = ll.LoRAFactors(torch.ones(1, 2), torch.ones(2, 1))
    with pytest.raises(ll.errors.ArgumentError):
        call(ll.Adapter.from_factors({"layers.0.q_proj": factors}))


@pytest.mark.bad_input
@pytest.mark.parametrize("fields", [{"A": "x"}, {"B": None}, {"scale": "2"}, {"scale": None}])
def test_factors_of_wrong_types(fields):
    """An AdapterError of ours."""
    with pytest.raises(ll.errors.AdapterError):
        ll.LoRAFactors(**{"A": torch.ones(1, 2), "B": torch.ones(2, 1), **fields})


def test_numbers_of_other_libraries_are_numbers():
    """A zero-dimensional tensor or numpy scalar scales as its value does."""
    import numpy as np

    factors = ll.LoRAFactors(torch.ones(1, 2), torch.ones(2, 1))
    adapter = ll.Adapter.from_factors({"q": factors})
    for half in (torch.tensor(0.5), np.float32(0.5)):
        assert adapter.scaled(half).modules["q"].scale == 0.5
