"""The forms in which directions are given, and what is refused: the one rule for all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lens_lora as ll
from lens_lora.formats.directions import directions_of


def drawn(*shape: int, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.mark.bad_input
def test_one_rule_takes_every_form():
    v = drawn(3, 16)
    assert torch.equal(directions_of(v[0]).rows, v[:1])
    assert torch.equal(directions_of({"a": v[0], "b": v[1:]}).rows, v)
    assert directions_of({"a": v[0], "b": v[1:]}).labels == (("a", 0), ("b", 0), ("b", 1))

    class Coder:
        W_enc = v.T
        encode = staticmethod(lambda h: h @ v.T)

    assert torch.equal(directions_of((Coder(), [2, 0])).rows, v[[2, 0]])
    assert torch.equal(directions_of((Coder(), 1)).rows, v[1:2])
    h = drawn(2, 16)
    assert torch.equal(directions_of((Coder(), [2])).encode(h), (h @ v.T)[:, [2]])
    assert directions_of((Coder(), [2])).names == ("feature",)

    class Pointed:
        by_point = {"blocks.0.hook_resid_post": v[0], "blocks.1.hook_resid_post": v[1]}

    name = "blocks.1.hook_resid_post"
    assert torch.equal(directions_of(Pointed(), name).rows[0], v[1])
    with pytest.raises(ll.errors.ArgumentError, match="none at 'blocks.7.hook_resid_post'"):
        directions_of(Pointed(), "blocks.7.hook_resid_post")
    for wrong in (v.long(), v[None], v[:0], {}, {"a": v[0], "b": v[0, :3]}, (Coder(), [3]), [1.0]):
        with pytest.raises(ll.errors.ArgumentError, match="directions|features"):
            directions_of(wrong)
    with pytest.raises(ll.errors.ArgumentError, match="NaN"):
        directions_of(v * torch.nan)
    with pytest.raises(ll.errors.ArgumentError, match="'the direction' is zero"):
        directions_of(torch.zeros(16)).basis()
