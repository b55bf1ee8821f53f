"""Paths of wrapped and headless models are read as the language model's, and that is said."""

from __future__ import annotations

import copy
import warnings

import models
import peft
import pytest
import torch
from adapter_files import assert_is, deltas, peft_of, rename_keys, saved
from differences import largest_difference

import lens_lora as ll

PREFIX = "base_model.model."
WRAPPED = {
    "torch.compile": lambda key: key.replace(PREFIX, PREFIX + "_orig_mod."),
    "torch.compile of a layer": lambda key: key.replace("layers.1.", "layers.1._orig_mod."),
    "PEFT twice": lambda key: key.replace(PREFIX, PREFIX + PREFIX),
    "PEFT three times": lambda key: key.replace(PREFIX, PREFIX * 3),
    "data parallel": lambda key: key.replace(PREFIX, PREFIX + "module."),
    "both": lambda key: key.replace(PREFIX, PREFIX + "_orig_mod." + PREFIX),
    "FSDP": lambda key: key.replace("layers.", "_fsdp_wrapped_module.layers."),
    "a language model's part": lambda key: key.replace(
        "model.layers", "model.language_model.layers"
    ),
    "half of PEFT's prefix": lambda key: key.removeprefix("base_model."),
    "one model too many": lambda key: key.replace(PREFIX, PREFIX + "model."),
    "compiled with PEFT": lambda key: f"_orig_mod.{key}",
    "a language model's part, outside": lambda key: key.replace(PREFIX, PREFIX + "language_model."),
}


@pytest.fixture(scope="module")
def model() -> peft.PeftModel:
    return peft_of(alpha_pattern={"q_proj": 7})


@pytest.mark.parametrize("rename", WRAPPED.values(), ids=WRAPPED)
def test_what_wraps_a_model_is_left_out(rename, model, tmp_path):
    """ΔW of every module is PEFT's, under the bare path; a warning names one that was changed."""
    rename_keys(saved(model, tmp_path), rename)
    with pytest.warns(UserWarning, match="module paths are those of a wrapped .* is read as model"):
        adapter = ll.load_adapter(tmp_path)
    assert_is(adapter, deltas(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "opt", "gemma2", "bloom"])
def test_trained_on_the_model_without_its_head(family, tmp_path):
    """AutoModel's paths lack 'model.' (or 'transformer.'): the lens is the whole with it inside."""
    base = models.hf_model(family)
    body = base.base_model_prefix
    tuned = copy.deepcopy(base)
    targets = models.LINEARS[family]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        headless = models.peft_model(family, getattr(tuned, body), targets=targets)
    saved(headless, tmp_path)
    setattr(tuned, body, headless.get_base_model())
    with pytest.warns(UserWarning, match="headless model"):
        adapter = ll.load_adapter(tmp_path)
    assert_is(adapter, {f"{body}.{path}": delta for path, delta in deltas(headless).items()})
    assert_is(
        ll.Adapter.from_peft(headless), {p: f.materialise() for p, f in adapter.modules.items()}
    )
    maker = list(models.MAKERS.values())[-1]
    with torch.no_grad():
        expected = tuned(models.tokens()).logits
    found = ll.LoraLens(maker(base), adapter, hf_model=base).logits(models.tokens())
    assert largest_difference(found, expected) < 1e-4 * (expected.max() - expected.min())


def test_keys_without_peft_s_prefix(model, tmp_path):
    """Other tools write the model's own paths."""
    rename_keys(saved(model, tmp_path), lambda key: key.removeprefix(PREFIX))
    with pytest.warns(UserWarning, match="its keys lack PEFT's prefix 'base_model.model.'"):
        adapter = ll.load_adapter(tmp_path)
    assert_is(adapter, deltas(model))


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_keys_that_carry_the_adapter_s_name(config, tmp_path):
    """'lora_A.default.weight': PEFT takes the name out when it saves, other tools forget to."""
    model = peft_of("qwen2", targets=["q_proj", "embed_tokens"][: 1 + (not config)], **config)
    original = ll.load_adapter(saved(model, tmp_path))
    rename = {
        key.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector"): key
        for key in model.state_dict()
        if "lora_" in key
    }
    rename_keys(tmp_path, lambda key: rename.get(key, key))
    with pytest.warns(UserWarning, match="its keys carry the adapter's name, 'default'"):
        adapter = ll.load_adapter(tmp_path)
    for path, factors in original.modules.items():
        found = adapter.modules[path]
        assert torch.equal(found.A, factors.A)
        assert torch.equal(found.B, factors.B)
        for one, other in (
            (found.lora_bias, factors.lora_bias),
            (found.magnitude, factors.magnitude),
        ):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


def test_a_name_that_not_all_keys_carry(model, tmp_path):
    """Two adapters in one file, perhaps: refused."""
    folder = saved(model, tmp_path)
    rename_keys(
        folder, lambda k: k.replace("lora_A.weight", "lora_A.b.weight") if "q_proj" in k else k
    )
    with pytest.raises(
        ll.errors.AdapterError, match="2 tensors are no LoRA factors.*lora_A.b.weight"
    ):
        ll.load_adapter(folder)


def test_two_paths_of_one_module(model, tmp_path):
    """A file that holds a module wrapped and bare was put together from two."""
    folder = saved(model, tmp_path)
    rename_keys(
        folder,
        lambda k: k.replace("layers.1.self_attn.q_proj", "_orig_mod.layers.0.self_attn.q_proj"),
    )
    with pytest.raises(
        ll.errors.AdapterError, match="are the same module, model.layers.0.self_attn.q"
    ):
        ll.load_adapter(folder)


OTHERS = ["text_model.encoder.", "vision_tower.model.", "encoder.", "down_blocks.0."]


@pytest.mark.parametrize("before", OTHERS)
def test_other_architectures_keep_their_paths(before, model, tmp_path):
    """A vision tower is no language model, whatever its layers are called."""
    folder = saved(model, tmp_path)
    rename_keys(folder, lambda key: key.replace(PREFIX + "model.", PREFIX + before))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = ll.load_adapter(folder)
    assert all(path.startswith(before) for path in adapter.modules)
    (maker, *_) = models.MAKERS.values()
    with pytest.raises(
        ll.errors.SiteError, match="none of its 14 modules exists here.*UNet"
    ) as caught:
        ll.LoraLens(maker(models.hf_model("llama")), adapter)
    assert "without" not in str(caught.value)


def test_without_is_proposed_where_something_stays(model):
    """One unknown module beside known ones."""
    adapter = ll.Adapter.from_peft(model)
    one = next(iter(adapter.modules.values()))
    odd = ll.Adapter.from_factors({**adapter.modules, "model.layers.0.odd": one})
    (maker, *_) = models.MAKERS.values()
    with pytest.raises(ll.errors.SiteError, match=r"use adapter\.without"):
        ll.LoraLens(maker(models.hf_model("llama")), odd)
