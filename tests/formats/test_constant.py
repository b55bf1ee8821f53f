"""Adapter.constant: steering as an adapter, against PEFT's active model and hooks of one's own."""

from __future__ import annotations

import copy

import cases
import models
import pytest
import torch
from differences import largest_difference
from peft import PeftModel
from torch import Tensor

import lens_lora as ll

CLASSES = list(models.MAKERS)
WIDE = torch.ones(16, dtype=torch.float64)
pytestmark = pytest.mark.usefixtures("float64")


def vectors(family: str) -> dict[str, Tensor]:
    """One for a writing, a reading and (where there is one) a fused module."""
    base = models.hf_model(family)
    ends = models.LINEARS[family]
    paths = [n for n, _ in base.named_modules() if ".1." in n and n.endswith(tuple(ends))]
    generator = models.seeded(9)
    found = {}
    for path in paths:
        module = base.get_submodule(path)
        width = module.weight.shape[1 if type(module).__name__ == "Conv1D" else 0]
        found[path] = torch.randn(width, generator=generator, dtype=torch.float64)
    return found


def by_hand(family: str, added: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Hugging Face with each vector added to its module's output."""
    model = models.hf_model(family)
    for path, vector in added.items():
        module = model.get_submodule(path)
        module.register_forward_hook(lambda m, a, out, v=vector: out + v)
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
@pytest.mark.parametrize("flags", ["raw", "processed"])
@pytest.mark.parametrize("cls", CLASSES)
def test_adds_each_vector(family: str, cls: str, flags: str):
    if not models.is_built_right(family, cls, flags):
        pytest.skip("this version of transformer-lens builds another model")
    case = cases.case(family, cls, flags)
    added = vectors(family)
    tokens = models.tokens()
    lens = case.lens.with_adapter(ll.Adapter.constant(added))
    expected = cases.centred(by_hand(family, added, tokens))
    assert largest_difference(cases.centred(lens.logits(tokens)), expected) < 1e-9
    half = by_hand(family, {p: v / 2 for p, v in added.items()}, tokens)
    assert largest_difference(cases.centred(lens.logits(tokens, 0.5)), cases.centred(half)) < 1e-9


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_peft_loads_what_is_saved(family: str, tmp_path):
    base = models.hf_model(family)
    added = vectors(family)
    tokens = models.tokens()
    adapter = ll.Adapter.constant(added, like=base)
    folder = adapter.save(tmp_path / "steering")
    peft = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    expected = by_hand(family, added, tokens)
    with torch.no_grad():
        assert largest_difference(peft(tokens).logits, expected) < 1e-9
    lens = cases.case(family, CLASSES[0], "raw").lens
    for again in (ll.load_adapter(folder), ll.Adapter.from_peft(peft)):
        assert largest_difference(lens.with_adapter(again).logits(tokens), expected) < 1e-9
    of_other = ll.Adapter.constant(added, like=adapter)
    assert all(of_other.modules[p].width == f.width for p, f in adapter.modules.items())


def test_analyses_take_it():
    """First order is the gradient times the vector; sums, multiples and null adapters too."""
    lens = cases.case("llama", CLASSES[0], "raw").lens
    path = "model.layers.0.mlp.down_proj"
    vector = vectors("llama")["model.layers.1.mlp.down_proj"]
    steering = ll.Adapter.constant({path: vector}, name="steering")
    other = lens.with_adapter(steering)
    tokens = models.tokens()
    readout = ll.Margin(5, 9)
    found = ll.first_order(other, tokens, readout)
    step = 1e-5
    ends = [by_hand("llama", {path: s * vector}, tokens)[:, -1] for s in (step, -step)]
    slope = [(end[:, 5] - end[:, 9]) / (2 * step) for end in ends]
    assert largest_difference(found.total, slope[0] - slope[1]) < 1e-6
    both = lens.with_adapter(lens.adapter.named("a") + steering.scaled(2.0))
    assert len(both.sites) == len(lens.sites) + 1
    null = steering.null(0).modules[path]
    assert abs(float(null.lora_bias.norm() - vector.norm())) < 1e-9
    assert other.delta_w("blocks.0.mlp.down").AB.abs().max() == 0
    assert "steering" in repr(steering)


@pytest.mark.bad_input
def test_refusals(tmp_path):
    lens = cases.case("llama", CLASSES[0], "raw").lens
    path = "model.layers.0.mlp.down_proj"
    base = models.hf_model("llama")
    with pytest.raises(ll.errors.AdapterError, match="24→5, the model 24→16"):
        lens.with_adapter(ll.Adapter.constant({path: WIDE[:5]}))
    with pytest.raises(ll.errors.AdapterError, match="like=model"):
        ll.Adapter.constant({path: WIDE}).save(tmp_path / "a")
    with pytest.raises(ll.errors.AdapterError, match=r"\(2, 16\); expected a vector"):
        ll.Adapter.constant({path: WIDE.repeat(2, 1)})
    with pytest.raises(ll.errors.AdapterError, match="expected a vector"):
        ll.Adapter.constant({path: WIDE.long()})
    with pytest.raises(ll.errors.AdapterError, match="no such module"):
        ll.Adapter.constant({"model.layers.9.x": WIDE}, like=base)
    with pytest.raises(ll.errors.AdapterError, match="no linear module"):
        ll.Adapter.constant({"model.norm": WIDE}, like=base)
    with pytest.raises(ll.errors.AdapterError, match="adapts no module"):
        ll.Adapter.constant({})
    with pytest.raises(ll.errors.ArgumentError, match="expected {module path"):
        ll.Adapter.constant(WIDE)
    with pytest.raises(ll.errors.AdapterError, match="NaN"):
        ll.Adapter.constant({path: WIDE * torch.nan})
