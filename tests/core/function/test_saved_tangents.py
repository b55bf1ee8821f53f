"""The pass whose values keep a graph keeps no tangents, on every family."""

from __future__ import annotations

import models
import pytest
from every_family import EVERY, lens_of
from saved_tensors import saved

import lens_lora as ll

PROMPTS = ["w5 w7 w8", "w9 w10 w11 w12 w13 w14"]


@pytest.mark.sample(4)
@pytest.mark.parametrize(("family", "cls", "flags"), EVERY)
def test_no_tangent_is_held_for_the_way_back(family: str, cls: str, flags: str):
    """Memory is that of a bare pass; a mixture of experts, which scatters tokens, keeps some."""
    with models.lifted():
        lens = lens_of(family, cls, flags)
    with saved() as graph:
        ll.kl_shares(lens, PROMPTS, progress=False)
    assert graph
    assert any(tensor.is_dual for tensor in graph) == (family == "mixtral")
