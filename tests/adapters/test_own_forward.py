"""`Adapter.between` of modules that compute something else than W z + b: refused by name."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from torch import nn
from torch.nn import functional

import lens_lora as ll
from lens_lora.errors import AdapterError


class Half(nn.Linear):
    """A linear module with a forward of its own."""

    def forward(self, z):
        """0.5 W z."""
        return 0.5 * super().forward(z)


class Clipped(nn.Linear):
    """A linear module whose output is bounded."""

    def forward(self, z):
        """W z, clipped."""
        return super().forward(z).clamp(-0.1, 0.1)


class Same(nn.Linear):
    """W z in code of its own."""

    def forward(self, z):
        """W z."""
        return functional.linear(z.flatten(0, -2), self.weight).unflatten(0, z.shape[:-1])


class Scaled(nn.Embedding):
    """An embedding that multiplies, without saying by what."""

    def forward(self, ids):
        """3 E[ids]."""
        return 3 * super().forward(ids)


PLACES = {
    "o_proj": ("model.layers.0.self_attn.o_proj", Half),
    "gate_proj": ("model.layers.1.mlp.gate_proj", Clipped),
    "embedding": ("model.embed_tokens", Scaled),
}


def pair(path: str, cls: type | None, dtype: torch.dtype = torch.float64):
    """Two models that differ in this module's weights, with this class there."""
    base = models.hf_model("llama", dtype=dtype)
    if cls is not None:
        base.get_submodule(path).__class__ = cls
    tuned = copy.deepcopy(base)
    weight = tuned.get_submodule(path).weight
    weight.data += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(
        weight
    )
    return base, tuned


@pytest.mark.parametrize("path, cls", PLACES.values(), ids=PLACES)
def test_a_forward_of_its_own_is_refused(path, cls):
    base, tuned = pair(path, cls)
    with pytest.raises(AdapterError, match=rf"{path}: this {cls.__name__} does not compute W z"):
        ll.Adapter.between(base, tuned, progress=False)
    tuned.get_submodule("model.layers.0.mlp.up_proj").weight.data *= 1.1
    rest = ll.Adapter.between(base, tuned, ignore=path, progress=False)
    assert list(rest.modules) == ["model.layers.0.mlp.up_proj"], "the remedy"
    assert not any(module._forward_hooks for model in (base, tuned) for module in model.modules())


def test_a_hook_of_the_module_s_own_is_seen():
    """The same function in both models, so that their logits agree."""
    path = "model.layers.0.self_attn.o_proj"
    base, tuned = pair(path, None)
    for model in (base, tuned):
        model.get_submodule(path).register_forward_hook(lambda m, args, output: 0.5 * output)
    with pytest.raises(AdapterError, match=f"{path}: this Linear does not compute"):
        ll.Adapter.between(base, tuned, progress=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_w_z_in_code_of_its_own_is_taken(dtype):
    """PEFT's merged model is not needed as oracle: the tuned model's own logits are."""
    path = "model.layers.0.self_attn.o_proj"
    base, tuned = pair(path, Same, dtype)
    adapter = ll.Adapter.between(base, tuned, progress=False)
    assert list(adapter.modules) == [path]


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_models_of_two_dtypes(dtypes):
    base, tuned = pair("model.layers.0.self_attn.o_proj", None, torch.float32)
    base, tuned = base.to(dtypes[0]), tuned.to(dtypes[1])
    assert len(ll.Adapter.between(base, tuned, progress=False)) >= 1


def test_every_family_is_taken():
    """No module of a family that is known has a forward of its own that is taken for another."""
    for family in ("llama", "gpt2", "gemma2", "neox", "qwen2"):
        base = models.hf_model(family)
        tuned = copy.deepcopy(base)
        generator = torch.Generator().manual_seed(0)
        for parameter in tuned.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.02 * noise.to(parameter)
        tuned.tie_weights()
        assert len(ll.Adapter.between(base, tuned, progress=False)) > 5
