"""Parts by rank in both gauges: as trained they depend on the factors, by the SVD on ΔW alone."""

from __future__ import annotations

import cases
import models
import pytest
import torch
from differences import largest_difference

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)


def with_factors(lens: ll.LoraLens, change) -> ll.LoraLens:
    modules = {name: change(factors) for name, factors in lens.adapter.modules.items()}
    return lens.with_adapter(ll.Adapter.from_factors(modules))


def mixed(generator: torch.Generator):
    def change(factors: ll.LoRAFactors) -> ll.LoRAFactors:
        G = torch.randn(factors.rank, factors.rank, generator=generator, dtype=torch.float64)
        return ll.LoRAFactors(G @ factors.A, factors.B @ G.inverse(), factors.scale)

    return change


def by_numpy(factors: ll.LoRAFactors) -> ll.LoRAFactors:
    """The same ΔW, with factors that are its dense SVD."""
    U, sigma, Vt = torch.linalg.svd(factors.materialise(), full_matrices=False)
    r = factors.rank
    return ll.LoRAFactors(sigma[:r, None] * Vt[:r], U[:, :r], 1.0)


def parts(lens: ll.LoraLens, gauge: str, **options) -> torch.Tensor:
    options = {"by": "rank", "progress": False, **options}
    return ll.first_order(lens, models.tokens(), MARGIN, gauge=gauge, **options).values


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("flags", ["raw", "processed"])
def test_svd_parts_are_those_of_the_dense_svd_whatever_the_factors(cls: str, flags: str):
    lens = cases.case("qwen2", cls, flags).lens
    found = parts(lens, "svd")
    assert largest_difference(found, parts(with_factors(lens, by_numpy), "trained")) < 1e-10
    other = with_factors(lens, mixed(models.seeded(5)))
    assert largest_difference(found, parts(other, "svd")) < 1e-9
    assert largest_difference(parts(lens, "trained"), parts(other, "trained")) > 1e-2
    assert largest_difference(found.sum(-1), parts(lens, "trained").sum(-1)) < 1e-10


def test_both_modes_and_the_other_axes_know_the_gauge(tmp_path):
    lens = cases.case("gpt2", list(models.MAKERS)[0], "processed").lens
    by = ("position", "head", "rank")
    reverse = parts(lens, "svd", by=by)
    assert largest_difference(reverse.sum((2, 3)), parts(lens, "svd")) < 1e-10
    assert largest_difference(reverse, parts(lens, "svd", by=by, mode="forward")) < 1e-9
    response = ll.AnswerLogProb(torch.tensor([5, 9]))
    token = ll.first_order(lens, models.tokens(), response, by=("rank", "token"), gauge="svd")
    whole = ll.first_order(lens, models.tokens(), response, by="rank", gauge="svd")
    assert largest_difference(token.values.sum(-1), whole.values) < 1e-10
    assert whole.gauge == "svd" and largest_difference(whole.shift, token.shift) < 1e-12
    assert ll.results.Attribution.load(whole.save(tmp_path / "a.safetensors")).gauge == "svd"
    assert ll.first_order(lens, models.tokens(), MARGIN).gauge == ""


@pytest.mark.bad_input
def test_a_gauge_without_ranks_is_refused():
    lens = cases.case("llama", list(models.MAKERS)[0], "raw").lens
    for options in ({"by": "head", "gauge": "svd"}, {"by": "rank", "gauge": "SVD"}):
        with pytest.raises(ll.errors.ArgumentError, match="gauge"):
            ll.first_order(lens, models.tokens(), MARGIN, **options)


def test_shares_of_a_divergence_know_the_gauge():
    """Those by rank of the SVD are the same whatever the factors; as trained they are not."""
    lens = cases.case("qwen2", list(models.MAKERS)[0], "raw").lens
    other = with_factors(lens, mixed(models.seeded(5)))

    def shares(of: ll.LoraLens, gauge: str) -> torch.Tensor:
        found = ll.kl_shares(
            of, models.tokens(), by="rank", gauge=gauge, scales=(), progress=False
        ).attribution
        assert found.gauge == gauge
        return found.values

    svd = shares(lens, "svd")
    assert largest_difference(svd, shares(other, "svd")) < 1e-9 * svd.abs().max()
    assert largest_difference(svd, shares(other, "trained")) > 1e-2 * svd.abs().max()
    assert largest_difference(svd, shares(with_factors(lens, by_numpy), "trained")) < 1e-10
    assert largest_difference(svd.sum(-1), shares(lens, "trained").sum(-1)) < 1e-10
    with pytest.raises(ll.errors.ArgumentError, match="by='rank' too"):
        ll.kl_shares(lens, models.tokens(), gauge="svd")
