"""The coordinates of the SVD: the same ΔW, unchanged by any (G, G⁻¹), from the thin factors."""

from __future__ import annotations

import cases
import models
import pytest
import torch
from differences import largest_difference

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


def test_is_the_svd_of_the_dense_update():
    """T and M against numpy's dense decomposition, signs included."""
    generator = models.seeded(1)
    A, B = (torch.randn(*size, generator=generator).double() for size in ((3, 10), (12, 3)))
    turn = svd_turn(Update(A, B, 0.7))
    U, sigma, Vt = torch.linalg.svd(0.7 * B @ A, full_matrices=False)
    U, sigma, Vt = U[:, :3], sigma[:3], Vt[:3]
    signs = U.gather(0, U.abs().argmax(0)[None]).sign()
    assert largest_difference(0.7 * B @ turn.from_svd, U * signs) < 1e-12
    assert largest_difference(turn.to_svd @ A, (Vt * signs.T) * sigma[:, None]) < 1e-12
    assert largest_difference(turn.sigma, sigma) < 1e-12


@pytest.mark.parametrize("of", ["A", "B", "both", "wide"])
def test_missing_directions_are_zero(of: str):
    """Factors of less than full rank, and more ranks than the map has features."""
    generator = models.seeded(2)
    rank = 9 if of == "wide" else 4
    A, B = (torch.randn(*size, generator=generator).double() for size in ((rank, 8), (6, rank)))
    if of in ("A", "both"):
        A[2] = A[0] - A[1]
    if of in ("B", "both"):
        B[:, 3] = 2 * B[:, 1]
    turn = svd_turn(Update(A, B, 1.0))
    full = torch.linalg.matrix_rank(B @ A)
    assert largest_difference(B @ turn.from_svd @ turn.to_svd @ A, B @ A) < 1e-12
    assert bool((turn.to_svd[full:] == 0).all()) and bool((turn.from_svd[:, full:] == 0).all())
    U = (B @ turn.from_svd)[:, :full]
    assert largest_difference(U.T @ U, torch.eye(int(full))) < 1e-11


def test_first_of_entries_of_one_magnitude_is_positive():
    turn = svd_turn(Update(torch.ones(1, 4), torch.tensor([[-1.0], [1.0], [0.5]]), 1.0))
    assert turn.to_svd[0, 0] < 0 and turn.from_svd[0, 0] < 0
    nothing = svd_turn(Update(torch.zeros(0, 4), torch.zeros(3, 0), 1.0))
    assert nothing.to_svd.shape == (0, 0)


@pytest.mark.parametrize(("family", "cls", "flags"), cases.CASES)
def test_same_model_in_the_other_gauge(family: str, cls: str, flags: str):
    """Every δ of the plan is what it was: biases, folded norms and value biases included."""
    if not models.is_built_right(family, cls, flags):
        pytest.skip("this version of transformer-lens builds another model")
    lens = cases.case(family, cls, flags).lens
    plain, svd = lens.plan, lens.plan.in_svd_gauge
    generator = models.seeded(4)
    for one, other in zip(plain.injections, svd.injections, strict=True):
        z = torch.randn(2, 3, one.map.width, generator=generator, dtype=torch.float64)
        assert largest_difference(one.map(z), other.map(z)) < 1e-11
        if one.whole is not None:
            assert other.whole is not None
            assert largest_difference(one.whole(z), other.whole(z)) < 1e-11


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_factors_mixed_by_any_matrix_give_the_same(family: str, cls: str):
    """Fused modules too, whose sites share A and have an SVD each."""
    case = cases.case(family, cls, "processed")
    other = case.lens.with_adapter(mixed(case.lens.adapter))
    moved = 0.0
    for one, two in zip(
        case.lens.plan.in_svd_gauge.maps, other.plan.in_svd_gauge.maps, strict=True
    ):
        assert (
            largest_difference(one.A, two.A) < 1e-10 and largest_difference(one.sB, two.sB) < 1e-10
        )
    for one, two in zip(case.lens.maps, other.maps, strict=True):
        moved = max(moved, largest_difference(one.A, two.A))
    assert moved > 0.1
