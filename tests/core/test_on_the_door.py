"""The package's own analyses, written again on `lens.function` alone: the same numbers."""

from __future__ import annotations

import cases
import models
import pytest
import reference
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)
TEXTS = ["w5 w7 w8", "w9 w10 w11 w12 w13"]
QUIET = {"progress": False}
EXACT = 1e-9
# The last has partners: value biases that are folded, and updates of v and of o.
CASES = [
    (family, cls, flags)
    for family, flags in (("llama", "raw"), ("qwen2", "processed"))
    for cls in models.MAKERS
]
EVERY = pytest.mark.parametrize(("family", "cls", "flags"), CASES)


@pytest.fixture
def lens(family: str, cls: str, flags: str) -> ll.LoraLens:
    return cases.case(family, cls, flags).lens


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    assert float((found - expected).nan_to_num().abs().max()) < EXACT


@EVERY
def test_remainder_curve_and_its_floor(lens: ll.LoraLens):
    expected = ll.remainder_curve(lens, TEXTS, MARGIN, **QUIET)
    g = lens.function(TEXTS, MARGIN, **QUIET)
    scales = expected.scales
    slopes = g.slopes()
    base, _ = g.ends
    remainder = g.along(scales) - base - scales[:, None] * slopes.sum(1)
    assert_same(remainder.T, expected.remainder)
    floor = g.remainder_noise(slopes).of_remainder(scales)
    # A draw moves g by a few roundings of float64, so its size has one digit.
    assert torch.allclose(floor, expected.remainder_floor, rtol=0.5, atol=0)


@EVERY
def test_patch_sites(lens: ll.LoraLens):
    g = lens.function(TEXTS, MARGIN, **QUIET)
    base, adapted = g.ends
    expected = ll.patch_sites(lens, TEXTS, MARGIN, "add_one", **QUIET)
    assert_same((g.corners("add_one") - base).T, expected.values)
    expected = ll.patch_sites(lens, TEXTS, MARGIN, "leave_one_out", group="layer", **QUIET)
    layers = [[lens.sites[i].name for i in members] for members in expected.groups.values()]
    assert_same((adapted - g.corners(off=layers)).T, expected.values)
    assert_same(g.noise((1, -1), at=1.0), expected.noise_floor)


@EVERY
def test_path_attribution_by_position(lens: ll.LoraLens):
    g = lens.function(TEXTS, MARGIN, **QUIET)
    expected = ll.path_attribution(
        lens, TEXTS, MARGIN, by="position", tol=1e-9, max_nodes=17, **QUIET
    )
    nodes, weights = reference.rule_at_cosines(expected.nodes)
    adapted = lens.gates(1.0)
    slopes = g.slopes(adapted.new_tensor(nodes)[:, None] * adapted, by="position")
    integral = torch.einsum("n,nbsp->bsp", adapted.new_tensor(weights), slopes)
    assert_same(integral, expected.values)


@EVERY
@pytest.mark.parametrize("response", [None, ["w11", "w12 w13 w14"]], ids=["token", "response"])
def test_kl_shares(lens: ll.LoraLens, response: list[str] | None):
    """½ v_lᵀ F v is half of the slope of ⟨F v, f⟩, as F v stays the same."""
    f = lens.function(TEXTS, response=response, **QUIET)
    p = f.logits(0.0).softmax(-1)
    v = f.tangent(1.0)
    Fv = p * (v - (p * v).sum(-1, keepdim=True))
    if response is not None:
        Fv = Fv * f.rows.read_mask[..., None]  # a shorter response repeats its last slot
    shares = f.about(lambda logits: (Fv * logits).flatten(1).sum(1)).slopes(by="head") / 2
    expected = ll.kl_shares(lens, TEXTS, response, by="head", **QUIET)
    assert_same(shares, expected.attribution.values)
    divergence = lens.function(TEXTS, ll.KL(response), **QUIET).along(expected.scales)
    assert_same(divergence.T, expected.divergence)


@EVERY
@pytest.mark.parametrize("gauge", ["trained", "svd"])
def test_first_order_by_rank(lens: ll.LoraLens, gauge: str):
    expected = ll.first_order(lens, TEXTS, MARGIN, by=("head", "rank"), gauge=gauge, at=1.0)
    g = lens.function(TEXTS, MARGIN, **QUIET)
    assert_same(g.slopes(at=1.0, by=("rank", "head"), gauge=gauge), expected.values)


