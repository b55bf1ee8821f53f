"""Values of g at the base model with each head's z moved towards the adapted model's.

With a mask m, every head's z becomes z + m_h (z(1) − z).

1. The adapted model runs once, and its z(1) are kept.
2. Then the base model runs under hooks that move z. Each row of a batch has a mask of its own.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core import Function, HookFn, LoraLens, Recording, ScaleInject
from lens_lora.errors import ModelStateError, require_finite


class HeadMasks:
    """Values and slopes of g as a function of a gate for each head.

    Attributes:
        names: the names of the heads, such as 'blocks.3.attn.hook_z[5]', in the order of a mask.
    """

    def __init__(self, g: Function) -> None:
        self._lens = g.lens
        points = list(g.lens.head_points("o"))
        self._groups = g.groups(graph=True)
        # The adapted model's z on the prompts of each group.
        self._adapted = [group.passes.record(points, 1.0) for group in self._groups]
        # How many heads each hook point of z holds; a mask lists them point by point.
        first = self._adapted[0]
        self._heads = {point: _head_count(g.lens, first, point) for point in first.firings}
        names: list[str] = []
        for point, count in self._heads.items():
            names += [f"{point}[{head}]" for head in range(count)]
        self.names: tuple[str, ...] = tuple(names)

    def values(self, masks: Float[Tensor, "point head"]) -> Float[Tensor, "batch point"]:
        """Evaluate g under each mask. At most a forward pass a mask, batched."""
        by_group: list[Tensor] = []
        for group, adapted in zip(self._groups, self._adapted, strict=True):
            rows = len(group.reading.owner)
            by_chunk: list[Tensor] = []
            for some in masks.split(group.passes.copies_at_once):
                moved = self._moved(adapted, some.repeat(rows, 1))
                by_chunk.append(group.passes.side_by_side(len(some), under=moved))
            by_group.append(torch.cat(by_chunk, 1))
        return torch.cat(by_group)

    def slopes(self, mask: Float[Tensor, " head"]) -> Float[Tensor, "batch head"]:
        """∂g/∂m. One forward and one backward pass."""
        by_group: list[Tensor] = []
        for group, adapted in zip(self._groups, self._adapted, strict=True):
            by_row = mask.repeat(len(group.reading.owner), 1).requires_grad_()
            gradient = group.passes.gradient(by_row, under=self._moved(adapted, by_row))
            by_group.append(group.reading.by_prompt(gradient))
        slopes = torch.cat(by_group)
        require_finite(slopes, "the slope of a head")
        return slopes

    def _moved(
        self, adapted: Recording, masks: Float[Tensor, "row head"]
    ) -> AbstractContextManager[None]:
        """The base model under one mask for each row; copies of a row follow one another."""
        hooks: list[tuple[str, HookFn]] = []
        by_point = masks.split(list(self._heads.values()), 1)
        for point, mask in zip(self._heads, by_point, strict=True):
            last_firing = adapted.firings[point][-1]
            move = functools.partial(_move, last_firing, mask, self._lens.heads.d_head)
            hooks.append((point, move))
        base = ScaleInject(self._lens.plan, self._lens.gates(0.0))
        return self._lens.injected(base, before=hooks)


def _move(
    adapted: Float[Tensor, "row pos *feature"],
    mask: Float[Tensor, "copy head"],
    width: int,
    z: Float[Tensor, "copy pos *feature"],
    hook: Any,
) -> Tensor:
    """A hook: z + m (z(1) − z), with one m for all features of a head."""
    del hook
    by_feature = mask.to(z).repeat_interleave(width, 1)
    weights = by_feature.view(-1, 1, *z.shape[2:]).expand_as(z)
    copies = len(z) // len(adapted)
    return z.lerp(adapted.repeat_interleave(copies, 0), weights)


def _head_count(lens: LoraLens, adapted: Recording, point: str) -> int:
    """How many heads there are at this hook point of z.

    Raises:
        ModelStateError: its features do not divide into heads of the model's width.
    """
    count = lens.heads.of("o")
    width = lens.heads.d_head
    shape = tuple(adapted.firings[point][0].shape)
    if not count or torch.Size(shape[2:]).numel() != count * width:
        raise ModelStateError(
            f"{point} holds a tensor {shape}, which is not {count} heads of z of width {width} "
            "each, so it cannot be split by head",
            remedy="search over='sites'.",
        )
    return count
