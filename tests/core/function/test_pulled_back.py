"""One pass there and back equals the joint tangent, then a forward and a backward pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from differences import largest_difference
from every_family import EVERY, lens_of

import lens_lora as ll
from lens_lora.core.function.forward import gated_logits
from lens_lora.core.function.pulled_back import pulled_back
from lens_lora.core.function.reverse import site_slopes
from lens_lora.core.function.tangents import ExpansionPoint, joint_tangent

pytestmark = pytest.mark.usefixtures("float64")
PROMPTS = ["w5 w7 w8", "w9 w10 w11 w12 w13 w14"]


@pytest.mark.sample(4)
@pytest.mark.parametrize(("family", "cls", "flags"), EVERY)
def test_equals_two_passes(family: str, cls: str, flags: str):
    lens = lens_of(family, cls, flags)
    reading = lens.function(PROMPTS, ll.AnswerLogProb(torch.tensor([5, 9, 4]))).reading
    none = lens.gates(0.0)
    v = joint_tangent(ExpansionPoint(lens, reading.rows, none), torch.ones_like(none))
    with torch.no_grad():
        base = gated_logits(lens, reading.rows, none)
    covectors = base.softmax(-1) * v
    read = dataclasses.replace(reading, read=lambda f: (covectors * f).flatten(1).sum(1))
    axes = ("position", "head", "rank")
    expected = site_slopes(lens, read, none, axes)
    found, at_base = pulled_back(lens, reading, axes, lambda f, moved, _: f.softmax(-1) * moved)
    assert largest_difference(found, expected) < 1e-11 * expected.abs().max()
    assert largest_difference(at_base, base) < 1e-11
    assert not at_base.requires_grad
