"""Two adapters on stacks of experts."""

from __future__ import annotations

import architectures
import models
import pytest
from differences import largest_difference

import lens_lora as ll
from lens_lora.two_adapters.overlap import changes_of_sites, overlap_of

pytestmark = models.NEEDS_NEWEST
# Stacks [expert, out, in]; stacks [expert, in, out] with biases; a family that `families` has.
NAMES = ["Qwen3-MoE", "gpt-oss", "Mixtral"]
EXPERTS = 4
RANK = 2


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest):
    with architectures.in_float64():
        yield architectures.case(request.param)


def stacks(lens: ll.LoraLens) -> list[int]:
    return [i for i, site in enumerate(lens.sites) if site.experts]


def test_two_stacks_are_compared_expert_by_expert(case):
    """⟨ΔW, ΔW′⟩ of the whole tensors; products of different experts are no part of it."""
    lens = case.lens
    other = case.lens.adapter.null(5)
    mixed = case.lens.adapter.mixed(other, 0.3)
    changes = changes_of_sites(lens)
    others = changes_of_sites(lens.with_adapter(mixed))
    for index in stacks(lens):
        site = lens.sites[index]
        ours, theirs = (a.modules[site.module] for a in (lens.adapter, mixed))
        pair = overlap_of(changes[site.name], others[site.name])
        expected = float((ours.materialise() * theirs.materialise()).sum())
        across = float(((ours.B.T @ theirs.B) * (ours.A @ theirs.A.T)).sum())
        across *= ours.scale * theirs.scale
        assert abs(pair.inner - expected) < 1e-12 < 1e-3 < abs(across - expected)
        assert len(pair.read) == len(pair.write) == EXPERTS * RANK
        assert largest_difference(pair.read, 1) < 1e-6  # the mixture reads all that this reads
    random = ll.compare_adapters(lens, mixed, draws=4, progress=False).null_inner
    assert bool((random != 0).all())
