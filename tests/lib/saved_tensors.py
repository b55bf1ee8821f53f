"""The tensors that torch saves in a forward pass for the backward one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as fwad


class Saved(NamedTuple):
    """A tensor of a graph.

    Attributes:
        shape: its shape.
        is_dual: whether it holds a tangent.
    """

    shape: tuple[int, ...]
    is_dual: bool


@contextlib.contextmanager
def saved() -> Iterator[list[Saved]]:
    """Collect what is saved within the block."""
    found: list[Saved] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        in_level = fwad._current_level >= 0
        is_dual = in_level and fwad.unpack_dual(tensor).tangent is not None
        found.append(Saved(tuple(tensor.shape), is_dual))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
