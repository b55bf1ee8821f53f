"""Parts by rank in both gauges: as trained they depend on the factors, by the SVD on ΔW alone."""

from __future__ import annotations

from collections.abc import Callable

import cases
import models
import pytest
import torch
from differences import largest_difference

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)
ONE_CLASS = list(models.MAKERS)[0]


def with_factors(
    lens: ll.LoraLens, change: Callable[[ll.LoRAFactors], ll.LoRAFactors]
) -> ll.LoraLens:
    """A lens over the same model, with other factors of each module."""
    modules = {name: change(factors) for name, factors in lens.adapter.modules.items()}
    return lens.with_adapter(ll.Adapter.from_factors(modules))


# --- Other factors of the same ΔW


def mixed(lens: ll.LoraLens) -> ll.LoraLens:
    """A → GA and B → BG⁻¹, by a random matrix G for each module."""
    generator = models.seeded(5)

    def change(factors: ll.LoRAFactors) -> ll.LoRAFactors:
        G = torch.randn(factors.rank, factors.rank, generator=generator, dtype=torch.float64)
        return ll.LoRAFactors(G @ factors.A, factors.B @ G.inverse(), factors.scale)

    return with_factors(lens, change)


def by_dense_svd(lens: ll.LoraLens) -> ll.LoraLens:
    """Factors that are the SVD of the dense ΔW."""

    def change(factors: ll.LoRAFactors) -> ll.LoRAFactors:
        U, sigma, Vt = torch.linalg.svd(factors.materialise(), full_matrices=False)
        r = factors.rank
        return ll.LoRAFactors(sigma[:r, None] * Vt[:r], U[:, :r], 1.0)

    return with_factors(lens, change)


def parts(lens: ll.LoraLens, gauge: str, **options) -> torch.Tensor:
    """First order by rank, in this gauge."""
    options = {"by": "rank", "progress": False, **options}
    return ll.first_order(lens, models.tokens(), MARGIN, gauge=gauge, **options).values


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("flags", ["raw", "processed"])
def test_svd_parts_are_those_of_the_dense_svd_whatever_the_factors(cls: str, flags: str):
    lens = cases.case("qwen2", cls, flags).lens
    other = mixed(lens)
    by_svd = parts(lens, "svd")
    as_trained = parts(lens, "trained")
    assert largest_difference(by_svd, parts(by_dense_svd(lens), "trained")) < 1e-10
    assert largest_difference(by_svd, parts(other, "svd")) < 1e-9
    assert largest_difference(as_trained, parts(other, "trained")) > 1e-2
    assert largest_difference(by_svd.sum(-1), as_trained.sum(-1)) < 1e-10


def test_both_modes_and_the_other_axes_know_the_gauge(tmp_path):
    lens = cases.case("gpt2", ONE_CLASS, "processed").lens

    by = ("position", "head", "rank")
    reverse = parts(lens, "svd", by=by)
    forward = parts(lens, "svd", by=by, mode="forward")
    assert largest_difference(reverse.sum((2, 3)), parts(lens, "svd")) < 1e-10
    assert largest_difference(reverse, forward) < 1e-9

    response = ll.AnswerLogProb(torch.tensor([5, 9]))
    tokens = models.tokens()
    by_token = ll.first_order(lens, tokens, response, by=("rank", "token"), gauge="svd")
    whole = ll.first_order(lens, tokens, response, by="rank", gauge="svd")
    assert largest_difference(by_token.values.sum(-1), whole.values) < 1e-10
    assert largest_difference(whole.shift, by_token.shift) < 1e-12

    assert whole.gauge == "svd"
    file = whole.save(tmp_path / "a.safetensors")
    assert ll.results.Attribution.load(file).gauge == "svd"
    assert ll.first_order(lens, tokens, MARGIN).gauge == ""


@pytest.mark.bad_input
def test_a_gauge_without_ranks_is_refused():
    lens = cases.case("llama", ONE_CLASS, "raw").lens
    for options in ({"by": "head", "gauge": "svd"}, {"by": "rank", "gauge": "SVD"}):
        with pytest.raises(ll.errors.ArgumentError, match="gauge"):
            ll.first_order(lens, models.tokens(), MARGIN, **options)


def test_shares_of_a_divergence_know_the_gauge():
    """Those by rank of the SVD are the same whatever the factors; as trained they are not."""
    lens = cases.case("qwen2", ONE_CLASS, "raw").lens
    other = mixed(lens)

    def shares(of: ll.LoraLens, gauge: str) -> torch.Tensor:
        options = {"by": "rank", "scales": (), "progress": False}
        found = ll.kl_shares(of, models.tokens(), gauge=gauge, **options).attribution
        assert found.gauge == gauge
        return found.values

    by_svd = shares(lens, "svd")
    as_trained = shares(lens, "trained")
    size = by_svd.abs().max()
    assert largest_difference(by_svd, shares(other, "svd")) < 1e-9 * size
    assert largest_difference(by_svd, shares(other, "trained")) > 1e-2 * size
    assert largest_difference(by_svd, shares(by_dense_svd(lens), "trained")) < 1e-10
    assert largest_difference(by_svd.sum(-1), as_trained.sum(-1)) < 1e-10

    with pytest.raises(ll.errors.ArgumentError, match="by='rank' too"):
        ll.kl_shares(lens, models.tokens(), gauge="svd")
