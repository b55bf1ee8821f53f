"""Tangents whose rows begin at their own block equal tangents carried from the embeddings."""

from __future__ import annotations

import cases
import models
import pytest
import torch
from differences import largest_difference
from every_family import EVERY, lens_of

import lens_lora as ll
from lens_lora.core.function import duals as dual_pass
from lens_lora.core.function import memory as batching
from lens_lora.core.function import tangents as module
from lens_lora.core.function.duals import OneProduct
from lens_lora.core.function.tangents import ExpansionPoint, Part, part_tangents

pytestmark = pytest.mark.usefixtures("float64")
PROMPTS = ["w5 w7 w8", "w9 w10 w11 w12 w13 w14"]
CLASSES = pytest.mark.parametrize("cls", models.MAKERS)


def tangents(lens: ll.LoraLens, parts: list[Part], at: float = 0.3) -> torch.Tensor:
    ready = lens.prompts(PROMPTS)
    point = ExpansionPoint(lens, ready, lens.gates(at))
    return part_tangents(point, parts, progress=False)


def mixed_parts(lens: ll.LoraLens) -> list[Part]:
    """Every site in an order of no meaning, and some of their positions and ranks."""
    order = torch.randperm(len(lens.sites), generator=torch.Generator().manual_seed(0)).tolist()
    return [p for i in order for p in (Part(i), Part(i, position=1), Part(i, rank=0))]


class Plain(OneProduct):
    """In the place of `OneProduct`: torch's own products, whatever the rows."""

    used = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        Plain.used = True
        return func(*args, **(kwargs or {}))


@pytest.mark.sample(4)
@pytest.mark.parametrize(("family", "cls", "flags"), EVERY)
def test_rows_that_branch_equal_rows_from_the_start(family, cls, flags, monkeypatch):
    """With one product for all rows of one primal, against torch's own products."""
    lens = lens_of(family, cls, flags)
    parts = mixed_parts(lens)
    found = tangents(lens, parts)
    monkeypatch.setattr(module._Passes, "branching", module._Passes.in_rows)
    monkeypatch.setattr(dual_pass, "OneProduct", Plain)
    monkeypatch.setattr(Plain, "used", False)
    expected = tangents(lens, parts)
    assert Plain.used
    assert largest_difference(found, expected) < 1e-12 * expected.abs().max().clamp(min=1)
    assert (expected.abs().amax((0, 2)) > 0).any()


@CLASSES
def test_experts_have_rows_of_their_own(cls, monkeypatch):
    """The control: experts whose tokens are taken for rows of one primal give other tangents."""
    lens = cases.case("mixtral", cls, "raw").lens
    assert lens.plan.host.grows
    assert not lens.plan.host.keeps_rows
    parts = mixed_parts(lens)
    expected = tangents(lens, parts)
    monkeypatch.setattr(lens.plan.host, "keeps_rows", True)
    assert largest_difference(tangents(lens, parts), expected) > 1e-6


@pytest.mark.slow
@CLASSES
def test_any_chunking_gives_the_same(cls, monkeypatch):
    lens = cases.case("llama", cls, "raw").lens
    parts = mixed_parts(lens)
    whole = tangents(lens, parts)
    longest = lens.prompts(PROMPTS).tokens.shape[1]
    for rows in (1, 3):
        monkeypatch.setattr(batching, "TANGENT_TOKENS", rows * longest)
        assert largest_difference(tangents(lens, parts), whole) < 1e-12


@CLASSES
def test_a_row_that_begins_too_late_is_seen(cls, monkeypatch):
    """The negative control: rows copied with the first row's tangent lost are not the same."""
    lens = cases.case("llama", cls, "raw").lens
    parts = [Part(i) for i in range(len(lens.sites))]
    whole = tangents(lens, parts)
    grown = module.tree.more_copies
    monkeypatch.setattr(
        module.tree, "more_copies", lambda count: lambda t, hook: grown(count)(t, hook).flip(0)
    )
    assert largest_difference(tangents(lens, parts), whole) > 1e-6
