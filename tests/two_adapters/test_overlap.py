"""The overlap of changes of one kind by hand, and of changes that share no space."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lens_lora.errors import AdapterError
from lens_lora.two_adapters.overlap import (
    MatrixChange,
    NormChange,
    SiteChange,
    StackChange,
    overlap_of,
)

# ΔW = [[3, 0], [0, 2]], and ΔW′ = [[0, 5], [0, 0]], which writes along the first direction of ΔW
# and reads along its second one.
BASIS = torch.eye(2, dtype=torch.float64)
DIAGONAL = MatrixChange(BASIS, torch.tensor([3.0, 2.0]).double(), BASIS)
OFF_DIAGONAL = MatrixChange(BASIS[:, :1], torch.tensor([5.0]).double(), BASIS[:, 1:])

CHANGES: dict[str, SiteChange] = {
    "matrix": DIAGONAL,
    "norm": NormChange(torch.tensor([1.0, -2.0]).double()),
    "two experts": StackChange((DIAGONAL, OFF_DIAGONAL)),
    "three experts": StackChange((DIAGONAL, OFF_DIAGONAL, DIAGONAL)),
}
DIFFERENT = list(itertools.permutations(CHANGES, 2))


@pytest.mark.parametrize("name", CHANGES)
def test_the_inner_product_with_itself_is_the_square_of_the_norm(name: str):
    change = CHANGES[name]
    square = float(change.sigma.square().sum())
    assert overlap_of(change, change).inner == pytest.approx(square)


def test_two_matrices_that_share_directions_and_no_entry():
    """ΔW′ has its one entry where ΔW has a zero."""
    found = overlap_of(DIAGONAL, OFF_DIAGONAL)
    assert found.inner == 0
    assert found.read.tolist() == [1]
    assert found.write.tolist() == [1]


def test_norms_have_no_angles_and_no_random_directions():
    norm = CHANGES["norm"]
    found = overlap_of(norm, norm)
    assert len(found.read) == 0
    assert len(found.write) == 0
    assert math.isnan(overlap_of(norm, norm, torch.Generator()).inner)


@pytest.mark.parametrize(("mine", "theirs"), DIFFERENT)
@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["as they are", "random"])
def test_changes_in_different_spaces_are_refused(
    mine: str, theirs: str, generator: torch.Generator | None
):
    with pytest.raises(AdapterError, match="in different spaces") as refusal:
        overlap_of(CHANGES[mine], CHANGES[theirs], generator)
    assert str(CHANGES[mine]) in str(refusal.value)
    assert str(CHANGES[theirs]) in str(refusal.value)
