"""A Hugging Face model becomes a hooked model: the same logits, or a refusal."""

from __future__ import annotations

import importlib.metadata

import models
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lens_lora.errors import ModelStateError
from lens_lora.hosts import build
from lens_lora.hosts.build import hooked_model

CLASSES = list(models.MAKERS)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hooked_model_computes_the_same_logits(kind, family):
    base = models.hf_model(family, dtype=torch.float32)
    tokens = models.tokens()
    with torch.no_grad():
        expected = base(tokens).logits
        model, name = hooked_model(base, models.tokenizer(), kind=kind)
        found = model(tokens)
    assert name == kind == type(model).__name__
    assert not model.training
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_bridge_is_built_where_there_is_one():
    _, name = hooked_model(models.hf_model("llama", dtype=torch.float32), models.tokenizer())
    assert name == CLASSES[-1]


def other_rotary_base():
    theta = {"rope_theta": 500.0}
    is_new = int(importlib.metadata.version("transformers").partition(".")[0]) >= 5
    config = {"rope_parameters": {"rope_type": "default", **theta}} if is_new else theta
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**models._ROTARY, **config)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("kind", CLASSES)
def test_rotary_base_is_the_models_own(kind):
    base = other_rotary_base()
    tokens = models.tokens()
    with torch.no_grad():
        expected = base(tokens).logits
        model, _ = hooked_model(base, models.tokenizer(), kind=kind)
        torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)


@models.NEEDS_HOOKED_TRANSFORMER
def test_model_that_computes_other_logits_is_refused(monkeypatch):
    monkeypatch.setattr(build, "_rotary_base", lambda hf_model: 10.0)
    with pytest.raises(ModelStateError, match="computes other logits than the Hugging Face model"):
        hooked_model(other_rotary_base(), models.tokenizer(), kind="HookedTransformer")


@models.of_some_lines("HookedTransformer" not in CLASSES, "only transformer-lens 4 lacks it")
def test_class_that_is_not_there_is_refused():
    base = models.hf_model("llama", dtype=torch.float32)
    with pytest.raises(ModelStateError, match="cannot make a HookedTransformer"):
        hooked_model(base, models.tokenizer(), kind="HookedTransformer")


@models.NEEDS_HOOKED_TRANSFORMER
def test_misleading_temporary_folder_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "my_gemma"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with pytest.raises(ModelStateError, match="'gemma' in its path.*TMPDIR"):
        base = models.hf_model("llama", dtype=torch.float32)
        hooked_model(base, models.tokenizer(), kind="HookedTransformer")


@pytest.mark.parametrize("error", [MemoryError("none left"), OSError(28, "No space left")])
def test_an_error_of_the_machine_is_none_of_the_model(monkeypatch, error):
    """No other class of hooked model is the remedy for a disk that is full."""

    def fail(*args):
        raise error

    monkeypatch.setattr(build, "_bridge", fail)
    monkeypatch.setattr(build, "_hooked_transformer", fail)
    base = models.hf_model("llama", dtype=torch.float32)
    with pytest.raises(type(error), match=str(error.args[-1])):
        hooked_model(base, None)


@models.NEEDS_BRIDGE
def test_a_listed_family_that_has_no_hooked_transformer_gets_a_bridge():
    """TransformerLens 3.9 reads no Gemma 3 from a folder; a class that is named is not replaced."""
    base = models.hf_model("gemma3")
    assert hooked_model(base, models.tokenizer())[1] == "TransformerBridge"
    if "HookedTransformer" in models.MAKERS:
        with pytest.raises(ModelStateError, match="The other class"):
            hooked_model(base, models.tokenizer(), kind="HookedTransformer")
