"""A branching forward pass gives each point what running it alone gives."""

from __future__ import annotations

import cases
import models
import pytest
import torch
from differences import largest_difference
from every_family import EVERY, lens_of

import lens_lora as ll
from lens_lora.core.function import many_gates, tree
from lens_lora.core.function import memory as batching
from lens_lora.core.function.forward import read_value
from lens_lora.core.model.injections import ScaleInject

MARGIN = ll.Margin(5, 9)
# A Bridge of these computes something for each row beside the residual stream.
FIXED = [(f, c, p) for f, c, p in EVERY if c == "TransformerBridge" and f in ("bloom", "opt")]


def passes(lens: ll.LoraLens, reading) -> many_gates._Passes:
    def inject(gates, rows):
        return ScaleInject(lens.plan, gates)

    return many_gates._Passes(lens, reading, read_value, inject, many_gates.Bar(shown=False))


@pytest.mark.sample(6)
@pytest.mark.parametrize(("family", "cls", "flags"), [c for c in EVERY if c not in FIXED])
@pytest.mark.usefixtures("float64")
def test_branching_equals_one_at_a_time(family: str, cls: str, flags: str, monkeypatch):
    lens = lens_of(family, cls, flags)
    assert lens.plan.host.grows
    eye = torch.eye(len(lens.sites)).double()
    points = torch.cat([eye, 1 - eye, 0.5 * eye + 0.25])
    prompts = lens.prompts(models.tokens())
    reading = MARGIN.reading(lens.model, prompts)
    alone = passes(lens, reading).in_batches(points)
    found = passes(lens, reading).as_tree(points)
    assert largest_difference(found, alone) < 1e-12 * alone.abs().max()


@pytest.mark.parametrize(("family", "cls", "flags"), FIXED)
@pytest.mark.usefixtures("float64")
def test_what_cannot_branch_is_run_point_by_point(family: str, cls: str, flags: str):
    lens = lens_of(family, cls, flags)
    assert not lens.plan.host.grows
    assert not tree.pays(lens, torch.eye(len(lens.sites)).double())


@pytest.mark.usefixtures("float64")
def test_the_tree_is_as_small_as_it_can_be():
    """Adding one site in turn: block L has a row for each site so far, and the base."""
    lens = cases.case("llama", list(models.MAKERS)[-1], "raw").lens
    assert lens.plan.host.n_layers == 2
    in_first = sum(site.layer == 0 for site in lens.sites)
    grown = tree.Tree.of(lens, torch.eye(len(lens.sites)).double())
    assert [len(p) for p in grown.parents] == [in_first + 1, len(lens.sites)]
    along = torch.linspace(0.1, 1, 5).double()[:, None].expand(-1, len(lens.sites))
    assert tree.Tree.of(lens, along).cost == 1.0
    assert not tree.pays(lens, along)


@pytest.mark.usefixtures("float64")
def test_chunks_and_order_do_not_matter(monkeypatch):
    """Any number of points at once, in any order, padded prompts of any length."""
    lens = cases.case("llama", list(models.MAKERS)[-1], "raw").lens
    points = torch.eye(len(lens.sites)).double()[torch.randperm(len(lens.sites))]
    prompts = ll.results.Prompts(models.tokens(), torch.tensor([7, 3]))
    reading = MARGIN.reading(lens.model, lens.prompts(prompts))
    alone = passes(lens, reading).in_batches(points)
    for tokens in (7, 40, 10**6):
        monkeypatch.setattr(batching, "BRANCH_TOKENS", tokens)
        found = passes(lens, reading).as_tree(points)
        assert largest_difference(found, alone) < 1e-12 * alone.abs().max()


@pytest.mark.usefixtures("float64")
def test_different_embeddings_do_not_share_a_trunk():
    """Points that differ at the embedding agree on nothing."""
    from targets import hooked, peft_with

    base, model = hooked("gpt2", list(models.MAKERS)[-1], "raw")
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft_with("gpt2", base, "embedding")))
    points = torch.stack([lens.gates(0.0), lens.gates(1.0), lens.gates(0.5)])
    assert not tree.pays(lens, points)
