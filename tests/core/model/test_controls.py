"""Negative controls: each correction, left out on purpose, makes an error that the suite would see.

Every test plants one bug and shows how far off the result is then; the same comparison without the
bug is what test_exact.py, test_first_order.py and test_hooks.py ask for.
"""

from __future__ import annotations

import dataclasses

import cases
import models
import pytest
import torch
from differences import largest_difference

import lens_lora as ll
from lens_lora import families
from lens_lora.core.function import reverse as reverse_mode
from lens_lora.core.model import hooks as model_hooks
from lens_lora.core.model import injections, site_basis
from lens_lora.core.model.hooked_transformer import HookedTransformerHost
from lens_lora.core.model.host import Ports

pytestmark = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)


@pytest.fixture(params=models.MAKERS)
def cls(request) -> str:
    return request.param


def error(family: str, cls: str, flags: str) -> float:
    """How far a lens made now is from PEFT's active adapter."""
    case = cases.case(family, cls, flags)
    tokens = models.tokens()
    lens = ll.LoraLens(case.model, case.lens.adapter, hf_model=case.base)
    with torch.no_grad():
        oracle = case.peft(tokens).logits
    return largest_difference(cases.centred(lens.logits(tokens)), cases.centred(oracle))


def site_map_without(**dropped):
    """The builder of δ with some of its basis forced."""
    true = site_basis.site_map
    return lambda update, basis: true(update, dataclasses.replace(basis, **dropped))


@pytest.mark.parametrize(
    ("family", "dropped"),
    [
        ("llama", {"gamma": None}),
        ("gpt2", {"gamma": None}),
        ("gpt2", {"beta": None}),
        ("neox", {"beta": None}),
        ("gpt2", {"centre_write": False}),
    ],
)
def test_a_forgotten_correction_shows(family: str, dropped: dict, cls: str, monkeypatch):
    """γ, β, and the centring of writers, on a model with all processing."""
    assert error(family, cls, "processed") < 1e-9
    monkeypatch.setattr(site_basis, "site_map", site_map_without(**dropped))
    # An uncentred writer moves the residual along 1, which LayerNorm removes: the logits
    # cannot show it, the residual stream does.
    if "centre_write" in dropped:
        case = cases.case(family, cls, "processed")
        tokens = models.tokens()
        lens = ll.LoraLens(case.model, case.lens.adapter, hf_model=case.base)
        name = next(s.write for s in lens.sites if s.kind == "o")
        with torch.no_grad(), lens.applied() as model:
            wrong = model.run_with_cache(tokens)[1][name]
        assert wrong.mean(-1).abs().max() > 1e-2
    else:
        assert error(family, cls, "processed") > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "neox", "qwen2"])
def test_forgotten_value_bias_shows(family: str, cls: str, monkeypatch):
    """b̂_V, where value biases were folded into b_O."""
    assert error(family, cls, "processed") < 1e-9
    monkeypatch.setattr(site_basis.folded_value_bias, "_function", lambda *args: None)
    assert error(family, cls, "processed") > 1e-3


def test_contiguous_split_of_neox_shows(cls: str, monkeypatch):
    """NeoX interleaves (head, 3, d_head); read as blocks, the lens refuses or is far off."""
    assert error("neox", cls, "raw") < 1e-9
    blocks = tuple(dataclasses.replace(f, fused="blocks") for f in families.FAMILIES)
    monkeypatch.setattr(families, "FAMILIES", blocks)
    with pytest.raises(ll.errors.ModelStateError, match="no known processing"):
        error("neox", cls, "raw")
    case = cases.case("neox", cls, "raw")
    tokens = models.tokens()
    lens = ll.LoraLens(case.model, case.lens.adapter)
    with torch.no_grad():
        oracle = case.peft(tokens).logits
    assert largest_difference(lens.logits(tokens), oracle) > 1e-1


def test_gate_and_up_swapped_shows(cls: str, monkeypatch):
    """gate is what the activation function sees."""
    host_class = type(cases.case("llama", cls, "raw").lens.plan.host)
    assert error("llama", cls, "raw") < 1e-9
    true = host_class.ports
    swap = {"gate": "up", "up": "gate"}
    monkeypatch.setattr(host_class, "ports", lambda self, i, k: true(self, i, swap.get(k, k)))
    assert error("llama", cls, "raw") > 1e-2


@models.NEEDS_HOOKED_TRANSFORMER
def test_query_added_after_rotary_shows(monkeypatch):
    """δ belongs at hook_q, before the rotation."""
    assert error("llama", "HookedTransformer", "raw") < 1e-9
    true = HookedTransformerHost.ports

    def late(self, layer: int, kind: str) -> Ports:
        port = true(self, layer, kind)
        if kind == "q":
            port.write = port.write.replace("hook_q", "hook_rot_q")
        return port

    monkeypatch.setattr(HookedTransformerHost, "ports", late)
    assert error("llama", "HookedTransformer", "raw") > 1e-2