@EVERY
def test_logit_shift(lens: ll.LoraLens):
    f = lens.function(TEXTS, **QUIET)
    each_site = torch.eye(len(lens.sites))
    expected = ll.logit_shift(lens, TEXTS, at=0.5, **QUIET)
    assert_same(f.tangent(each_site, at=0.5).transpose(0, 1), expected.values)
    assert_same(f.tangent(1.0), ll.logit_shift(lens, TEXTS, by_site=False).values)


@EVERY
def test_coupling_by_layer(lens: ll.LoraLens):
    expected = ll.coupling(lens, TEXTS, MARGIN, group="layer", at=0.5, **QUIET)
    layers = torch.zeros(len(expected.groups), len(lens.sites), dtype=torch.float64)
    for row, members in zip(layers, expected.groups.values(), strict=True):
        row[list(members)] = 1
    products = lens.function(TEXTS, MARGIN, **QUIET).curvature(layers, at=0.5)
    assert_same(torch.einsum("gbs,hs->bgh", products, layers), expected.matrix)


@EVERY
def test_gradients_and_tangents_at_a_hook_point(lens: ll.LoraLens):
    name = lens.plan.host.block_input(1)
    kept = []

    def add_leaf(h: Tensor, hook: object) -> Tensor:
        kept.append(torch.zeros_like(h).requires_grad_())
        return h + kept[0]

    g = lens.function(TEXTS, MARGIN, **QUIET)
    with lens.model.hooks(fwd_hooks=[(name, add_leaf)]):
        (gradient,) = torch.autograd.grad(g.graphed(1.0).sum(), kept)
    assert_same(gradient, ll.gradients(lens, TEXTS, MARGIN, name, at=1.0)[name])
    kept.clear()
    seen = [(name, lambda h, hook: kept.append(fwad.unpack_dual(h).tangent.clone()))]
    with lens.model.hooks(fwd_hooks=seen):
        g.tangent(1.0, at=0.5)
    assert_same(kept[0], ll.tangents(lens, TEXTS, name, at=0.5)[name])


@EVERY
def test_patch_activations(lens: ll.LoraLens):
    name = lens.plan.host.block_input(1)
    base_run = []
    g = lens.function(TEXTS, MARGIN, **QUIET)
    with lens.model.hooks(fwd_hooks=[(name, lambda h, hook: base_run.append(h.clone()))]):
        g(0.0)
    with lens.model.hooks(fwd_hooks=[(name, lambda h, hook: base_run[0])]):
        patched = g(1.0)
    expected = ll.patch_activations(lens, TEXTS, MARGIN, name, **QUIET)
    assert_same((g(1.0) - patched)[:, None], expected.values)


@EVERY
def test_components(lens: ll.LoraLens):
    """‖δz‖, ‖Jᵀu‖ and their cosine by a visitor, the gain by the tangent of each site."""
    g = lens.function(TEXTS, MARGIN, **QUIET)
    real = g.rows.real[..., None]
    sums = torch.zeros(3, len(TEXTS), len(lens.sites), dtype=torch.float64)

    def visit(place, weight, gradient: Tensor, z: Tensor) -> None:
        if weight is None:  # a partner's share is nothing at the base
            delta = (place.map(z) * real).flatten(1)
            gradient = (gradient * real).flatten(1)
            products = (delta * delta, gradient * gradient, delta * gradient)
            sums[:, :, place.site] += torch.stack([product.sum(1) for product in products])

    g.passes.visit(visit)
    delta, gradient = sums[:2].sqrt()
    tangents = g.tangent(torch.eye(len(lens.sites)))
    moved = (tangents - tangents.mean(-1, keepdim=True)).norm(dim=-1).T
    expected = ll.components(lens, TEXTS, MARGIN, **QUIET)
    assert_same(delta, expected.delta_norm)
    assert_same(gradient, expected.sensitivity)
    assert_same(sums[2] / (delta * gradient), expected.cosine)
    assert_same(moved / delta, expected.gain)
