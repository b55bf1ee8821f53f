"""Architectures without an entry in `families`: a lens of each equals PEFT's active adapter."""

from __future__ import annotations

import copy
import functools

import architectures
import cases
import models
import pytest
import torch
from differences import largest_difference
from peft import LoraConfig, get_peft_model
from torch import nn

import lens_lora as ll

pytestmark = models.NEEDS_NEWEST
EXACT = 1e-9
NAMES = list(architectures.ARCHITECTURES)


@functools.cache
def measured(name: str) -> dict[str, float | int | str]:
    with architectures.in_float64():
        return architectures.measure(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_lens_equals_peft(name: str):
    """Logits, each module alone, activations, effects; PEFT's adapter is far from the base."""
    cell = measured(name)
    assert cell["shift"] > 0.1
    for error in ("host", "adapted", "each", "activations", "effects"):
        assert cell[error] < EXACT, error
    assert cell["said"] == 0


@pytest.mark.sample(16)
@pytest.mark.parametrize("name", NAMES)
def test_derivatives_equal_differences_of_peft(name: str):
    """Order four in 1e-4 leaves 1e-7 of the largest; a path stops at its tolerance."""
    cell = measured(name)
    assert cell["slopes"] < 1e-7
    assert cell["path"] < 1e-5


@pytest.mark.sample(16)
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_equals_reverse_mode(name: str):
    """Or says which operation has no such derivative, and the call that needs none."""
    modes = measured(name)["modes"]
    assert isinstance(modes, str) == (name in architectures.REVERSE_ONLY)
    if isinstance(modes, str):
        assert "without a forward-mode derivative" in modes
        assert "mode='reverse'" in modes
        assert "SqrtBoundDerivative.apply" in modes  # with its line, where the source is at hand
    else:
        assert modes < EXACT


ENDS = {
    "Gemma 4": ["embed_tokens", "embed_tokens_per_layer", "lm_head"],
    "XGLM": ["embed_tokens", "lm_head"],
    "Granite": ["embed_tokens", "lm_head"],
    "GPT-BigCode": ["wte", "wpe", "lm_head"],
    "MPT": ["wte", "lm_head"],
}


@pytest.mark.parametrize("name", ENDS)
def test_embeddings_and_heads_equal_peft(name: str):
    """Also scaled ones, and logits that are scaled after the head."""
    with architectures.in_float64():
        base = architectures.hf_model(name)
        tokens = models.tokens()
        config = LoraConfig(r=2, lora_alpha=3, target_modules=ENDS[name])
        peft = models.with_random_factors(get_peft_model(copy.deepcopy(base), config).eval(), base)
        lens = ll.LoraLens(models.bridge(base), ll.Adapter.from_peft(peft), hf_model=base)
        with torch.no_grad():
            expected = peft(tokens).logits
            plain = base(tokens).logits
        assert largest_difference(cases.centred(expected), cases.centred(plain)) > 0.1
        assert (
            largest_difference(cases.centred(lens.logits(tokens)), cases.centred(expected)) < EXACT
        )


def test_a_hook_of_a_user_s_own_on_a_bare_module_sees_the_adapted_output():
    """A module that no component wraps: a hook put on before the block runs after ours."""
    with architectures.in_float64():
        case = architectures.case("JetMoE")
        tokens = models.tokens()
        site = next(site for site in case.lens.sites if site.write not in case.model.hook_dict)
        module: nn.Module = case.model.get_submodule(site.write)
        seen: list[torch.Tensor] = []
        handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
        inputs = module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        with torch.no_grad():
            case.model(tokens)
            with case.lens.applied({site.name: 1.0}):
                case.model(tokens)
        handle.remove()
        inputs.remove()
        delta = case.lens.maps[case.lens.site_index(site.name)]
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert largest_difference(seen[1], seen[0]) > 0.01
        with pytest.raises(ll.errors.ModelStateError, match="no hook point of this model shows"):
            case.lens.fwd_hooks()
        assert delta.width
