"""The second derivative is right on every family: against differences, and symmetric."""

from __future__ import annotations

import cases
import models
import pytest
import torch
from differences import largest_difference
from every_family import EVERY, lens_of
from targets import hooked, peft_with
from two_scalars import scalar_lens

import lens_lora as ll
from lens_lora.core.function import gate_graph
from lens_lora.core.function import memory as batching
from lens_lora.core.function.gate_graph import hessian_product
from lens_lora.core.function.reverse import site_slopes

MARGIN = ll.Margin(5, 9)


@pytest.mark.sample(4)
@pytest.mark.parametrize(("family", "cls", "flags"), EVERY)
@pytest.mark.usefixtures("float64")
def test_derivatives_of_every_family_against_differences(family: str, cls: str, flags: str):
    """∂g/∂ε against differences of g, H v against differences of ∂g/∂ε; uᵀHv = vᵀHu."""
    lens = lens_of(family, cls, flags)
    prompts = lens.prompts(models.tokens())
    reading = MARGIN.reading(lens.model, prompts)
    sites = len(lens.sites)
    u, v = torch.randn(2, sites, generator=models.seeded(3), dtype=torch.float64)
    step = 1e-5

    def value(gates: torch.Tensor) -> torch.Tensor:
        """g, [batch]."""
        return reading.read(lens.logits(prompts, gates)[:, -1])

    def slopes(gates: torch.Tensor) -> torch.Tensor:
        """∂g/∂ε by reverse mode at any gates, [batch, site]."""
        return site_slopes(lens, reading, gates)

    zero = torch.zeros(sites, dtype=torch.float64)
    inside = torch.full((sites,), 0.3, dtype=torch.float64)
    slope = slopes(inside) @ v
    difference = (value(inside + step * v) - value(inside - step * v)) / (2 * step)
    assert largest_difference(slope, difference) < 1e-6 * slope.abs().max()

    for gates in (zero, inside):
        Hv = hessian_product(lens, reading, gates, v)
        Hu = hessian_product(lens, reading, gates, u)
        difference = (slopes(gates + step * v) - slopes(gates - step * v)) / (2 * step)
        size = difference.abs().max()
        assert largest_difference(Hv, difference) < 1e-6 * size
        assert largest_difference(Hv @ u, Hu @ v) < 1e-9 * size


@pytest.mark.parametrize("target", ["linears", "lm_head", "embedding", "positions", "lora_bias"])
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.usefixtures("float64")
def test_second_order_of_every_target(target: str, cls: str):
    """H v against differences of first order, for every kind of site; of a curved readout."""
    base, model = hooked("gpt2", cls, "processed")
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft_with("gpt2", base, target)), hf_model=base)
    prompts = lens.prompts(models.tokens())
    readout = ll.LogProb(7)
    reading = readout.reading(model, prompts)
    ones = torch.ones(len(lens.sites), dtype=torch.float64)

    def slopes(at: float) -> torch.Tensor:
        return ll.first_order(lens, prompts, readout, at=at).values

    step = 1e-5
    for at in (0.0, 1.0):
        product = hessian_product(lens, reading, at * ones, ones)
        difference = (slopes(at + step) - slopes(at - step)) / (2 * step)
        assert largest_difference(product, difference) < 1e-6 * difference.abs().max()


def test_second_order_by_hand():
    """y = (2 + 5ε₂)(1 + ε₁/2)²·9: H₁₁ = 9, H₁₂ = 45, H₂₂ = 0 at ε = 0."""
    lens = scalar_lens(torch.square)
    prompts = lens.prompts(torch.tensor([[3]]))
    reading = ll.Logit(0).reading(lens.model, prompts)
    zero = torch.zeros(2, dtype=torch.float64)
    first, second = torch.eye(2, dtype=torch.float64)
    assert hessian_product(lens, reading, zero, first).tolist() == [[9.0, 45.0]]
    assert hessian_product(lens, reading, zero, second).tolist() == [[45.0, 0.0]]


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.usefixtures("float64")
def test_many_directions_at_their_own_rows(cls: str, monkeypatch):
    """Chunks of two of five directions, each as alone; of readouts with several rows a prompt."""
    lens = cases.case("gpt2", cls, "raw").lens
    prompts = ll.results.Prompts(models.tokens(), torch.tensor([7, 4]))
    readout = ll.AnswerMargin(torch.tensor([5, 9, 12]), torch.tensor([5, 7]))
    reading = readout.reading(lens.model, prompts)
    at = lens.gates(0.3)
    directions = torch.randn(5, len(lens.sites), generator=models.seeded(3), dtype=torch.float64)
    limit = 2 * reading.rows.tokens.numel()
    monkeypatch.setattr(batching, "GRAPH_TOKENS", limit)
    chunks = list(gate_graph.hessian_products(lens, reading, at, directions, progress=False))
    assert [chunk.shape[1] for chunk in chunks] == [2, 2, 1]
    for found, direction in zip(torch.cat(chunks, 1).unbind(1), directions, strict=True):
        alone = hessian_product(lens, reading, at, direction)
        assert largest_difference(found, alone) < 1e-11 * alone.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.usefixtures("float64")
def test_groups_of_prompts_give_what_all_give(cls: str, monkeypatch):
    """H v, coupling and self-curvature, of one prompt at a time and of all at once."""
    lens = cases.case("llama", cls, "raw").lens
    prompts = ["w5 w7 w8", "w9 w10 w11 w12 w13 w14", "w5"]
    readout = ll.AnswerMargin("w5 w7", "w8 w9")
    reading = readout.reading(lens.model, lens.prompts(prompts))

    def second_derivatives(tokens_at_once: int) -> list[torch.Tensor]:
        monkeypatch.setattr(batching, "GRAPH_TOKENS", tokens_at_once)
        second = ll.second_order(lens, prompts, readout, self_curvature=True, progress=False)
        coupling = ll.coupling(lens, prompts, readout, group="layer", progress=False)
        product = hessian_product(lens, reading, lens.gates(0.3), lens.gates(0.7))
        return [product, coupling.matrix, second.self_curvature, second.half_row_sums]

    of_all = second_derivatives(1000)
    one_by_one = second_derivatives(1)
    for whole, apart in zip(of_all, one_by_one, strict=True):
        assert len(whole) == 3
        assert largest_difference(whole, apart) < 1e-11 * whole.abs().max()
