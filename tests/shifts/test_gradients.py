"""∂g/∂h at hook points: against autograd on PEFT's own model, differences, and the adjoint law."""

from __future__ import annotations

import re
from typing import Any

import cases
import models
import pytest
import reference
import torch

import lens_lora as ll

MARGIN = ll.Margin(5, 9)
BUILT = [
    (family, cls, flags)
    for family, kinds in {
        "llama": ("raw", "processed"),
        "gemma2": ("raw",),
        "mixtral": ("raw",),
    }.items()
    for cls in models.MAKERS
    for flags in kinds
    if models.is_built_right(family, cls, flags)
]
LAYERS = {"llama": "model.layers", "gpt2": "transformer.h", "neox": "gpt_neox.layers"}
READOUTS = {
    "a margin": MARGIN,
    "a response": ll.AnswerLogProb([torch.tensor([4, 8, 3])] * 2),
    "a function": ll.Readout.of(lambda logits: logits.square().sum(1)),
    "a KL": ll.KL(),
}


def block_inputs(lens: ll.LoraLens) -> list[str]:
    return [lens.plan.host.block_input(layer) for layer in range(models.LAYERS)]


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("at", [0.0, 0.37, 1.0])
def test_blocks_equal_autograd_on_peft(family: str, cls: str, at: float):
    """The gradient of a margin at every block's input, in Hugging Face's model with PEFT's LoRA."""
    case = cases.case(family, cls, "raw")
    tokens = models.tokens()
    modules = {site.module: at for site in case.lens.sites}
    seen: list[torch.Tensor] = []

    def see(module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden.requires_grad_() if hidden.is_leaf else None
        seen.append(hidden)

    blocks = case.peft.base_model.model.get_submodule(LAYERS[family])
    handles = [block.register_forward_pre_hook(see, with_kwargs=True) for block in blocks]
    with models.lifted(), reference.peft_scales(case.peft, modules), torch.enable_grad():
        logits = case.peft(tokens).logits[:, -1]
        expected = torch.autograd.grad((logits[:, 5] - logits[:, 9]).sum(), seen)
    for handle in handles:
        handle.remove()
    names = block_inputs(case.lens)
    with models.lifted():
        cache = ll.gradients(case.lens, tokens, MARGIN, names, at=at)
    for name, gradient in zip(names, expected, strict=True):
        assert torch.allclose(cache[name], gradient, atol=1e-12), name


@pytest.mark.sample(5)
@pytest.mark.parametrize(("family", "cls", "flags"), BUILT)
@pytest.mark.parametrize("name", READOUTS)
def test_the_adjoint_law(family: str, cls: str, flags: str, name: str):
    """⟨∂g/∂h, ∂h⟩ at the last block's input is the first order of all sites before that block."""
    lens = cases.case(family, cls, flags).lens
    tokens = models.tokens()
    readout = READOUTS[name]
    at = 1.0 if name == "a KL" else 0.37
    last = block_inputs(lens)[-1]
    before = [s for s in lens.sites if s.layer < models.LAYERS - 1]
    whole = ll.first_order(lens, tokens, readout, at=at).per_site
    expected = sum(whole[:, lens.sites.index(site)] for site in before)
    gradient = ll.gradients(lens, tokens, readout, last, at=at)[last]
    rows = tokens
    if name == "a response":
        rows = lens.prompts(tokens, response=[torch.tensor([4, 8])] * 2)
    scale = {site.name: 1.0 for site in before}
    tangent = ll.tangents(lens, rows, last, scale=scale, at=at)[last]
    assert torch.allclose((gradient * tangent).sum((1, 2)), expected, atol=1e-11)


@pytest.mark.sample(1)
@pytest.mark.parametrize("flags", ["raw", "processed"])
@pytest.mark.parametrize("cls", models.MAKERS)
def test_every_point_against_differences(cls: str, flags: str):
    """A step along a random direction at one point, for every point of one block and the ends."""
    lens = cases.case("gpt2", cls, flags).lens
    tokens = models.tokens(1)
    step = 1e-5
    cache = ll.gradients(lens, tokens, MARGIN, at=1.0)
    some = [name for name in cache if ".0." not in name]
    assert len(some) > 8
    seed = torch.Generator().manual_seed(0)
    for name in some:
        direction = torch.randn(cache[name].shape, generator=seed, dtype=torch.float64)

        def moved(size: float, name: str = name, direction: torch.Tensor = direction) -> float:
            hooks = [(name, lambda tensor, hook: tensor + size * direction)]
            with torch.no_grad(), lens.applied(), lens.hooked(hooks):
                logits = lens.model(tokens)[0, -1]
            return float(logits[5] - logits[9])

        slope = (moved(step) - moved(-step)) / (2 * step)
        assert abs(slope - float((cache[name] * direction).sum())) < 1e-6 * max(1, abs(slope)), name


@pytest.mark.parametrize("cls", models.MAKERS)
def test_padding_has_none_and_a_batch_is_its_prompts(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    texts = ["w5 w7 w8", "w9 w10 w11 w12 w13"]
    name = block_inputs(lens)[1]
    both = ll.gradients(lens, texts, MARGIN, name)[name]
    for row, text in enumerate(texts):
        alone = ll.gradients(lens, text, MARGIN, name)[name][0]
        assert torch.allclose(both[row, : len(alone)], alone, atol=1e-12)
        assert not both[row, len(alone) :].any()


@pytest.mark.parametrize("cls", models.MAKERS)
def test_what_is_refused(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    with pytest.raises(ll.errors.ArgumentError, match="zero and says nothing"):
        ll.gradients(lens, tokens, ll.KL())
    with pytest.raises(ll.errors.ArgumentError, match="4 rows of 2 prompts"):
        ll.gradients(
            lens, tokens, ll.AnswerMargin([torch.tensor([3, 4])] * 2, [torch.tensor([5, 6])] * 2)
        )
    with pytest.raises(ll.errors.SiteError, match="nope"):
        ll.gradients(lens, tokens, MARGIN, "nope")
    with pytest.raises(ll.errors.ArgumentError, match="max_memory.* the gradients of") as refused:
        ll.gradients(lens, tokens, MARGIN, max_memory=2e4)
    (names,) = re.findall("names='(.*)'", str(refused.value))
    assert list(ll.gradients(lens, tokens, MARGIN, names)), "the remedy names points of this model"
    after = "unembed.hook_out" if "unembed.hook_out" in lens.model.hook_dict else None
    if after is not None:
        assert ll.gradients(lens, tokens, MARGIN, after)[after].any()


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_point_that_never_fires_is_named(cls: str, is_frozen: bool):
    """Whether or not the model's weights would have a gradient of their own."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    never = "blocks.0.attn.hook_result"
    assert never in lens.model.hook_dict
    first, last = block_inputs(lens)
    weights = [p for p in lens.model.parameters() if p.requires_grad] if is_frozen else []
    try:
        for weight in weights:
            weight.requires_grad_(False)
        with pytest.raises(ll.errors.ModelStateError, match="hook_result.* never fires"):
            ll.gradients(lens, tokens, MARGIN, [first, never])
        cut = lens.hooked([(last, lambda tensor, hook: tensor.detach())])
        with cut, pytest.raises(ll.errors.ModelStateError, match="does not depend"):
            ll.gradients(lens, tokens, MARGIN, first)
    finally:
        for weight in weights:
            weight.requires_grad_(True)
