"""Many gate vectors in one forward pass that branches: shared blocks are computed once.

Gate vectors that agree on every site up to block L have the same residual stream there.

1. Does it pay? The smallest tree of the points, and so its cost, is known before anything runs.
2. The pass starts with one row. At each block's input rows are added: one for each distinct
   history of gates up to and including that block, copied from the row with the history so far.
3. Within the block each row has its own gates; at the end each point reads its row.

Cost: at most one forward pass a point; for adding each site in turn, about half of that. A hook
adds the rows, so no part of the model's own pass is rewritten here; the other inputs of a block
(positions, masks) have one row, which broadcasts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.engine import batching
from lens_lora.hooked.attaching import HookFn
from lens_lora.hooked.gates import Inject, ScaleInject
from lens_lora.lens import LoraLens

__all__ = ["Tree", "more_copies", "neighbours_first", "pays"]


@dataclasses.dataclass(frozen=True)
class Tree:
    """Rows of each block.

    Attributes:
        parents: per block, the row of the block before that each row continues.
        gates: per block, [row, site].
        leaf: [point], the last block's row that is the point's.
    """

    parents: tuple[Int[Tensor, "_row"], ...]
    gates: tuple[Float[Tensor, "_row site"], ...]
    leaf: Int[Tensor, "point"]

    @classmethod
    def of(cls, lens: LoraLens, gates: Float[Tensor, "point site"]) -> Tree:
        """The smallest tree of these points, which must agree on the embeddings."""
        history = torch.zeros(len(gates), dtype=torch.long, device=gates.device)
        parents, rows = [], []
        for columns in _columns(lens):
            told = torch.cat([history[:, None].to(gates), gates[:, columns]], 1)
            _, now = torch.unique(told, dim=0, return_inverse=True)
            first = torch.full((int(now.max()) + 1,), len(gates), device=gates.device)
            points = torch.arange(len(gates), device=gates.device)
            first = first.scatter_reduce(0, now, points, "amin")
            parents.append(history[first])
            rows.append(gates[first])
            history = now
        return cls(tuple(parents), tuple(rows), history)

    @property
    def width(self) -> int:
        """The number of rows at the end of the pass."""
        return len(self.gates[-1])

    @property
    def cost(self) -> float:
        """The number of block passes, as a share of what running each point alone takes."""
        return sum(len(p) for p in self.parents) / (len(self.leaf) * len(self.parents))

    def run(
        self,
        lens: LoraLens,
        forward: Callable[[], Float[Tensor, "row *out"]],
        inject: Callable[[Float[Tensor, "row site"]], Inject] | None = None,
    ) -> Float[Tensor, "point *out"]:
        """The forward pass of one row, for every point.

        Args:
            lens: the adapter over the model.
            forward: runs the row under the hooks that are then on the model.
            inject: what is written in a block whose rows have these entries of the points; without
                it they are gates.
        """
        inject = functools.partial(ScaleInject, lens.plan) if inject is None else inject
        view = lens.plan.host
        grow = [
            (view.block_input(layer), _continued(parent))
            for layer, parent in enumerate(self.parents)
            if len(parent) > 1
        ]
        with lens.injected(_TreeInject(lens, self.gates, inject), before=grow):
            return forward()[self.leaf]


def pays(lens: LoraLens, gates: Float[Tensor, "point site"]) -> bool:
    """Whether branching is cheaper: the points share blocks, and rows may be added on the way."""
    if len(gates) < 2 or not lens.plan.host.grows:
        return False
    embeddings = [i for i, site in enumerate(lens.sites) if site.layer < 0]
    if not bool((gates[:, embeddings] == gates[:1, embeddings]).all()):
        return False
    return Tree.of(lens, gates).cost < batching.BRANCHING_PAYS


def neighbours_first(lens: LoraLens, gates: Float[Tensor, "point site"]) -> Int[Tensor, "point"]:
    """An order in which points that share their first blocks are neighbours."""
    columns = [gates[:, c] for c in sum(_columns(lens), [])]
    keys = torch.stack(columns[::-1]).cpu().numpy()
    return torch.from_numpy(np.lexsort(keys)).to(gates.device)


def _columns(lens: LoraLens) -> list[list[int]]:
    """The sites of each block; those before the blocks go with the first, after them the last."""
    last = lens.plan.host.n_layers - 1
    blocks: list[list[int]] = [[] for _ in range(last + 1)]
    for index, site in enumerate(lens.sites):
        blocks[min(max(site.layer, 0), last)].append(index)
    return blocks


def more_copies(count: int) -> HookFn:
    """A hook that appends `count` copies of the batch's first row.

    If the batch is dual, the first row must have no tangent.
    """

    def hook_fn(tensor: Tensor, hook: Any) -> Tensor:
        del hook
        return torch.cat([tensor, tensor[:1].expand(count, *tensor.shape[1:])])

    return hook_fn


def _continued(parent: Int[Tensor, "row"]) -> HookFn:
    """A hook after which each row continues its parent."""

    def hook_fn(tensor: Tensor, hook: Any) -> Tensor:
        del hook
        return tensor[parent.to(tensor.device)]

    return hook_fn


class _TreeInject:
    def __init__(
        self,
        lens: LoraLens,
        gates: tuple[Float[Tensor, "_row site"], ...],
        inject: Callable[[Float[Tensor, "_row site"]], Inject],
    ) -> None:
        last = len(gates) - 1
        before, at = inject(gates[0][:1]), [inject(rows) for rows in gates]
        layers = [lens.sites[i.site].layer for i in lens.plan.injections]
        self._scaled = [before if layer < 0 else at[min(layer, last)] for layer in layers]

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        return self._scaled[index](index, out, z)
