"""A readout of a few logits, from a few rows of W_U, is the one from all of them."""

from __future__ import annotations

from typing import Any

import cases
import models
import pytest
import torch
from differences import largest_difference
from every_family import EVERY, lens_of

import lens_lora as ll
from lens_lora.core.function.forward import read_logits, read_value
from lens_lora.core.model.hooks import attached
from lens_lora.core.model.injections import ScaleInject
from lens_lora.core.model.unembedding import Unembedding

pytestmark = pytest.mark.usefixtures("float64")
READOUTS = [ll.Margin(5, 9), ll.Logit([3, 4]), ll.LogProb("w7"), ll.AnswerMargin("w5 w7", "w8")]
PROMPTS = ["w5 w7 w8", "w9 w10 w11 w12 w13 w14"]
CLASSES = pytest.mark.parametrize("cls", models.MAKERS)


def both(lens: ll.LoraLens, readout: ll.Readout) -> tuple[torch.Tensor, torch.Tensor]:
    reading = readout.reading(lens.model, lens.prompts(PROMPTS))
    with torch.no_grad(), lens.injected(ScaleInject(lens.plan, lens.gates(0.7))):
        found = read_value(lens, reading)
        assert "forward" not in vars(lens.model.unembed)
        return found, reading.read(read_logits(lens, reading.rows))


@pytest.mark.sample(4)
@pytest.mark.parametrize(("family", "cls", "flags"), EVERY)
def test_on_every_family(family: str, cls: str, flags: str):
    lens = lens_of(family, cls, flags)
    assert (lens.plan.host.unembedding() is None) == (family == "gemma2")
    for readout in READOUTS:
        found, expected = both(lens, readout)
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@CLASSES
def test_repeated_rows_keep_their_tokens(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    reading = ll.Margin([5, 7], [9, 11]).reading(lens.model, lens.prompts(PROMPTS))
    many = reading.repeat(3)
    with torch.no_grad():
        logits = read_logits(lens, many.rows)
        alone = reading.read(logits[::3]).repeat_interleave(3)
        assert torch.allclose(many.read(logits), alone, rtol=1e-12)
        assert torch.allclose(read_value(lens, many), many.read(logits), rtol=1e-12)


def _capped(module: torch.nn.Module, args: object, out: Any) -> object:
    if isinstance(out, torch.Tensor):
        return 2 * torch.tanh(out / 2)
    out.logits = 2 * torch.tanh(out.logits / 2)
    return out


@CLASSES
@pytest.mark.parametrize("inner", [False, True], ids=["", "of Hugging Face"])
def test_hooks_on_the_whole_model_are_seen(cls: str, inner: bool):
    """They get logits, and what they return is read: a soft-cap, say."""
    if inner and cls == "HookedTransformer":
        pytest.skip("nothing of Hugging Face is within it")
    lens = cases.case("llama", cls, "raw").lens
    whole = lens.model.original_model if inner else lens.model
    answer = ll.AnswerLogProb([" w5 w7", " w8"])
    plain = both(lens, READOUTS[0])[0]
    handle = whole.register_forward_hook(_capped)
    try:
        found = [both(lens, readout) for readout in (*READOUTS, answer)]
        slopes = [
            ll.first_order(lens, PROMPTS, answer, by="token", mode=mode, progress=False).values
            for mode in ("forward", "reverse")
        ]
    finally:
        handle.remove()
    for value, expected in found:
        assert torch.allclose(value, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found[0][0], plain, rtol=1e-2)
    assert torch.allclose(*slopes, rtol=1e-9, atol=1e-11, equal_nan=True)


@CLASSES
def test_hooks_on_the_unembedding_are_seen(cls: str):
    """A user's hook behind or before W_U changes g, as it changes the model's logits."""
    lens = cases.case("llama", cls, "raw").lens
    plain = both(lens, READOUTS[0])[0]
    unembed = lens.model.unembed
    handle = unembed.register_forward_hook(lambda module, args, out: 4.0 * out)
    try:
        found, expected = both(lens, READOUTS[0])
    finally:
        handle.remove()
    assert torch.allclose(found, expected, rtol=1e-12)
    assert torch.allclose(found, 4.0 * plain, rtol=1e-9)
    points = {"unembed.hook_out": 2.0, "unembed.hook_in": 3.0}
    for name in points.keys() & lens.model.hook_dict.keys():
        factor = points[name]
        hook = (name, lambda tensor, hook, factor=factor: tensor * factor)
        with attached(lens.model, [hook]):
            found, expected = both(lens, READOUTS[0])
        if torch.allclose(expected, plain):  # a point that this version never fires
            continue
        assert torch.allclose(found, expected, rtol=1e-12)
        assert torch.allclose(found, factor * plain, rtol=1e-9)


@CLASSES
def test_a_forward_of_its_own_is_seen_and_stays(cls: str, monkeypatch):
    """As accelerate wraps a module's forward to move its input."""
    lens = cases.case("llama", cls, "raw").lens
    plain = both(lens, READOUTS[0])[0]
    unembed = lens.model.unembed
    own = type(unembed).forward.__get__(unembed)

    def doubled(*args, **kwargs):
        return 2.0 * own(*args, **kwargs)

    monkeypatch.setitem(vars(unembed), "forward", doubled)
    reading = READOUTS[0].reading(lens.model, lens.prompts(PROMPTS))
    with torch.no_grad(), lens.injected(ScaleInject(lens.plan, lens.gates(0.7))):
        assert torch.allclose(read_value(lens, reading), 2.0 * plain, rtol=1e-9)
    assert vars(unembed)["forward"] is doubled


@CLASSES
def test_the_unembedding_comes_back_after_an_exception(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    reading = READOUTS[0].reading(lens.model, lens.prompts(PROMPTS))

    def stop(tensor, hook):
        raise RuntimeError("stop")

    with (
        pytest.raises(RuntimeError, match="stop"),
        attached(lens.model, [(lens.plan.host.block_input(1), stop)]),
    ):
        read_value(lens, reading)
    assert "forward" not in vars(lens.model.unembed)
    assert lens.logits(PROMPTS, 0.0).shape[-1] == lens.model.cfg.d_vocab


@CLASSES
def test_a_lost_bias_would_show(cls: str, monkeypatch):
    """GPT-2's processed unembedding has a bias; the control: g without it is another."""
    lens = cases.case("gpt2", cls, "processed").lens
    weight, bias = lens.plan.host.unembedding()
    assert bias is not None
    assert bias.abs().max() > 1e-3
    found, expected = both(lens, READOUTS[0])
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    biasless = Unembedding(weight, None)
    monkeypatch.setattr(type(lens.plan.host), "unembedding", lambda view: biasless)
    found, expected = both(lens, READOUTS[0])
    assert largest_difference(found, expected) > 1e-4
