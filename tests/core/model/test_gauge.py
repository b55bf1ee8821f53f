"""The coordinates of the SVD: the same ΔW, unchanged by any (G, G⁻¹), from the thin factors."""

from __future__ import annotations

import cases
import models
import pytest
import torch
from differences import largest_difference
from torch import Tensor

import lens_lora as ll
from lens_lora.core.adapter.factors import LoRAFactors
from lens_lora.core.model.basis import Update
from lens_lora.core.model.gauge import svd_turn

pytestmark = pytest.mark.usefixtures("float64")


def mixed(adapter: ll.Adapter, seed: int = 5) -> ll.Adapter:
    """The same ΔW of every module from other factors: A → GA, B → BG⁻¹."""
    generator = models.seeded(seed)
    modules = {}
    for name, factors in adapter.modules.items():
        assert isinstance(factors, LoRAFactors)
        G = torch.randn(factors.rank, factors.rank, generator=generator, dtype=torch.float64)
        modules[name] = LoRAFactors(G @ factors.A, factors.B @ G.inverse(), factors.scale)
    return ll.Adapter.from_factors(modules)


def random_factors(seed: int, *, rank: int, reads: int, writes: int) -> tuple[Tensor, Tensor]:
    """A [rank, reads] and B [writes, rank]."""
    generator = models.seeded(seed)
    A = torch.randn(rank, reads, generator=generator).double()
    B = torch.randn(writes, rank, generator=generator).double()
    return A, B


def test_is_the_svd_of_the_dense_update():
    """T and M against numpy's dense decomposition, signs included."""
    A, B = random_factors(1, rank=3, reads=10, writes=12)
    scale = 0.7
    turn = svd_turn(Update(A, B, scale))

    U, sigma, Vt = torch.linalg.svd(scale * B @ A, full_matrices=False)
    U = U[:, :3]
    sigma = sigma[:3]
    Vt = Vt[:3]
    # The largest entry of each column of U is positive.
    largest = U.abs().argmax(0)[None]
    signs = U.gather(0, largest).sign()
    assert largest_difference(scale * B @ turn.from_svd, U * signs) < 1e-12
    assert largest_difference(turn.to_svd @ A, (Vt * signs.T) * sigma[:, None]) < 1e-12
    assert largest_difference(turn.sigma, sigma) < 1e-12


@pytest.mark.parametrize("of", ["A", "B", "both", "wide"])
def test_missing_directions_are_zero(of: str):
    """Factors of less than full rank, and more ranks than the map has features."""
    rank = 9 if of == "wide" else 4
    A, B = random_factors(2, rank=rank, reads=8, writes=6)
    if of in ("A", "both"):
        A[2] = A[0] - A[1]
    if of in ("B", "both"):
        B[:, 3] = 2 * B[:, 1]
    turn = svd_turn(Update(A, B, 1.0))

    there_and_back = B @ turn.from_svd @ turn.to_svd @ A
    assert largest_difference(there_and_back, B @ A) < 1e-12

    full = int(torch.linalg.matrix_rank(B @ A))
    assert bool((turn.to_svd[full:] == 0).all())
    assert bool((turn.from_svd[:, full:] == 0).all())
    U = (B @ turn.from_svd)[:, :full]
    assert largest_difference(U.T @ U, torch.eye(full)) < 1e-11


def test_first_of_entries_of_one_magnitude_is_positive():
    turn = svd_turn(Update(torch.ones(1, 4), torch.tensor([[-1.0], [1.0], [0.5]]), 1.0))
    assert turn.to_svd[0, 0] < 0
    assert turn.from_svd[0, 0] < 0
    nothing = svd_turn(Update(torch.zeros(0, 4), torch.zeros(3, 0), 1.0))
    assert nothing.to_svd.shape == (0, 0)


@pytest.mark.parametrize(("family", "cls", "flags"), cases.CASES)
def test_same_model_in_the_other_gauge(family: str, cls: str, flags: str):
    """Every δ of the plan is what it was: biases, folded norms and value biases included."""
    if not models.is_built_right(family, cls, flags):
        pytest.skip("this version of transformer-lens builds another model")
    plan = cases.case(family, cls, flags).lens.plan
    generator = models.seeded(4)
    for plain, svd in zip(plan.injections, plan.in_svd_gauge.injections, strict=True):
        z = torch.randn(2, 3, plain.map.width, generator=generator, dtype=torch.float64)
        assert largest_difference(plain.map(z), svd.map(z)) < 1e-11
        if plain.whole is not None:
            assert svd.whole is not None
            assert largest_difference(plain.whole(z), svd.whole(z)) < 1e-11


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_factors_mixed_by_any_matrix_give_the_same(family: str, cls: str):
    """Fused modules too, whose sites share A and have an SVD each."""
    lens = cases.case(family, cls, "processed").lens
    other = lens.with_adapter(mixed(lens.adapter))

    as_trained = zip(lens.maps, other.maps, strict=True)
    assert max(largest_difference(one.A, two.A) for one, two in as_trained) > 0.1

    by_svd = zip(lens.plan.in_svd_gauge.maps, other.plan.in_svd_gauge.maps, strict=True)
    for one, two in by_svd:
        assert largest_difference(one.A, two.A) < 1e-10
        assert largest_difference(one.sB, two.sB) < 1e-10
