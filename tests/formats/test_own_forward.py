"""Modules that were trained and compute something else than W z + b, or γ ⊙ n: refused by name."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import lens_lora as ll
from lens_lora.compat import has_own_code
from lens_lora.core import TrainedModule
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


class HalfNorm(LlamaRMSNorm):
    """A norm with a forward of its own."""

    def forward(self, z):
        """0.5 γ n."""
        return 0.5 * super().forward(z)


class NanNorm(LlamaRMSNorm):
    """A norm whose output is not a number."""

    def forward(self, z):
        """NaN."""
        return super().forward(z) * float("nan")


class SameNorm(LlamaRMSNorm):
    """A norm in code of its own."""

    def forward(self, z):
        """γ n."""
        n = z * (z.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return self.weight * n


PLACES = {
    "o_proj": ("model.layers.0.self_attn.o_proj", Half),
    "gate_proj": ("model.layers.1.mlp.gate_proj", Clipped),
    "embedding": ("model.embed_tokens", Scaled),
    "norm": ("model.layers.0.input_layernorm", HalfNorm),
    "final norm": ("model.norm", HalfNorm),
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
    with pytest.raises(AdapterError, match=f"{path}: this {cls.__name__} does not compute "):
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
def test_the_same_in_code_of_its_own_is_taken(dtype):
    places = (
        ("model.layers.0.self_attn.o_proj", Same),
        ("model.layers.1.input_layernorm", SameNorm),
    )
    for path, cls in places:
        base, tuned = pair(path, cls, dtype)
        adapter = ll.Adapter.between(base, tuned, progress=False)
        assert list(adapter.modules) == [path]


def test_a_module_that_is_called_by_name_or_not_at_all():
    """Its input may have a name; and what eight tokens do not reach is called alone."""
    path = "model.layers.0.mlp.down_proj"
    base, tuned = pair(path, None)
    for model in (base, tuned):
        down = model.get_submodule(path)
        model.unused = nn.Embedding(5, 4)
        model.model.layers[0].mlp.forward = lambda x, m=model.model.layers[0].mlp, down=down: down(
            input=m.act_fn(m.gate_proj(x)) * m.up_proj(x)
        )
    tuned.unused.weight.data = base.unused.weight.data + 1
    adapter = ll.Adapter.between(base, tuned, progress=False)
    assert set(adapter.modules) == {path, "unused"}
    for model in (base, tuned):
        model.unused.__class__ = Scaled
    with pytest.raises(AdapterError, match="unused: this Scaled does not compute"):
        ll.Adapter.between(base, tuned, progress=False)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_models_of_two_dtypes(dtypes):
    base, tuned = pair("model.layers.0.self_attn.o_proj", None, torch.float32)
    base = base.to(dtypes[0])
    tuned = tuned.to(dtypes[1])
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


# --- Modules that an adapter holds as they were trained


WITH_NAN = {**PLACES, "NaN": ("model.layers.0.input_layernorm", NanNorm)}


@pytest.mark.skipif(not models.has_bridge(), reason="only a bridge runs the model's own modules")
@pytest.mark.parametrize("path, cls", WITH_NAN.values(), ids=WITH_NAN)
def test_a_trained_module_with_a_forward_of_its_own_is_refused(path, cls):
    """`modules_to_save` of such a module: PEFT's logits were missed by more than the shift."""
    base, tuned = pair(path, cls)
    module = tuned.get_submodule(path)
    trained = ll.Adapter({path: TrainedModule(module.weight.detach().clone())})
    factors = ll.Adapter.from_peft(models.peft_model("llama", models.hf_model("llama")))
    words = f"{path}: this {cls.__name__} does not compute "
    with pytest.raises(AdapterError, match=f"{words}.*Leave it out: adapter.without"):
        ll.LoraLens(models.bridge(base), trained)
    lens = ll.LoraLens(models.bridge(base), factors.only("*.q_proj"))
    with pytest.raises(AdapterError, match=words):
        lens.with_adapter(trained)


def test_libraries_have_no_code_of_their_own():
    """So no call is made of their modules."""
    for family in ("llama", "gpt2", "gemma2", "phi3"):
        model = models.hf_model(family)
        own = [path for path, module in model.named_modules() if has_own_code(module)]
        assert own == []
    assert all(has_own_code(cls(4, 4)) for cls in (Half, Clipped, Same, Scaled))
