"""Foils: each against its formula from the public parts, and what is known of none of them."""

from __future__ import annotations

import cases
import models
import pytest
import torch

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)
TEXTS = ["w5 w7 w8", "w9 w10 w11 w12"]
KEYS = ("signed_weight_norm", "norm_product", "signed_random")


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_is_its_formula(family: str, cls: str):
    lens = cases.case(family, cls, "raw").lens
    found = ll.foils(lens, TEXTS, MARGIN)
    assert tuple(found) == KEYS == tuple(one.key for one in found.values())
    first = ll.first_order(lens, TEXTS, MARGIN)
    known = ll.components(lens, TEXTS, MARGIN, progress=False)
    norms = torch.stack([(own.sB @ own.A).norm() for own in lens.maps])
    assert torch.allclose(found["signed_weight_norm"].values, first.values.sign() * norms)
    product = known.delta_norm * known.sensitivity * first.shift.sign()[:, None]
    assert torch.allclose(found["norm_product"].values, product)
    assert torch.equal(found["signed_random"].values.sign(), first.values.sign())
    # |a| = ‖δz‖ · ‖Jᵀu‖ · |cos|
    assert bool((first.values.abs() <= product.abs() * (1 + 1e-9)).all())


def test_random_sizes_are_of_the_seed_and_of_nothing_else():
    (cls, *_) = models.MAKERS
    lens = cases.case("llama", cls, "raw").lens
    each = [ll.foils(lens, TEXTS, MARGIN, seed=seed) for seed in (0, 0, 1)]
    some = [foils["signed_random"].values for foils in each]
    assert torch.equal(some[0], some[1])
    assert not torch.equal(some[0].abs(), some[2].abs())
    other = ll.foils(lens, TEXTS, ll.Logit(7))["signed_random"].values
    assert torch.equal(other.abs(), some[0].abs())
    assert not torch.equal(other, some[0])


def test_they_rank_and_compare_as_attributions_do(tmp_path):
    (cls, *_) = models.MAKERS
    lens = cases.case("llama", cls, "raw").lens
    found = ll.foils(lens, TEXTS, MARGIN)
    ranked = ll.faithfulness(lens, TEXTS, MARGIN, found, draws=1, progress=False)
    assert set(KEYS) < set(ranked.names)
    effects = ll.patch_sites(lens, TEXTS, MARGIN, progress=False)
    assert ll.compare(found["norm_product"], effects, bootstrap=0).attribution_name == KEYS[1]
    loaded = ll.results.Attribution.load(found["norm_product"].save(tmp_path / "f.safetensors"))
    assert loaded.key == "norm_product"
    assert "‖δz‖ · ‖Jᵀu‖" in repr(loaded)


@pytest.mark.bad_input
def test_a_seed_is_a_whole_number():
    (cls, *_) = models.MAKERS
    with pytest.raises(ll.errors.ArgumentError, match="seed"):
        ll.foils(cases.case("llama", cls, "raw").lens, TEXTS, MARGIN, seed=0.5)