@models.NEEDS_HOOKED_TRANSFORMER
def test_writing_after_the_post_norm_shows(monkeypatch):
    """Gemma 2 normalises what attention and MLP write: δ belongs before that norm."""
    assert error("gemma2", "HookedTransformer", "raw") < 1e-9
    plain = tuple(dataclasses.replace(f, post_norm=False) for f in families.FAMILIES)
    monkeypatch.setattr(families, "FAMILIES", plain)
    assert error("gemma2", "HookedTransformer", "raw") > 1e-1


def test_unarranged_hooks_show(cls: str, monkeypatch):
    """Registered before a user's hook on z, the reader misses what the user's hook does."""
    case = cases.case("llama", cls, "raw")
    tokens = models.tokens()
    name = next(s.read for s in case.lens.sites if s.kind == "o")

    def double(tensor, hook):
        return 2 * tensor

    def run() -> torch.Tensor:
        with torch.no_grad():
            return case.model.run_with_hooks(
                tokens, fwd_hooks=[*case.lens.fwd_hooks(), (name, double)]
            )

    right = run()
    monkeypatch.setattr(model_hooks.Arranger, "__call__", lambda self, tensor, hook: None)
    assert largest_difference(run(), right) > 1e-2


def test_frozen_z_has_the_same_first_order_and_another_second(cls: str, monkeypatch):
    """δ computed from the base model's z: ∂g/∂ε at 0 is right, g(1) is wrong."""
    case = cases.case("llama", cls, "raw")
    tokens = models.tokens()
    lens = case.lens
    true = injections.ScaleInject.__call__
    live = ll.first_order(lens, tokens, MARGIN)
    frozen: dict[tuple, torch.Tensor] = {}
    lens.logits(tokens, 0.0)

    def remember(self, index, out, z):
        frozen.setdefault((index, z.shape), z.detach().clone())
        return

    def use(self, index, out, z):
        return true(self, index, out, frozen[(index, z.shape)])

    with monkeypatch.context() as patch:
        patch.setattr(injections.ScaleInject, "__call__", remember)
        lens.logits(tokens, 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(injections.ScaleInject, "__call__", use)
        step = 1e-5
        up, down = (lens.logits(tokens, s)[:, -1] for s in (step, -step))
        wrong = lens.logits(tokens)[:, -1]
    read = MARGIN.of_logits(lens.model, len(tokens))
    slope = (read(up) - read(down)) / (2 * step)
    assert largest_difference(slope, live.total) < 1e-6 * live.total.abs().max()
    assert largest_difference(read(wrong), live.adapted) > 1e-2


def test_a_wrong_contraction_breaks_the_adjoint_identity(cls: str, monkeypatch):
    """a₀ = Aβ left out of the reverse contraction alone: forward and reverse disagree."""
    lens = cases.case("gpt2", cls, "processed").lens
    tokens = models.tokens()
    true = reverse_mode.parts

    def without_offset(site, *args):
        wrong = dataclasses.replace(site.map, a0=None, a0_by_head=None)
        return true(dataclasses.replace(site, map=wrong), *args)

    monkeypatch.setattr(reverse_mode, "parts", without_offset)
    reverse = ll.first_order(lens, tokens, MARGIN).values
    forward = ll.first_order(lens, tokens, MARGIN, mode="forward", progress=False).values
    assert largest_difference(reverse, forward) > 1e-2 * forward.abs().max()


def test_reading_the_last_position_of_a_padded_batch_shows(cls: str, monkeypatch):
    """A padded prompt read at the padding gives another number."""
    lens = cases.case("llama", cls, "raw").lens
    texts = ["w5 w7 w8", "w9 w10 w11 w12 w13"]
    right = ll.first_order(lens, texts, MARGIN)
    monkeypatch.setattr(ll.results.Prompts, "at_read", lambda self, logits: logits[:, -1])
    wrong = ll.first_order(lens, texts, MARGIN)
    assert (wrong.base[0] - right.base[0]).abs() > 1e-2
    assert (wrong.base[1] - right.base[1]).abs() < 1e-9


def test_alpha_over_r_for_rslora_shows():
    """rsLoRA divides α by √r."""
    base = models.hf_model("llama")
    peft = models.peft_model("llama", base, use_rslora=True)
    adapter = ll.Adapter.from_peft(peft)
    plain = adapter.scaled(3**-0.5)
    tokens = models.tokens()
    (maker, *_) = models.MAKERS.values()
    with torch.no_grad():
        oracle = peft(tokens).logits
    model = maker(base)
    assert largest_difference(ll.LoraLens(model, adapter).logits(tokens), oracle) < 1e-9
    assert largest_difference(ll.LoraLens(model, plain).logits(tokens), oracle) > 1e-2
